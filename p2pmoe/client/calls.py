"""Calls: what is asked of one expert at one node, and the group of them that one caller waits for.

Knows frames and endpoints; nothing of how calls travel, of experts' names, gradients or the DHT.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import eq

import torch

from p2pmoe.errors import DeadlineError, DecodeError, P2PMoEError, UnexpectedError
from p2pmoe.faults import unexpected
from p2pmoe.protocol.frames import EncodedFrame, describe_tensors, encode_frame
from p2pmoe.protocol.messages import (
    RequestHeader,
    RequestParameters,
    ResponseHeader,
    TensorHeader,
    new_call_id,
)
from p2pmoe.protocol.schema import FREE_GROWTH, BatchTensorProto, format_tensor, largest_free
from p2pmoe.rpc.base import Flat
from p2pmoe.rpc.doorbell import Doorbell, thread_doorbell
from p2pmoe.rpc.home_core import HomeCore
from p2pmoe.types import Endpoint, Manner, Pass, PeerId


@dataclass(slots=True, eq=False)
class Call:
    """One call to one expert at one node, encoded."""

    id: str
    endpoint: Endpoint
    uid: str
    frame: EncodedFrame
    expected: tuple[BatchTensorProto, ...]
    rows: int
    peer_id: PeerId | None = None
    result: Flat | P2PMoEError | None = None
    group: CallGroup | None = None
    position: int = 0
    exact: tuple[tuple[int, ...], ...] | None = None
    """Shapes of the result where they are known though the schema leaves some free."""
    most: int = 0
    """Of a free dimension elsewhere."""
    is_finite: bool = False
    """The result was looked at already, and holds neither NaN nor infinity."""

    def check(self, header: ResponseHeader) -> None:
        """That a reply has the tensors that were asked for, before memory is allocated. Raises DecodeError."""
        if header.model_name not in ("", self.uid):
            raise DecodeError(f"{self.uid} at {self.endpoint} answered as {header.model_name[:64]!r}", is_proof=True)
        if header.code == 200 and not self._fits(header.outputs):
            shown = ", ".join(format_tensor(each.shape, each.datatype[:16]) for each in header.outputs[:16])
            wanted = ", ".join(format_tensor((self.rows, *proto.shape), proto.datatype) for proto in self.expected)
            raise DecodeError(f"{self.uid} at {self.endpoint} answered ({shown}) instead of ({wanted})")
        if header.code != 200 and header.outputs:
            raise DecodeError(f"{self.uid} at {self.endpoint} answered an error with tensors", is_proof=True)

    def _fits(self, outputs: tuple[TensorHeader, ...]) -> bool:
        if len(outputs) != len(self.expected):
            return False
        for tensor, proto in zip(outputs, self.expected, strict=True):  # `all` of a generator takes twice as long
            if tensor.datatype != proto.datatype or (
                tensor.shape != (self.rows, *proto.shape) and not self._fits_freely(tensor.shape, proto)
            ):
                return False
        return self.exact is None or all(map(eq, (each.shape for each in outputs), self.exact))

    def _fits_freely(self, shape: tuple[int, ...], proto: BatchTensorProto) -> bool:
        """Whether a shape has the schema's sizes and, where these are free, some that memory may be allocated for."""
        return proto.is_free and shape[:1] == (self.rows,) and proto.takes(shape[1:], 0, self.most)


def make_call(
    endpoint: Endpoint,
    uid: str,
    direction: Pass,
    tensors: Sequence[torch.Tensor],
    protos: Sequence[BatchTensorProto],
    expected: tuple[BatchTensorProto, ...],
    *,
    timeout_s: float,
    call_id: str | None = None,
    peer_id: PeerId | None = None,
    manner: Manner | None = None,
) -> Call:
    """Encode one call; `tensors` in wire order with the schemas `protos`, `expected` those of the result.

    `peer_id` is whom to blame for what the endpoint answers. Without a `manner` the call is computed in eval mode.
    """
    headers, memories = describe_tensors(tensors, [proto.codec for proto in protos])
    exact, most = None, 0
    if any(proto.is_free for proto in expected):
        most = FREE_GROWTH * largest_free(protos, [tensor.shape for tensor in tensors])
        if direction == "backward":  # gradients are of the arguments, which come first
            exact = tuple(tuple(tensor.shape) for tensor in tensors[: len(expected)])
    call_id = call_id or new_call_id()
    header = RequestHeader(
        id=call_id,
        model_name=uid,
        inputs=headers,
        parameters=RequestParameters(
            direction=direction, timeout_ms=timeout_s * 1e3, mode=manner and manner.mode, seed=manner and manner.seed
        ),
    )
    frame, rows = encode_frame(header, memories), len(tensors[0])
    return Call(call_id, endpoint, uid, frame, expected, rows, peer_id, exact=exact, most=most)


