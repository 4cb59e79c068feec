"""Slow, idle and half-dead connections: what a stranger may hold without working for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from attacks.context import EXCHANGE, Context
from attacks.http_wire import Line, frame, request
from attacks.registry import attack

SLOW_LINES = 40
MIB = 2**20
GRACE_S = 4.0
"""Beyond the target's own timeouts."""


async def _all_closed(lines: list[Line], within_s: float) -> str:
    """Whether the node closes all connections in time."""
    closed = await asyncio.gather(*(line.is_closed(within_s) for line in lines))
    return "closed" if all(closed) else f"{closed.count(False)} of {len(lines)} held"


@contextlib.asynccontextmanager
async def _lines(ctx: Context, count: int, begin: bytes = b"") -> AsyncIterator[list[Line]]:
    """Connections that have all sent `begin`; those that the node refuses are left out."""
    lines: list[Line] = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError, TimeoutError):
                lines.append(await ctx.connect())
                await lines[-1].send(begin)
        yield lines
    finally:
        await asyncio.gather(*(line.close() for line in lines))


async def _drip(lines: list[Line], every_s: float, seconds: float) -> None:
    """A byte on every connection now and then."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        await asyncio.sleep(every_s)
        await asyncio.gather(*(line.send(b"a") for line in lines))


@attack("slow_idle_connections", expects="closed", once=True, limit_s=30)
async def idle_connections(ctx: Context) -> str:
    """Forty connections that never say anything."""
    async with _lines(ctx, SLOW_LINES) as lines:
        return await _all_closed(lines, ctx.target.limits.http_head_timeout_s + GRACE_S)


@attack("slow_headers", expects="closed", once=True, limit_s=30)
async def slow_headers(ctx: Context) -> str:
    """Slow loris: forty requests whose headers come a byte at a time, each byte in time."""
    async with _lines(ctx, SLOW_LINES, b"GET /v2/health/live HTTP/1.1\r\nX-Slow: ") as lines:
        await _drip(lines, 0.25, ctx.target.limits.http_head_timeout_s + 1)
        return await _all_closed(lines, GRACE_S)


@attack("slow_body_pause", expects="frame 400", once=True, limit_s=60)
async def body_pause(ctx: Context) -> str:
    """A call that stops in the middle of its body and keeps the connection."""
    half = request("POST", EXCHANGE, ctx.call(rows=4))[:-100]
    async with await ctx.connect() as line:
        await line.send(half)
        return (await line.reply(ctx.target.limits.idle_read_timeout_s + GRACE_S)).seen_frames


@attack("slow_body_drip", expects="closed", once=True, limit_s=60)
async def body_drip(ctx: Context) -> str:
    """Forty calls whose bodies come a byte at a time, each byte just in time: a megabyte would take a month."""
    call = ctx.call(rows=4)
    begin = request("POST", EXCHANGE, headers={"Content-Length": str(len(call))}) + call[:-1000]
    async with _lines(ctx, SLOW_LINES, begin) as lines:
        await _drip(lines, ctx.target.limits.idle_read_timeout_s / 3, ctx.target.limits.slow_body_grace_s + 2)
        return await _all_closed(lines, GRACE_S)


@attack("slow_reader", expects="closed", once=True, limit_s=60)
async def slow_reader(ctx: Context) -> str:
    """Four callers ask for 16 MB each and never read them: the node must not keep their results for ever."""
    rows = 16 * 2**20 // 256
    begin = request("POST", EXCHANGE, ctx.call(rows=rows, value=0.0))
    async with _lines(ctx, 4) as lines:
        for line in lines:
            line.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await line.send(begin)
        await asyncio.sleep(ctx.target.limits.write_stall_timeout_s + 2)
        return await _still_unread(lines, rows * 256)


async def _still_unread(lines: list[Line], size: int) -> str:
    """`closed` when the node has given up: then less than the whole reply can be read."""
    whole = 0
    for line in lines:
        line.writer.transport.resume_reading()  # type: ignore[attr-defined]
        reply = await line.reply(2.0)
        whole += len(reply.body) >= size
    return "closed" if not whole else f"{whole} replies were kept"


@attack("abandoned_calls", expects="given up", once=True)
async def abandoned_calls(ctx: Context) -> str:
    """Callers that hang up in the middle: of a prefix, a header, a body, before the answer."""
    call = ctx.call(rows=64)
    whole = request("POST", EXCHANGE, call)
    async for turn in ctx.paced(60, burst=4):
        cut = (len(whole) - len(call) + 3, len(whole) - len(call) + 40, len(whole) - 500, len(whole))[turn % 4]
        async with await ctx.connect() as line:
            await line.send(whole[:cut])
    return "given up" if (await ctx.exchange(ctx.call())).seen_frames == "frame 200" else "no answer afterwards"


@attack("reserved_memory", expects="frame 400", once=True, limit_s=60)
async def reserved_memory(ctx: Context) -> str:
    """Four calls announce 200 MB each and send none of it: memory is taken as bytes come, and given back."""
    return await _announce(ctx, [200 * MIB] * 4)


async def _announce(ctx: Context, sizes: list[int]) -> str:
    """Calls that announce so many bytes and send a few; what the node answers when no more comes."""
    width = ctx.tensors(ctx.uids["victim"], "forward")[0]["shape"][-1]
    async with _lines(ctx, len(sizes)) as lines:
        for line, wanted in zip(lines, sizes, strict=False):
            tensors = ctx.tensors(ctx.uids["victim"], "forward", wanted // (4 * width))
            size = tensors[0]["parameters"]["binary_data_size"]
            start = frame({"id": "large", "model_name": ctx.uids["victim"], "inputs": tensors}, body_bytes=size)
            head = request("POST", EXCHANGE, headers={"Content-Length": str(len(start) + size)})
            await line.send(head + start + bytes(64))
        memory = ctx.target.resident_bytes()
        replies = await asyncio.gather(*(line.reply(ctx.target.limits.idle_read_timeout_s + GRACE_S) for line in lines))
        ctx.notes["resident_mib"] = memory and memory >> 20
    codes = {code for reply in replies for code in reply.seen_frames.removeprefix("frame ").split("+")}
    return "frame " + "+".join(sorted(codes))


@attack("pipelined_unread", expects="held back or closed", once=True)
async def pipelined_unread(ctx: Context) -> str:
    """Thousands of requests on one connection, no reply is read: the node stops reading, too."""
    get = request("GET", "/p2pmoe/v1/experts", headers={"X-Padding": "p" * 4000})
    async with await ctx.connect() as line:
        line.writer.transport.pause_reading()  # type: ignore[attr-defined]
        async for _ in ctx.paced(20):
            line.writer.write(get * 500)
            ctx.sent["requests"] += 500
            try:
                async with asyncio.timeout(0.3):
                    await line.writer.drain()
            except TimeoutError:
                return "held back"
            except OSError:
                return "closed"
        return "all read"


@attack("budget_hoarding", expects="frame 400 or frame 400+429 or frame 429", once=True, limit_s=60)
async def budget_hoarding(ctx: Context) -> str:
    """Calls announce all of the node's memory for calls, ever smaller ones to the last byte, and send none."""
    return await _announce(ctx, [200 * MIB] * 11 + [40 * MIB] * 4 + [8 * MIB] * 5 + [MIB] * 8 + [MIB // 16] * 16)


@attack("connection_flood", expects="429 or closed", once=True, limit_s=20, needs="own")
async def connection_flood(ctx: Context) -> str:
    """More connections than the node takes, all kept open: the next ones are refused, those that were there go on."""
    async with _lines(ctx, ctx.target.limits.max_connections + 60) as lines:
        ctx.notes["opened"] = len(lines)
        try:
            async with await ctx.connect() as one_more:
                await one_more.send(request("GET", "/v2"))
                return (await one_more.reply()).seen
        except (OSError, TimeoutError):
            return "closed"
