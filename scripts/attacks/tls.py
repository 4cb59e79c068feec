"""Attacks on the channel: older versions, no TLS at all, half a handshake, another's certificate."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
import warnings

from attacks.context import Context
from attacks.http_wire import Line, attacker_tls, request
from attacks.registry import attack
from p2pmoe.errors import P2PMoEError
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.types import Endpoint

HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(32) + b"\x00"


async def _plain(ctx: Context) -> Line:
    """A bare TCP connection to the TLS port."""
    return await Line.open(ctx.target.host, ctx.target.port, None, ctx.sent, source=ctx.source)


@attack("tls_downgrade", expects="handshake refused", needs="tls")
async def downgrade(ctx: Context) -> str:
    """A client that speaks TLS 1.2 at most."""
    context = attacker_tls()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        line = await Line.open(ctx.target.host, ctx.target.port, context, ctx.sent, source=ctx.source)
    except (ssl.SSLError, ConnectionError):
        return "handshake refused"
    version = line.writer.get_extra_info("ssl_object").version()
    await line.close()
    return f"spoke {version}"


@attack("tls_plain_http", expects="closed", needs="tls")
async def plain_http(ctx: Context) -> str:
    """A request in the clear on the TLS port."""
    async with await _plain(ctx) as line:
        await line.send(request("GET", "/v2/health/live"))
        reply = await line.reply()
        return "closed" if reply.end in {"closed", "no HTTP"} else reply.seen


@attack("tls_to_plain_port", expects="400 or closed", needs="plain")
async def tls_to_plain_port(ctx: Context) -> str:
    """A TLS hello to a node that speaks plain HTTP."""
    return (await ctx.raw(HELLO + bytes(160), eof=True)).seen


@attack("tls_garbage_handshake", expects="closed", needs="tls")
async def garbage_handshake(ctx: Context) -> str:
    """Handshakes that are noise, have absurd lengths, or announce a version that does not exist."""
    hello = ctx.dice.choice(
        (
            ctx.dice.randbytes(400),
            b"\x16\x03\x01\xff\xff" + bytes(600),
            b"\x16\x09\x09" + bytes(90),
            HELLO + b"\xff" * 200,
        )
    )
    async with await _plain(ctx) as line:
        await line.send(hello)
        if line.writer.can_write_eof():
            line.writer.write_eof()
        return "closed" if await line.is_closed() else "held"


@attack("tls_handshake_stalled", expects="closed", once=True, limit_s=30, needs="tls")
async def handshake_stalled(ctx: Context) -> str:
    """Forty handshakes that stop in the middle of the first message."""
    async with contextlib.AsyncExitStack() as stack:
        lines = []
        for turn in range(40):
            with contextlib.suppress(OSError):
                lines.append(await stack.enter_async_context(await _plain(ctx)))
                await lines[-1].send(HELLO[: turn + 1])
        closed = await asyncio.gather(*(line.is_closed(ctx.target.limits.handshake_timeout_s + 4) for line in lines))
    return "closed" if all(closed) else f"{closed.count(False)} of {len(closed)} held"


@attack("tls_handshake_flood", expects="refused", once=True, limit_s=20, needs="tls")
async def handshake_flood(ctx: Context) -> str:
    """New handshakes as fast as one address may try, 200 a second: a signature each, if the node let them."""
    refused = 0
    ctx.ends_at += 1.4  # a source has a burst
    async for _ in ctx.paced(200, burst=4):
        try:
            async with await ctx.connect():
                pass
        except OSError:
            refused += 1
    ctx.notes["refused"] = refused
    return "refused" if refused else "answered"


@attack("tls_wrong_certificate", expects="client refuses", needs="tls", per_s=4)
async def wrong_certificate(ctx: Context) -> str:
    """A man in the middle with a certificate of its own, in the node's place: the client must send it nothing."""
    from p2pmoe.identity.certificate import install_certificate, make_certificate

    identity, heard = ctx.identity(), bytearray()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    install_certificate(context, identity, make_certificate(identity, time.time()))

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            heard.extend(await reader.read(4096))
        writer.transport.abort()

    server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    transport = HttpTransport()
    try:
        await transport.get_json(Endpoint("127.0.0.1", port, "https", ctx.public_key), "/v2")
    except P2PMoEError:
        return "client refuses" if not heard else f"the client sent {len(heard)} B"
    finally:
        await transport.close()
        server.close()
    return "client believes"
