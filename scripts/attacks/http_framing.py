"""Frames that lie: about lengths, shapes, types, JSON. Each spoils its own call at most."""

from __future__ import annotations

from attacks.context import Context
from attacks.http_wire import frame
from attacks.registry import attack


@attack("frame_prefix_truncated", expects="frame 400")
async def prefix_truncated(ctx: Context) -> str:
    """An exchange that ends inside a length prefix."""
    return (await ctx.exchange(b"\x10\0\0\0\0")).seen_frames


@attack("frame_body_truncated", expects="frame 400")
async def body_truncated(ctx: Context) -> str:
    """A call whose body ends early."""
    return (await ctx.exchange(ctx.call()[:-7])).seen_frames


@attack("frame_header_4gib", expects="frame 413")
async def header_4gib(ctx: Context) -> str:
    """A length prefix that announces a JSON header of 4 GiB."""
    return (await ctx.exchange(frame(b"{}", header_bytes=2**32 - 1))).seen_frames


@attack("frame_header_empty", expects="frame 400")
async def header_empty(ctx: Context) -> str:
    """A header of no bytes."""
    return (await ctx.exchange(frame(b""))).seen_frames


@attack("frame_body_4gib", expects="frame 400+413")
async def body_4gib(ctx: Context) -> str:
    """A body of 4 GiB is announced, a few bytes come."""
    return (await ctx.exchange(frame({"id": "a"}, b"\0" * 16, body_bytes=2**32 - 1))).seen_frames


@attack("frame_shape_bomb", expects="frame 400 or frame 413")
async def shape_bomb(ctx: Context) -> str:
    """A shape whose product overflows every integer, over a body of a few bytes."""
    return (await ctx.exchange(ctx.bad_call(shape=[2**53, 2**53, 2**53]))).seen_frames


@attack("frame_shape_empty_bomb", expects="frame 400 or frame 413")
async def shape_empty_bomb(ctx: Context) -> str:
    """No bytes by a dimension of 0, and another of 2**53."""
    tensor = {"shape": [0, 2**53], "parameters": {"binary_data_size": 0}}
    return (await ctx.exchange(ctx.bad_call(b"", **tensor))).seen_frames


@attack("frame_shape_negative", expects="frame 400")
async def shape_negative(ctx: Context) -> str:
    """Negative dimensions whose product is positive."""
    return (await ctx.exchange(ctx.bad_call(shape=[-1, -64]))).seen_frames


@attack("frame_zip_bomb_codec", expects="frame 400")
async def zip_bomb_codec(ctx: Context) -> str:
    """A codec that would unpack: a megabyte of zeros in a kilobyte."""
    parameters = {"binary_data_size": 1024, "codec": "gzip"}
    return (await ctx.exchange(ctx.bad_call(b"\x1f\x8b" + bytes(1022), parameters=parameters))).seen_frames


@attack("frame_codec_growth", expects="frame 400+413")
async def codec_growth(ctx: Context) -> str:
    """Small on the wire, four times as large in memory: FP64 sent as fp16, over the limit only when unpacked."""
    rows = 48 * 2**20
    tensor = {"datatype": "FP64", "shape": [rows, 1], "parameters": {"binary_data_size": 2 * rows, "codec": "fp16"}}
    header = {"id": "grow", "model_name": ctx.uids["victim"], "inputs": [{"name": "0", **tensor}]}
    return (await ctx.exchange(frame(header, b"\0" * 64, body_bytes=2 * rows))).seen_frames


@attack("frame_rank_bomb", expects="frame 400")
async def rank_bomb(ctx: Context) -> str:
    """A tensor of 64 dimensions."""
    return (await ctx.exchange(ctx.bad_call(shape=[1] * 63 + [64]))).seen_frames


@attack("frame_datatype_object", expects="frame 400")
async def datatype_object(ctx: Context) -> str:
    """A datatype that some servers unpickle."""
    return (await ctx.exchange(ctx.bad_call(b"\x80\x04." + bytes(253), datatype="BYTES"))).seen_frames


@attack("frame_tensor_crowd", expects="frame 400 or frame 413")
async def tensor_crowd(ctx: Context) -> str:
    """Two thousand tensors in one call."""
    one = {"datatype": "INT8", "shape": [1], "parameters": {"binary_data_size": 1}}
    inputs = [{"name": str(index), **one} for index in range(2000)]
    header = {"id": "crowd", "model_name": ctx.uids["victim"], "inputs": inputs}
    return (await ctx.exchange(frame(header, bytes(2000)))).seen_frames


@attack("frame_json_deep", expects="frame 400")
async def json_deep(ctx: Context) -> str:
    """Brackets nested 100,000 deep."""
    return (await ctx.exchange(frame(b'{"parameters":' + b"[" * 100_000 + b"]" * 100_000 + b"}"))).seen_frames


@attack("frame_json_garbage", expects="frame 400")
async def json_garbage(ctx: Context) -> str:
    """Headers that are no JSON, no UTF-8, or of wrong types, all in one exchange."""
    headers = (b"{{{", b'{"id":"\xff\xfe"}', b"null", b'{"inputs":{}}', b'{"id":1e999}', b"\0" * 64)
    return (await ctx.exchange(*(frame(header) for header in headers))).seen_frames


@attack("frame_schema_lie", expects="frame 400")
async def schema_lie(ctx: Context) -> str:
    """Another width, another type, other rows in each tensor, wrong names, no tensors."""
    tensors = ctx.tensors(ctx.uids["victim"], "backward", 2)
    tensors[-1] = ctx.tensors(ctx.uids["victim"], "backward", 3)[-1]
    uneven = {"model_name": ctx.uids["victim"], "parameters": {"pass": "backward"}, "inputs": tensors}
    return (
        await ctx.exchange(
            ctx.bad_call(bytes(512), shape=[1, 128], parameters={"binary_data_size": 512}),
            ctx.bad_call(datatype="INT32"),
            ctx.bad_call(name="1"),
            frame(uneven, ctx.body(tensors)),
            frame({"model_name": ctx.uids["victim"]}),
        )
    ).seen_frames


@attack("frame_good_beside_bad", expects="frame 200+400")
async def good_beside_bad(ctx: Context) -> str:
    """A right call between two bad ones is answered."""
    return (await ctx.exchange(ctx.bad_call(shape=[-1]), ctx.call(), frame(b"{{{", bytes(9)))).seen_frames


@attack("frame_call_crowd", expects="frame 404+413", per_s=4)
async def call_crowd(ctx: Context) -> str:
    """Five thousand calls in one exchange, each of two bytes of JSON."""
    return (await ctx.exchange(frame(b"{}") * 5000)).seen_frames


@attack("frame_noise", expects="frame 400 or frame 413")
async def noise(ctx: Context) -> str:
    """Random bytes where frames should be."""
    return (await ctx.exchange(ctx.dice.randbytes(ctx.dice.randrange(9, 4096)))).seen_frames


@attack("frame_unknown_pass", expects="frame 400")
async def unknown_pass(ctx: Context) -> str:
    """A pass that is neither forward nor backward, and a step nobody offers."""
    calls = (ctx.call(parameters={"pass": name}) for name in ("__init__", "step", "state_dict", "FORWARD"))
    return (await ctx.exchange(*calls)).seen_frames


@attack("frame_timeouts", expects="frame 400+504")
async def timeouts(ctx: Context) -> str:
    """Deadlines that are over at once, negative, or infinite."""
    calls = (ctx.call(parameters={"timeout_ms": value}) for value in (0, -1, float("inf")))
    return (await ctx.exchange(*calls)).seen_frames
