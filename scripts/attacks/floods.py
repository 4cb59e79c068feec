"""As much as one stranger's laptop would send of requests that are right in themselves. The rates are in the report."""

from __future__ import annotations

import asyncio
import secrets

from attacks.context import EXCHANGE, Context
from attacks.http_wire import request
from attacks.registry import attack
from p2pmoe.protocol.datagrams import Find, Ping

CONNECTIONS = 8


async def _flood(ctx: Context, data: bytes, per_s: float) -> str:
    """The same request over eight connections; the statuses that came back."""
    seen: set[str] = set()

    async def work() -> None:
        async with await ctx.connect() as line:
            async for _ in ctx.paced(per_s / CONNECTIONS):
                ctx.sent["requests"] += 1
                if not await line.send(data):
                    return
                reply = await line.reply()
                seen.add(reply.seen)
                if not reply.status or reply.headers.get("connection") == "close":
                    return

    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    return "+".join(sorted(seen))


@attack("flood_health", expects="200 or 200+429 or 429", once=True)
async def health(ctx: Context) -> str:
    """Readiness 400 times a second: each asks for a real forward pass."""
    return await _flood(ctx, request("GET", "/v2/health/ready"), 400)


@attack("flood_metrics", expects="200 or 200+429 or 429", once=True, needs="own")
async def metrics(ctx: Context) -> str:
    """The metrics page 100 times a second, from the node's own machine."""
    return await _flood(ctx, request("GET", "/metrics", headers={"Host": ctx.target.host}), 100)


@attack("flood_unknown_paths", expects="404", once=True)
async def unknown_paths(ctx: Context) -> str:
    """A path that does not exist, 400 times a second."""
    return await _flood(ctx, request("GET", f"/{secrets.token_hex(8)}"), 400)


@attack("flood_connects", expects="answered", once=True)
async def connects(ctx: Context) -> str:
    """A new connection for every request, 100 a second."""
    async for _ in ctx.paced(100, burst=4):
        async with await ctx.connect() as line:
            await line.send(request("GET", "/v2/health/live"))
    return "answered" if (await ctx.request("GET", "/v2/health/live")).status in {200, 429} else "no answer"


@attack("flood_forward_calls", expects="200 or 200+429 or 429", once=True)
async def forward_calls(ctx: Context) -> str:
    """Right forward calls of 16 rows, 200 a second, by a stranger who is merely greedy."""
    return await _flood(ctx, request("POST", EXCHANGE, ctx.call(rows=16)), 200)


@attack("flood_pings", expects="answered", once=True)
async def pings(ctx: Context) -> str:
    """DHT pings, 1,500 a second."""
    async with ctx.udp() as udp:
        async for _ in ctx.paced(1500, burst=15):
            udp.send(Ping(secrets.token_bytes(8), b"", b""))
        ctx.notes["answered"] = len(udp.received)
    async with ctx.udp() as other:
        return "answered" if await other.ping() is not None else "silent to others"


@attack("flood_finds", expects="over budget", once=True, limit_s=15)
async def finds(ctx: Context) -> str:
    """Look-ups with a token, 2.4 MB/s: beyond its budget a source is not answered; others are."""
    async with ctx.udp() as udp:
        token, key = await udp.token(), ctx.near_key()
        ctx.ends_at += 1.6  # a budget has a burst of two seconds
        async for _ in ctx.paced(2000, burst=40):
            udp.send(Find(secrets.token_bytes(8), b"", token, key, 32, bytes(1100)))
        await udp.silence_or_reply(0.1)
        ctx.notes["answered"] = len(udp.received)
    async with ctx.udp() as other:
        if await other.ping() is None:
            return "silent to others"
    return "over budget" if ctx.notes["answered"] < 0.95 * ctx.sent["datagrams"] else "all answered"
