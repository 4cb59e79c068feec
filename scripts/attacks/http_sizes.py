"""HTTP requests that are too large, compressed, chunked by lies, or no HTTP at all."""

from __future__ import annotations

from attacks.context import EXCHANGE, Context
from attacks.http_wire import request
from attacks.registry import attack


@attack("http_content_length_huge", expects="413")
async def content_length_huge(ctx: Context) -> str:
    """Ten terabytes are announced."""
    return (await ctx.raw(request("POST", EXCHANGE, b"\0" * 64, {"Content-Length": str(10**13)}))).seen


@attack("http_content_length_bad", expects="400")
async def content_length_bad(ctx: Context) -> str:
    """Lengths that are negative, signed, hexadecimal or of 5,000 digits."""
    value = ctx.dice.choice(("-1", "+5", "0x10", "9" * 5000, "1 2"))
    return (await ctx.raw(request("POST", EXCHANGE, b"12345", {"Content-Length": value}))).seen


@attack("http_header_line_huge", expects="400 or closed")
async def header_line_huge(ctx: Context) -> str:
    """One header of a megabyte."""
    return (await ctx.raw(request("GET", "/v2/health/live", headers={"X-Long": "x" * 2**20}))).seen


@attack("http_header_crowd", expects="400 or closed")
async def header_crowd(ctx: Context) -> str:
    """Twenty thousand headers."""
    return (await ctx.raw(request("GET", "/v2/health/live", headers={f"X-{i}": "1" for i in range(20_000)}))).seen


@attack("http_header_endless", expects="closed", once=True)
async def header_endless(ctx: Context) -> str:
    """Header lines for as long as the node reads them."""
    async with await ctx.connect() as line:
        await line.send(b"GET /v2/health/live HTTP/1.1\r\nHost: node\r\n")
        async for turn in ctx.paced(400):
            if not await line.send(b"X-%d: %s\r\n" % (turn, b"y" * 1000)) or line.reader.at_eof():
                return "closed"
        return "closed" if await line.is_closed(1.0) else "still reading"


@attack("http_path_huge", expects="400 or 414 or closed")
async def path_huge(ctx: Context) -> str:
    """A path of a megabyte."""
    return (await ctx.raw(request("GET", "/v2/models/" + "a" * 2**20))).seen


@attack("http_gzip_bomb", expects="400")
async def gzip_bomb(ctx: Context) -> str:
    """Compressed bodies, which could unpack to anything."""
    coding = ctx.dice.choice(("gzip", "deflate", "br", "zstd", "gzip, gzip"))
    return (await ctx.exchange(b"\x1f\x8b" + bytes(1000), headers={"Content-Encoding": coding})).seen


@attack("http_chunk_lie", expects="400 or closed")
async def chunk_lie(ctx: Context) -> str:
    """A chunk whose size is 2**64, negative, or no number."""
    size = ctx.dice.choice((b"FFFFFFFFFFFFFFFFF", b"-1", b"zz", b"0x10"))
    head = request("POST", EXCHANGE, headers={"Content-Length": "", "Transfer-Encoding": "chunked"})
    return (await ctx.raw(head + size + b"\r\n" + b"\0" * 16 + b"\r\n")).seen


@attack("http_chunk_extension_flood", expects="frame 400 or 400 or closed", per_s=2)
async def chunk_extension_flood(ctx: Context) -> str:
    """One chunk with a megabyte of extension."""
    head = request("POST", EXCHANGE, headers={"Content-Length": "", "Transfer-Encoding": "chunked"})
    return (await ctx.raw(head + b"1;" + b"e" * 2**20 + b"\r\n")).seen_frames


@attack("http_smuggling", expects="400 or closed")
async def smuggling(ctx: Context) -> str:
    """Content-Length and Transfer-Encoding in one request, to hide a second one in its body."""
    hidden = request("GET", "/metrics")
    head = request("POST", EXCHANGE, headers={"Content-Length": "5", "Transfer-Encoding": "chunked"})
    return (await ctx.raw(head + b"0\r\n\r\n" + hidden)).seen


@attack("http_no_http", expects="400 or closed")
async def no_http(ctx: Context) -> str:
    """Other protocols and noise on the port."""
    data = ctx.dice.choice(
        (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.7\r\n",
            b"EHLO node\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x00" * 2000,
            ctx.dice.randbytes(500) + b"\r\n\r\n",
        )
    )
    return (await ctx.raw(data, eof=True)).seen


@attack("http_methods", expects="404 or 405 or 400")
async def methods(ctx: Context) -> str:
    """Methods that nobody offers, on paths that exist."""
    method = ctx.dice.choice(("PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "PROPFIND", "CONNECT"))
    return (await ctx.request(method, ctx.dice.choice((EXCHANGE, "/metrics", "/v2")))).seen


@attack("version_path", expects="426")
async def version_path(ctx: Context) -> str:
    """Another version of the exchange: older, newer, absurd."""
    version = ctx.dice.choice(("0", "2", "00", "99999999999999999999"))
    return (await ctx.request("POST", f"/p2pmoe/v{version}/exchange", ctx.call())).seen


@attack("version_header_downgrade", expects="426")
async def version_header_downgrade(ctx: Context) -> str:
    """A header that asks for an older wire version."""
    version = ctx.dice.choice(("0", "-1", "1.0", "one", "1" * 64))
    return (await ctx.exchange(ctx.call(), headers={"P2PMoE-Wire-Version": version})).seen


@attack("version_call_downgrade", expects="frame 426")
async def version_call_downgrade(ctx: Context) -> str:
    """A call that asks for another wire version than its exchange."""
    return (await ctx.exchange(ctx.call(parameters={"wire_version": ctx.dice.choice((0, -1, 2, 2**60))}))).seen_frames
