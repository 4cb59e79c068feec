"""The Open Inference Protocol's door: JSON tensors, lengths, outputs that multiply."""

from __future__ import annotations

from attacks.context import Context
from attacks.registry import attack


def _json_call(ctx: Context, data: str, rows: int = 1) -> bytes:
    tensor = ctx.tensors(ctx.uids["victim"], "forward", rows)[0]
    shape = ",".join(map(str, tensor["shape"]))
    return f'{{"inputs":[{{"name":"0","datatype":"{tensor["datatype"]}","shape":[{shape}],"data":{data}}}]}}'.encode()


def _binary_call(ctx: Context, rows: int, **more: object) -> tuple[dict[str, object], bytes]:
    tensors = ctx.tensors(ctx.uids["victim"], "forward", rows)
    return {"inputs": tensors, **more}, ctx.body(tensors, 0.0)


@attack("oip_header_length_huge", expects="413 or 400")
async def header_length_huge(ctx: Context) -> str:
    """A JSON header of a petabyte is announced."""
    length = ctx.dice.choice((str(10**15), "9" * 15))
    return (await ctx.infer(b"{}", headers={"Inference-Header-Content-Length": length})).seen


@attack("oip_header_length_bad", expects="400")
async def header_length_bad(ctx: Context) -> str:
    """Lengths that are negative, fractions, other alphabets' digits, or beyond the body."""
    length = ctx.dice.choice(("-5", "1.5", "0x2", "1e3", "9" * 400, "300"))
    return (await ctx.infer(b"{}", headers={"Inference-Header-Content-Length": length})).seen


@attack("oip_json_values", expects="400")
async def json_values(ctx: Context) -> str:
    """Values that are no numbers of the type: text, null, NaN, 4,000 digits, nested lists 2,000 deep."""
    bad = ("NaN", "null", '"__import__"', "1" * 4000, "1e999", "true", "[" * 2000 + "]" * 2000)
    width = ctx.tensors(ctx.uids["victim"], "forward")[0]["shape"][-1]
    data = "[" + ",".join([ctx.dice.choice(bad)] * width) + "]"
    return (await ctx.infer(_json_call(ctx, data))).seen


@attack("oip_json_short", expects="400")
async def json_short(ctx: Context) -> str:
    """A million rows in the shape, three numbers in the data."""
    return (await ctx.infer(_json_call(ctx, "[1,2,3]", rows=2**20))).seen


@attack("oip_binary_size_lie", expects="400 or 413")
async def binary_size_lie(ctx: Context) -> str:
    """Binary sizes that are more or less than shape and body."""
    header, body = _binary_call(ctx, 1)
    size = ctx.dice.choice((0, len(body) - 1, len(body) + 1, 2**53))
    header["inputs"][0]["parameters"]["binary_data_size"] = size  # type: ignore[index]
    return (await ctx.infer(header, body)).seen


@attack("oip_trailing_bytes", expects="400")
async def trailing_bytes(ctx: Context) -> str:
    """Bytes after the last tensor."""
    header, body = _binary_call(ctx, 1)
    return (await ctx.infer(header, body + b"more")).seen


@attack("oip_outputs_multiplied", expects="400 or 413")
async def outputs_multiplied(ctx: Context) -> str:
    """One output is asked for 4,000 times: 300 kB of request for 65 MB of reply, which the node would have to hold."""
    header, body = _binary_call(ctx, 64, outputs=[{"name": "0"}] * 4000, parameters={"binary_data_output": True})
    reply = await ctx.infer(header, body)
    return reply.seen if len(reply.body) < 10**6 else f"{reply.seen} with {len(reply.body)} B"


@attack("oip_inputs_crowd", expects="400 or 413", per_s=5)
async def inputs_crowd(ctx: Context) -> str:
    """Twenty thousand inputs in one request."""
    one = {"datatype": "INT8", "shape": [1], "data": [0]}
    return (await ctx.infer({"inputs": [{"name": str(index), **one} for index in range(20_000)]})).seen


@attack("oip_json_endless", expects="413 or 400 or closed", once=True)
async def json_endless(ctx: Context) -> str:
    """Chunks of JSON that never end, at 20 MB/s."""
    path = f"/v2/models/{ctx.uids['victim']}/infer"
    async with await ctx.connect() as line:
        await line.send(f"POST {path} HTTP/1.1\r\nHost: node\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        sent = 0
        while sent < 64 * 2**20:
            if not await line.send(chunk) or line.reader.at_eof():
                break
            sent += 65536
            async for _ in ctx.paced(320, burst=8):
                if not await line.send(chunk):
                    break
                sent += 65536
        return (await line.reply()).seen


@attack("oip_json_large", expects="400 or 413", per_s=2)
async def json_large(ctx: Context) -> str:
    """Four megabytes of numbers as JSON, of which the last is none: the most work for the fewest bytes."""
    width = ctx.tensors(ctx.uids["victim"], "forward")[0]["shape"][-1]
    rows = 2 * 2**20 // width
    return (await ctx.infer(_json_call(ctx, "[" + "1," * (rows * width - 1) + "null]", rows))).seen
