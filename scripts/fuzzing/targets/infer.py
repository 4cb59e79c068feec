"""Bodies of Open Inference Protocol requests: JSON alone, or JSON and binary tensors.

An input is `u16 chunking | Inference-Header-Content-Length as text | newline | body`; no text, no such header.
"""

from __future__ import annotations

from typing import Final

import msgspec

from fuzzing.mutate import MUTATORS, mutate_bytes, mutate_json
from fuzzing.target import KIB, MIB, Target
from fuzzing.targets.kit import EchoService, chunks
from fuzzing.targets.kit_loop import StepLoop
from p2pmoe.config import LimitsConfig
from p2pmoe.errors import CallError, DecodeError
from p2pmoe.rpc.exchange import ByteBudget
from p2pmoe.rpc.http.infer import JSON_LENGTH_HEADER, infer
from p2pmoe.rpc.http.server import frame_limits
from p2pmoe.types import LOCAL_CALLER

LIMITS: Final = LimitsConfig(
    max_header_bytes=64 * KIB, max_body_bytes=MIB, max_json_bytes=256 * KIB, max_tensors=64, max_rank=8,
    max_inflight_bytes=4 * MIB,
)  # fmt: skip

_loop = StepLoop()
_service = EchoService(_loop.loop)


class _Content:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces[::-1]

    def is_eof(self) -> bool:
        return True  # all has arrived: no timers

    async def readany(self) -> bytes:
        return self._pieces.pop() if self._pieces else b""


class _Request:
    """As much of an HTTP request as a body needs."""

    def __init__(self, data: bytes, json_length: str, seed: int) -> None:
        self.content = _Content(list(chunks(data, seed)))
        self.content_length = len(data) if seed % 2 else None
        self.match_info = {"uid": "any" if seed % 4 < 2 else "ffn.0"}
        self.headers = {JSON_LENGTH_HEADER: json_length} if json_length else {}


def ask(data: bytes) -> str:
    """One request: answered, or refused with a status."""
    text, _, body = data[2:].partition(b"\n")
    budget = ByteBudget(LIMITS.max_inflight_bytes)
    request = _Request(body, text.decode("latin-1"), int.from_bytes(data[:2], "little"))
    try:
        response = _loop.run(infer(request, LOCAL_CALLER, _service, LIMITS, frame_limits(LIMITS), budget))
    finally:
        if budget.held:
            raise AssertionError(f"{budget.held} bytes of the budget are never given back")
    return f"{response.status} {response.content_type}"


def mutate_infer(data: bytes, dice) -> bytes:
    """Other JSON with a length that fits, or blind changes."""
    text, _, body = data[2:].partition(b"\n")
    if dice.randrange(4) == 0:
        return mutate_bytes(data, dice)
    length = int(text) if text.isdigit() else len(body)
    changed = mutate_json(body[:length], dice)
    if text.isdigit() and dice.randrange(8):
        text = b"%d" % len(changed)
    return dice.randbytes(2) + text + b"\n" + changed + body[length:]


MUTATORS["infer"] = mutate_infer


def seeds() -> dict[str, bytes]:
    def tensor(data: object, shape: list[int], datatype: str = "FP32") -> dict[str, object]:
        return {"name": "0", "datatype": datatype, "shape": shape, "data": data}

    def body(*inputs: object, **more: object) -> bytes:
        return b"\0\0\n" + msgspec.json.encode({"id": "x", "inputs": inputs, **more})

    binary = {"name": "0", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
    head = msgspec.json.encode({"inputs": [binary], "parameters": {"binary_data_output": True}})
    return {
        "flat": body(tensor([1, 2.5, -3e3, 4], [2, 2])),
        "nested": body(tensor([[1, 2], [3, 4]], [2, 2], "INT64")),
        "bool": body(tensor([True, False], [2], "BOOL")),
        "two-inputs": body({**tensor([1], [1]), "name": "1"}, tensor([2], [1])),
        "outputs": body(tensor([1, 2], [1, 2]), outputs=[{"name": "0", "parameters": {"binary_data": True}}]),
        "binary": b"\1\0" + b"%d\n" % len(head) + head + bytes(8),
    }


TARGETS: Final = (
    Target(
        "infer_bodies", ask, (CallError, DecodeError), LIMITS.max_json_bytes + LIMITS.max_body_bytes, seeds,
        mutate="infer", max_input_bytes=256 * KIB,
    ),
)  # fmt: skip
