"""What targets of calls need: a service that answers at once, and chunks as sockets give them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from p2pmoe.metrics import NodeMetrics
from p2pmoe.protocol.frames import Frame
from p2pmoe.protocol.messages import RequestHeader, TensorHeader
from p2pmoe.protocol.schema import BatchTensorProto
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.handlers import ExpertHandlers
from p2pmoe.types import LOCAL_CALLER, Caller


class EchoService:
    """A node's real checks of a call, in front of an expert that gives its inputs back at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        module = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        backend = ExpertBackend("ffn.0", module, optimizer, args_schema=(BatchTensorProto(2),))
        self._handlers = ExpertHandlers([backend], [], metrics=NodeMetrics(), peer_id="a" * 32)
        self._loop = loop
        self.draining = False

    def admit(self, header: RequestHeader, caller: Caller = LOCAL_CALLER) -> None:
        if header.model_name != "any":  # a name that stands for an expert of every schema
            self._handlers.admit(header, caller)

    def submit(
        self, frame: Frame[RequestHeader], caller: Caller = LOCAL_CALLER
    ) -> asyncio.Future[tuple[torch.Tensor, ...]]:
        future = self._loop.create_future()
        future.set_result(frame.tensors)
        return future

    def result_codecs(self, header: RequestHeader) -> tuple[str, ...]:
        return ("raw",) * len(header.inputs)

    def count_wire(self, direction: str, tensors: Sequence[TensorHeader]) -> None:
        self._handlers.count_wire(direction, tensors)

    def flush(self) -> None:
        """Nothing waits."""

    def experts(self, after: str, limit: int) -> dict[str, Any]:
        return self._handlers.experts(after, limit)

    def expert(self, uid: str) -> dict[str, Any]:
        return self._handlers.expert(uid)

    async def ready(self) -> bool:
        return True


def chunks(data: bytes, seed: int) -> Iterator[bytes]:
    """The data in pieces of random sizes: as sockets give it, whole when the seed is 0."""
    dice = random.Random(seed)
    start = 0
    while start < len(data):
        size = len(data) if seed == 0 else dice.choice((1, 2, 7, 8, 9, 64, 1024))
        yield data[start : start + size]
        start += size
