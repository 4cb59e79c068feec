"""Names as weapons: uids that climb out of folders, split headers, or fill the metrics."""

from __future__ import annotations

from attacks.context import Context
from attacks.http_wire import frame
from attacks.registry import attack

TRICKS = (
    "..%2f..%2f..%2fetc%2fpasswd",
    "..%5c..%5cidentity.pem",
    "%2e%2e/%2e%2e/identity.pem",
    "%00",
    "ffn.0.0%00.pem",
    "%c0%ae%c0%ae",
    "%ff%fe",
    "~root",
    "$(id)",
    "%7b%7bconfig%7d%7d",
    "ffn.0.0;ls",
)
SUFFIXES = ("", "/ready", "/versions/1")


@attack("path_uid_traversal", expects="404 or 400")
async def uid_traversal(ctx: Context) -> str:
    """Uids in paths that point into the file system, or into a template."""
    trick, suffix = ctx.dice.choice(TRICKS), ctx.dice.choice(SUFFIXES)
    reply = await ctx.request("GET", f"/v2/models/{trick}{suffix}")
    return "file contents" if b"root:" in reply.body or b"PRIVATE KEY" in reply.body else reply.seen


@attack("path_root_traversal", expects="404 or 400")
async def root_traversal(ctx: Context) -> str:
    """Files of the machine and of the package, asked for by path."""
    path = ctx.dice.choice(
        ("/../../etc/passwd", "/identity.pem", "/node.toml", "//etc/passwd", "/.git/config", "/debug")
    )
    reply = await ctx.request("GET", path)
    return "file contents" if b"root:" in reply.body or b"PRIVATE KEY" in reply.body else reply.seen


@attack("path_call_uid_tricks", expects="frame 404")
async def call_uid_tricks(ctx: Context) -> str:
    """The same tricks in the header of a call."""
    names = ("../../identity.pem", "ffn.0.0/../ffn.0.1", "ffn.0.0\0", "ffn.00.0", "FFN.0.0", "ffn.٠.0", "*", "ffn.*")
    tensors = ctx.tensors(ctx.uids["victim"], "forward")
    calls = (frame({"id": "x", "model_name": name, "inputs": tensors}, ctx.body(tensors)) for name in names)
    return (await ctx.exchange(*calls)).seen_frames


@attack("path_header_injection", expects="404 or 400")
async def header_injection(ctx: Context) -> str:
    """Line ends in a uid, to write a header or a second reply of one's own."""
    reply = await ctx.request("GET", "/v2/models/x%0d%0aSet-Cookie:%20own=1%0d%0a%0d%0aHTTP/1.1%20200%20OK")
    return "header injected" if "set-cookie" in reply.headers else reply.seen


@attack("path_uid_long", expects="404 or 400")
async def uid_long(ctx: Context) -> str:
    """A uid of 8,000 characters; the refusal does not repeat it."""
    reply = await ctx.request("GET", "/v2/models/ffn." + "9" * 7900)
    return reply.seen if len(reply.body) < 1000 else f"a reply of {len(reply.body)} B"


@attack("path_metrics_labels", expects="bounded", needs="own")
async def metrics_labels(ctx: Context) -> str:
    """Made-up experts, each of which would be a line in the metrics for ever."""
    tensors = ctx.tensors(ctx.uids["victim"], "forward")
    names = [f"made.{ctx.dice.randrange(2**31)}.{index}" for index in range(200)]
    await ctx.exchange(*(frame({"model_name": name, "inputs": tensors}, ctx.body(tensors, 0.0)) for name in names))
    reply = await ctx.request("GET", "/metrics", headers={"Host": ctx.target.host})
    text = reply.body.decode()
    if reply.status != 200 or ctx.uids["victim"] not in text:
        return f"no metrics: {reply.seen}"
    return "bounded" if "made." not in text else f"{text.count('made.')} labels"