def empty_results(
    direction: Pass,
    tensors: Sequence[torch.Tensor],
    protos: Sequence[BatchTensorProto],
    expected: tuple[BatchTensorProto, ...],
) -> Flat:
    """What a call of no rows gives, which is never sent."""
    if direction == "backward":
        return tuple(
            torch.zeros(tensor.shape, dtype=proto.dtype, device="cpu")
            for tensor, proto in zip(tensors, expected, strict=False)
        )
    free = largest_free(protos, [tensor.shape for tensor in tensors])
    return tuple(proto.make_zeros(0, "cpu", free=free) for proto in expected)


class CallGroup:
    """Calls that one caller waits for together.

    Args:
        calls: what to send.
        enough: told the position of every call that succeeded; True once the rest need not be waited for longer
            than `grace_s`. None waits for all. What it raises fails the group.
    """

    def __init__(
        self, calls: Sequence[Call], *, enough: Callable[[int], bool] | None = None, grace_s: float | None = None
    ) -> None:
        self.calls = list(calls)
        for position, call in enumerate(self.calls):
            call.group, call.position = self, position
        self._enough = enough
        self._grace_s = grace_s
        self._missing = len(self.calls)
        self._grace: asyncio.TimerHandle | None = None
        self._bell: Doorbell | None = None
        self._ring: Callable[[Doorbell], object] = Doorbell.ring
        self._leave: Callable[[Doorbell], object] | None = None
        self._home: HomeCore | None = None
        self._opened = False
        self._notify: Callable[[], None] | None = None
        self._fault: UnexpectedError | None = None

    def __repr__(self) -> str:
        return f"<CallGroup: {self._missing} of {len(self.calls)} calls unanswered>"

    def wake_through(
        self, ring: Callable[[Doorbell], object], leave: Callable[[Doorbell], object], home: HomeCore | None = None
    ) -> None:
        """How the waiting thread is woken, whom it tells when it goes on, and where it is woken."""
        self._ring, self._leave, self._home = ring, leave, home

    # -- for those who read the answers

    def complete(self, call: Call, result: Flat | P2PMoEError) -> float | None:
        """One call has its result. Gives the seconds after which `open` is due, once the rest may be given up."""
        call.result = result
        call.group = None  # a cycle of references would keep both, and the tensors, until the garbage is collected
        self._missing -= 1
        try:
            if not self._missing:
                self.open()
            elif self._enough is not None and not isinstance(result, P2PMoEError) and self._enough(call.position):
                self._enough = None
                return self._grace_s
        except BaseException as error:
            self.fail(unexpected(f"counting the answers beside {call.uid}", error))
            if not isinstance(error, Exception):  # Ctrl-C, in a caller's own thread
                raise
        return None

    def fail(self, fault: UnexpectedError) -> None:
        """The answers cannot be told: `results` raises this, and the caller goes on."""
        self._fault = self._fault or fault
        self._enough = None
        self.open()

    @property
    def has_failed(self) -> bool:
        """Whether `results` will raise, whatever answers still come."""
        return self._fault is not None

    def open_later(self, timer: asyncio.TimerHandle) -> None:
        """A timer that opens the group; it is not needed once the group is open."""
        self._grace = timer

    def open(self) -> None:
        """Let the caller go on."""
        if self._opened:
            return
        self._opened = True
        if self._grace is not None:
            self._grace.cancel()
        if self._bell is not None:
            try:
                self._ring(self._bell)
            except Exception as error:  # noqa: BLE001 - whoever it is, the caller must be woken
                self._fault = unexpected("waking a caller", error)
                self._bell.ring()
        if self._notify is not None:
            self._notify()

    # -- for the caller

    def wait(self, timeout_s: float) -> None:
        """Block until every call is answered, the grace is over, or `timeout_s` has passed."""
        self._bell = bell = thread_doorbell()
        deadline = time.monotonic() + timeout_s
        bound = self._home.enter() if self._home is not None else None
        try:
            while not self._opened and (left_s := deadline - time.monotonic()) > 0:
                bell.wait(left_s)  # may be a late ring of an earlier group: look again
        finally:
            if bound is not None:
                bound.release()
        if self._leave is not None:
            self._leave(bell)

    async def wait_async(self, timeout_s: float) -> None:
        """The same from a coroutine of any loop."""
        loop = asyncio.get_running_loop()
        opened = loop.create_future()

        def set_opened() -> None:
            if not opened.done():
                opened.set_result(None)

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed
                loop.call_soon_threadsafe(set_opened)

        self._notify = notify
        if not self._opened:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await opened

    def results(self, timeout_s: float) -> list[Flat | P2PMoEError]:
        """What is there now; a DeadlineError stands for each missing answer.

        Raises UnexpectedError when code of this process failed where it reads the answers.
        """
        if self._fault is not None:
            raise self._fault
        return [
            DeadlineError(f"{call.uid} at {call.endpoint} did not answer within {timeout_s:.3g} s")
            if call.result is None
            else call.result
            for call in self.calls
        ]
