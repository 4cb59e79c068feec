"""Frames as bytes for tests: calls, and headers that must be refused."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from p2pmoe.protocol.frames import (
    PREFIX,
    Frame,
    FrameLimits,
    FrameReader,
    FrameReceived,
    describe_tensors,
    encode_frame,
)
from p2pmoe.protocol.messages import RequestHeader, response_decoder


def raw_frame(header: Any, body: bytes = b"", body_bytes: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else msgspec.json.encode(header)
    return PREFIX.pack(len(text), len(body) if body_bytes is None else body_bytes) + text + body


def call_bytes(*tensors: torch.Tensor, codecs: list[str] | None = None, **header: Any) -> bytes:
    headers, memories = describe_tensors(tensors, codecs)
    frame = encode_frame(RequestHeader(inputs=headers, **header), memories)
    joined = b"".join(frame.buffers)
    assert len(joined) == frame.nbytes
    return joined


def parse(reader: FrameReader[Any], data: bytes) -> list[Frame[Any]]:
    """The frames that some more bytes complete."""
    frames = []
    reader.feed(data)
    while (event := reader.next_event()) is not None:
        if isinstance(event, FrameReceived):
            frames.append(event.frame)
    return frames


def result_frames(body: bytes) -> list[Frame[Any]]:
    """The frames of a whole answer."""
    reader: FrameReader[Any] = FrameReader(response_decoder, FrameLimits())
    frames = parse(reader, body)
    reader.feed_eof()
    return frames


def codes(frames: list[Frame[Any]]) -> dict[str, int]:
    """Each result's code, by the id of its call."""
    return {frame.header.id: frame.header.code for frame in frames}


def one_tensor(body: bytes = b"\0" * 8, **changes: Any) -> bytes:
    tensor = {"name": "0", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}} | changes
    return raw_frame({"id": "bad", "model_name": "ffn.0", "inputs": [tensor]}, body)


GOOD = call_bytes(torch.ones(1, 2), id="good")
BAD_HEADERS: dict[str, bytes] = {
    "unknown datatype": one_tensor(datatype="FP8"),
    "unknown codec": one_tensor(parameters={"binary_data_size": 8, "codec": "zip"}),
    "codec of integers": one_tensor(datatype="INT64", parameters={"binary_data_size": 4, "codec": "fp16"}),
    "codec of bool": one_tensor(datatype="BOOL", parameters={"binary_data_size": 4, "codec": "fp16"}),
    "wrong binary_data_size": one_tensor(parameters={"binary_data_size": 12}),
    "no binary_data_size": one_tensor(parameters={}),
    "json data": one_tensor(parameters={}, data=[1, 2]),
    "shape larger than the body": one_tensor(shape=[1, 3]),
    "body larger than the shape": one_tensor(body=b"\0" * 12),
    "huge shape": one_tensor(shape=[2**53, 2**53], parameters={"binary_data_size": 8}),
    "huge empty shape": one_tensor(shape=[0, 2**53], parameters={"binary_data_size": 0}),
    "rank over the limit": one_tensor(shape=[1, 1, 1, 1, 2]),
    "rank over the format's": one_tensor(shape=[1] * 65),
    "negative size": one_tensor(shape=[-1, -2]),
    "fractional size": one_tensor(shape=[1.5, 2]),
    "size is text": one_tensor(shape=["1", 2]),
    "name is no text": one_tensor(name=0),
    "name too long": one_tensor(name="0" * 257),
    "too many tensors": raw_frame(
        {
            "inputs": [
                {"name": str(i), "datatype": "INT8", "shape": [1], "parameters": {"binary_data_size": 1}}
                for i in range(5)
            ]
        },
        b"\0" * 5,
    ),
    "body without tensors": raw_frame({"id": "bad"}, b"\0" * 3),
    "no json": raw_frame(b"{{{"),
    "no utf-8": raw_frame(b'{"id":"\xff\xfe"}'),
    "json, but no object": raw_frame([1, 2]),
    "json null": raw_frame(None),
    "trailing json": raw_frame(b"{}{}"),
    "deep json": raw_frame(b'{"parameters":' + b"[" * 1000 + b"]" * 1000 + b"}"),
    "deep unknown key": raw_frame(b'{"x":' + b"[" * 1000 + b"]" * 1000 + b"}", b"\0"),
    "infinite timeout": raw_frame(b'{"parameters":{"timeout_ms":1e999}}'),
    "negative timeout": raw_frame({"parameters": {"timeout_ms": -1}}),
    "id is a number": raw_frame({"id": 3}),
    "inputs is an object": raw_frame({"inputs": {}}),
    "body over the limit": raw_frame({"id": "bad"}, b"\0" * 4097),
}
