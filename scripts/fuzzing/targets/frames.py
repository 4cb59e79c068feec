"""Sequences of frames in random chunkings: calls as a node receives them, results as a trainer does.

An input is `u16 chunking | frames`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from fuzzing.target import KIB, MIB, Target
from fuzzing.targets.kit import EchoService, chunks
from fuzzing.targets.kit_loop import StepLoop
from p2pmoe.client.calls import make_call
from p2pmoe.errors import CallError, DecodeError
from p2pmoe.protocol.frames import Frame, FrameLimits, FrameReader, describe_tensors, encode_frame
from p2pmoe.protocol.messages import (
    RequestHeader,
    RequestParameters,
    ResponseHeader,
    TensorHeader,
    TensorParameters,
    response_decoder,
)
from p2pmoe.protocol.schema import BatchTensorProto
from p2pmoe.rpc.exchange import ByteBudget, ServerExchange
from p2pmoe.types import Endpoint

LIMITS: Final = FrameLimits(header_bytes=64 * KIB, body_bytes=MIB, tensors=64, rank=8)
MAX_CALLS: Final = 64
BUDGET_BYTES: Final = MIB
MAX_INPUT_BYTES: Final = 256 * KIB

_loop = StepLoop()
_service = EchoService(_loop.loop)


def serve(data: bytes) -> str:
    """An exchange: every call is answered or refused by itself, and no byte of the budget stays taken."""
    budget = ByteBudget(BUDGET_BYTES)
    exchange = ServerExchange(_service, LIMITS, budget, max_calls=MAX_CALLS, wake=lambda: None)
    answers = 0
    for chunk in chunks(data[2:], int.from_bytes(data[:2], "little")):
        exchange.feed(chunk)
        answers += len(exchange.take_results())
        if exchange.broken:
            break
    exchange.feed_eof()
    _loop.settle()
    results = exchange.take_results()
    exchange.close()
    _loop.settle()
    if budget.held:
        raise AssertionError(f"{budget.held} bytes of the budget are never given back")
    if exchange.outstanding:
        raise AssertionError(f"{exchange.outstanding} calls are never answered")
    return f"broken {exchange.broken} answers {min(answers + len(results), 8)} {_codes(results)}"


def _codes(results: list) -> str:
    if not results:
        return ""
    raw = bytes(results[-1].buffers[0])
    return raw[8 + raw.find(b'"code"') :][:24].decode(errors="replace") if b'"code"' in raw else "ok"


def receive(data: bytes) -> str:
    """An answer: each frame fits the call it names, or is refused."""
    reader: FrameReader[ResponseHeader] = FrameReader(response_decoder, LIMITS)
    waiting = {
        call.id: call
        for call in (
            make_call(
                Endpoint("127.0.0.1", 1), "ffn.0", "forward", (torch.zeros(1, 2),), (BatchTensorProto(2),),
                (BatchTensorProto(2),), timeout_s=1.0, call_id=call_id,
            )
            for call_id in ("a", "b")
        )
    }  # fmt: skip

    def inspect(header: ResponseHeader) -> bool:
        call = waiting.get(header.id)
        if call is None:
            return len(header.outputs) < 4
        call.check(header)
        return True

    def frames() -> Iterator[Frame[ResponseHeader]]:
        chunking = int.from_bytes(data[:2], "little")
        for chunk in chunks(data[2:], chunking):
            rest = chunk
            while chunking % 2 and rest and (room := reader.room()):  # as a socket does that receives into tensors
                count = min(len(room), len(rest))
                room[:count] = rest[:count]
                reader.filled(count)
                rest = rest[count:]
                yield from reader.accepted_frames(inspect)
            reader.feed(rest)
            yield from reader.accepted_frames(inspect)

    seen = []
    for frame in frames():
        try:
            frame.header.raise_for_error()
        except CallError as error:
            if not str(error).isprintable() or len(str(error)) > 1000:
                raise AssertionError("a stranger's words reach a terminal as they are") from error
            seen.append(type(error).__name__)
        else:
            seen.append(f"{len(frame.tensors)}")
    reader.feed_eof()
    return " ".join(seen[:6])


def _request(*tensors: torch.Tensor, codecs: list[str] | None = None, **header: object) -> bytes:
    headers, memories = describe_tensors(tensors, codecs)
    return b"".join(encode_frame(RequestHeader(inputs=headers, **header), memories).buffers)


def _response(*tensors: torch.Tensor, **header: object) -> bytes:
    headers, memories = describe_tensors(tensors)
    return b"".join(encode_frame(ResponseHeader(outputs=headers, **header), memories).buffers)


def request_seeds() -> dict[str, bytes]:
    x = torch.arange(6.0).reshape(3, 2)
    backward = RequestParameters(direction="backward", timeout_ms=1e3, wire_version=1)
    every = [torch.zeros(2, 3, dtype=dtype) for dtype in (torch.bool, torch.uint8, torch.int64, torch.bfloat16)]
    empty = TensorHeader("0", "FP32", (0, 2), TensorParameters(binary_data_size=0))
    return {
        "forward": b"\0\0" + _request(x, id="a" * 32, model_name="ffn.0"),
        "backward": b"\1\0" + _request(x, x, id="b" * 32, model_name="ffn.0", parameters=backward),
        "any-datatypes": b"\2\0" + _request(*every, id="c", model_name="any"),
        "codecs": b"\0\0" + _request(x, x, id="d", model_name="any", codecs=["fp16", "bf16"]),
        "three-calls": b"\3\0" + 3 * _request(x, id="e", model_name="ffn.0"),
        "no-tensors": b"\0\0" + _request(id="f", model_name="any"),
        "empty-tensor": b"\0\0" + b"".join(encode_frame(RequestHeader("g", "any", (empty,))).buffers),
    }


def response_seeds() -> dict[str, bytes]:
    x = torch.ones(1, 2)
    failed = _response(id="b", code=429, message="the queue is full", retry_after_s=1.0)
    return {
        "result": b"\0\0" + _response(x, id="a", model_name="ffn.0"),
        "two-results": b"\1\0" + _response(x, id="b") + _response(x, id="a"),
        "error": b"\0\0" + failed,
        "result-and-error": b"\2\0" + _response(x, id="a") + failed,
        "nobodys": b"\0\0" + _response(x, id="z", parameters={"took_ms": 3}),
    }


_MEMORY: Final = LIMITS.header_bytes + LIMITS.body_bytes

TARGETS: Final = (
    Target(
        "request_frames", serve, (), _MEMORY + BUDGET_BYTES, request_seeds,
        mutate="frames", max_input_bytes=MAX_INPUT_BYTES,
    ),
    Target(
        "response_frames", receive, (DecodeError,), _MEMORY, response_seeds,
        mutate="frames", max_input_bytes=MAX_INPUT_BYTES,
    ),
)  # fmt: skip
