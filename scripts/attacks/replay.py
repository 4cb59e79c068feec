"""Backward calls sent again: a gradient counts once."""

from __future__ import annotations

import asyncio
import secrets

from attacks.context import Context
from attacks.http_wire import Reply
from attacks.registry import attack


@attack("replay_backward", expects="1 update", per_s=5)
async def replay_backward(ctx: Context) -> str:
    """One backward call twenty times, one after the other and at once."""
    victim = ctx.uids["victim"]
    call, before = ctx.call(victim, "backward"), await ctx.update_count(victim)
    replies = [await ctx.exchange(call) for _ in range(5)]
    replies += await asyncio.gather(*(ctx.exchange(call, call, call) for _ in range(5)))
    ctx.updates[victim] += 1
    if {reply.seen_frames for reply in replies} != {"frame 200"}:
        return "+".join(sorted({reply.seen_frames for reply in replies}))
    return f"{await ctx.update_count(victim) - before} update"


@attack("replay_other_expert", expects="frame 409", per_s=5)
async def replay_other_expert(ctx: Context) -> str:
    """An id that was used for one expert, used for another."""
    call_id = secrets.token_hex(16)
    await ctx.exchange(ctx.call(ctx.uids["victim"], "backward", call_id=call_id))
    ctx.updates[ctx.uids["victim"]] += 1
    return (await ctx.exchange(ctx.call(ctx.uids["untouched"], "backward", call_id=call_id))).seen_frames


@attack("replay_changed_gradient", expects="first answer", per_s=5)
async def replay_changed_gradient(ctx: Context) -> str:
    """A known id with another gradient: nothing is applied, the first answer comes back."""
    victim, call_id = ctx.uids["victim"], secrets.token_hex(16)
    first: Reply = await ctx.exchange(ctx.call(victim, "backward", call_id=call_id))
    ctx.updates[victim] += 1
    before = await ctx.update_count(victim)
    second = await ctx.exchange(ctx.call(victim, "backward", call_id=call_id, value=5.0))
    if await ctx.update_count(victim) != before:
        return "applied"
    return "first answer" if second.answers == first.answers else second.seen_frames


@attack("replay_expired", expects="0 updates", per_s=5)
async def replay_expired(ctx: Context) -> str:
    """A backward call whose deadline is over trains nothing, however often it comes."""
    victim = ctx.uids["victim"]
    before = await ctx.update_count(victim)
    call = ctx.call(victim, "backward", parameters={"timeout_ms": 0})
    codes = {(await ctx.exchange(call)).seen_frames for _ in range(3)}
    return f"{await ctx.update_count(victim) - before} updates" if codes == {"frame 504"} else "+".join(sorted(codes))


@attack("replay_hung_up", expects="at most 1 update", per_s=5)
async def replay_hung_up(ctx: Context) -> str:
    """A backward call whose sender hangs up and sends it again."""
    from attacks.context import EXCHANGE
    from attacks.http_wire import request

    victim = ctx.uids["victim"]
    before = await ctx.update_count(victim)
    call = ctx.call(victim, "backward")
    for _ in range(4):
        async with await ctx.connect() as line:
            await line.send(request("POST", EXCHANGE, call))
    await ctx.exchange(call)
    count = await ctx.update_count(victim) - before
    ctx.updates[victim] += count
    return "at most 1 update" if count <= 1 else f"{count} updates"
