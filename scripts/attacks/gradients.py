"""Gradients and inputs that poison: not finite, huge, or just far off. An expert's parameters stay finite."""

from __future__ import annotations

import math
import struct

from attacks.context import Context
from attacks.http_wire import PREFIX, Reply
from attacks.registry import attack

POISON = (math.nan, math.inf, -math.inf)


def _first_floats(reply: Reply, count: int = 8) -> tuple[float, ...]:
    header_bytes, body_bytes = PREFIX.unpack_from(reply.body)
    count = min(count, body_bytes // 4)
    return struct.unpack_from(f"<{count}f", reply.body, 8 + header_bytes)


async def _with_health(ctx: Context, reply: Reply) -> str:
    """What was answered, or that the expert is ruined."""
    asked = await ctx.exchange(ctx.call(value=0.5))
    if asked.seen_frames != "frame 200" or not all(map(math.isfinite, _first_floats(asked))):
        return f"{reply.seen_frames}, and the expert is ruined"
    return reply.seen_frames


@attack("gradient_nan", expects="frame 400", per_s=10)
async def gradient_nan(ctx: Context) -> str:
    """NaN and infinite gradients."""
    tensors = ctx.tensors(ctx.uids["victim"], "backward")
    inputs = len(ctx.tensors(ctx.uids["victim"], "forward"))
    values = [None] * inputs + [ctx.dice.choice(POISON)] * (len(tensors) - inputs)
    return await _with_health(ctx, await ctx.exchange(ctx.call("", "backward", values=values)))


@attack("gradient_nan_input", expects="frame 400", per_s=10)
async def gradient_nan_input(ctx: Context) -> str:
    """NaN inputs under honest gradients."""
    tensors = ctx.tensors(ctx.uids["victim"], "backward")
    values = [ctx.dice.choice(POISON)] + [None] * (len(tensors) - 1)
    return await _with_health(ctx, await ctx.exchange(ctx.call("", "backward", values=values)))


@attack("gradient_nan_forward", expects="frame 400", per_s=10)
async def gradient_nan_forward(ctx: Context) -> str:
    """NaN inputs of a forward pass."""
    return (await ctx.exchange(ctx.call(value=ctx.dice.choice(POISON)))).seen_frames


@attack("gradient_huge", expects="the expert is sound", per_s=6)
async def gradient_huge(ctx: Context) -> str:
    """Gradients and inputs near the largest number there is: squares and sums of them overflow."""
    victim = ctx.uids["victim"]
    before = await ctx.update_count(victim)
    values = [ctx.dice.choice((3e38, -3e38, 1e30, None)) for _ in ctx.tensors(victim, "backward")]
    reply = await ctx.exchange(ctx.call(victim, "backward", values=values))
    ctx.updates[victim] += await ctx.update_count(victim) - before
    seen = await _with_health(ctx, reply)
    return seen if "ruined" in seen else "the expert is sound"


@attack("gradient_outlier", expects="scaled down to what is usual", once=True, limit_s=20)
async def gradient_outlier(ctx: Context) -> str:
    """Gradients a million times as large as the 80 that came before, of a caller without a key."""
    victim = ctx.uids["victim"]
    count = len(ctx.tensors(victim, "backward")) - len(ctx.tensors(victim, "forward"))
    inputs: list[float | None] = [None] * len(ctx.tensors(victim, "forward"))
    before = await ctx.update_count(victim)
    for _ in range(80):
        await ctx.exchange(ctx.call(victim, "backward", values=[*inputs, *[1e-3] * count]))
    usual = _first_floats(await ctx.exchange(ctx.call(value=0.5)))
    replies = [await ctx.exchange(ctx.call(victim, "backward", values=[*inputs, *[1e3] * count])) for _ in range(5)]
    ctx.updates[victim] += await ctx.update_count(victim) - before
    seen = "+".join(sorted({reply.seen_frames for reply in replies}))
    after = _first_floats(await ctx.exchange(ctx.call(value=0.5)))
    moved = max(abs(old - new) for old, new in zip(usual, after, strict=True))
    if seen == "frame 200" and moved < 1.0:
        return "scaled down to what is usual"
    return f"{seen}, and the outputs moved by {moved:.3g}"
