"""Sends calls from any thread in as few HTTP exchanges as possible and collects their results.

A `CallGroup` is what one caller waits for: a call, or all calls of a mixture's pass. Groups submitted while the loop
was busy share an exchange when they are small and go to the same node. Knows frames and endpoints; nothing of
experts' names, gradients or the DHT.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from p2pmoe.errors import ClosedError, DeadlineError, DecodeError, P2PMoEError, PeerUnreachableError
from p2pmoe.protocol.finite import all_surely_finite
from p2pmoe.protocol.frames import EncodedFrame, Frame, describe_tensors, encode_frame
from p2pmoe.protocol.messages import RequestHeader, RequestParameters, ResponseHeader, new_call_id
from p2pmoe.protocol.schema import BatchTensorProto, format_tensor
from p2pmoe.rpc.base import Flat, Transport
from p2pmoe.rpc.doorbell import RELAY_PATIENCE_S, Doorbell, Relay, thread_doorbell
from p2pmoe.types import Endpoint, Pass, PeerId

_MERGE_BYTES = 1024 * 1024  # groups are merged into one exchange up to this size
_MERGE_CALLS = 256
_CROWD = 8  # calls under way from which on new ones are gathered
_HOLD_S = 0.001
_LINGER_S = 2.0
_MAX_STRAYS = 16  # frames of one exchange that answer no call; errors for the exchange as a whole are among them


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
    is_finite: bool = False
    """The result was looked at already, and holds neither NaN nor infinity."""

    def check(self, header: ResponseHeader) -> None:
        """That a reply has the tensors that were asked for, before memory is allocated. Raises DecodeError."""
        received = tuple((tensor.datatype, tensor.shape) for tensor in header.outputs)
        expected = tuple((proto.datatype, (self.rows, *proto.shape)) for proto in self.expected)
        if header.code == 200 and received != expected:
            shown = ", ".join(format_tensor(shape, datatype[:16]) for datatype, shape in received[:16])
            wanted = ", ".join(format_tensor(shape, datatype) for datatype, shape in expected)
            raise DecodeError(f"{self.uid} at {self.endpoint} answered ({shown}) instead of ({wanted})")
        if header.model_name not in ("", self.uid):
            raise DecodeError(f"{self.uid} at {self.endpoint} answered as {header.model_name[:64]!r}")
        if header.code != 200 and received:
            raise DecodeError(f"{self.uid} at {self.endpoint} answered an error with tensors")


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
) -> Call:
    """Encode one call; `tensors` in wire order with the schemas `protos`, `expected` those of the result.

    `peer_id` is whom to blame for what the endpoint answers.
    """
    headers, memories = describe_tensors(tensors, [proto.codec for proto in protos])
    call_id = call_id or new_call_id()
    header = RequestHeader(
        id=call_id,
        model_name=uid,
        inputs=headers,
        parameters=RequestParameters(direction=direction, timeout_ms=timeout_s * 1e3),
    )
    return Call(call_id, endpoint, uid, encode_frame(header, memories), expected, len(tensors[0]), peer_id)


class CallGroup:
    """Calls that one caller waits for together.

    Args:
        calls: what to send.
        enough: told the position of every call that succeeded; True once the rest need not be waited for longer
            than `grace_s`. None waits for all.
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
        self._opened = False
        self._notify: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<CallGroup: {self._missing} of {len(self.calls)} calls unanswered>"

    def wake_through(self, ring: Callable[[Doorbell], object], leave: Callable[[Doorbell], object]) -> None:
        """How the waiting thread is woken, and whom it tells when it goes on."""
        self._ring, self._leave = ring, leave

    # -- on the loop

    def complete(self, call: Call, result: Flat | P2PMoEError, loop: asyncio.AbstractEventLoop) -> None:
        """One call has its result."""
        call.result = result
        self._missing -= 1
        if not self._missing:
            self.open()
        elif self._enough is not None and not isinstance(result, P2PMoEError) and self._enough(call.position):
            self._enough = None
            if self._grace_s is not None:
                self._grace = loop.call_later(self._grace_s, self.open)

    def open(self) -> None:
        """Let the caller go on."""
        if self._opened:
            return
        self._opened = True
        if self._grace is not None:
            self._grace.cancel()
        if self._bell is not None:
            self._ring(self._bell)
        if self._notify is not None:
            self._notify()

    # -- for the caller

    def wait(self, timeout_s: float) -> None:
        """Block until every call is answered, the grace is over, or `timeout_s` has passed."""
        self._bell = bell = thread_doorbell()
        deadline = time.monotonic() + timeout_s
        while not self._opened and (left_s := deadline - time.monotonic()) > 0:
            bell.wait(left_s)  # may be a late ring of an earlier group: look again
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
        """What is there now; a DeadlineError stands for each missing answer."""
        return [
            DeadlineError(f"{call.uid} at {call.endpoint} did not answer within {timeout_s:.3g} s")
            if call.result is None
            else call.result
            for call in self.calls
        ]


class _Waiting(dict[str, Call]):
    """The calls of one exchange that have no answer yet, and what the node said beside answers."""

    strays = 0
    lied = False
    peer_id: PeerId | None = None


class Dispatcher:
    """Puts groups on the wire. `submit` and `abandon` may be called from any thread.

    `on_lie` is told, on the loop and once for each exchange, of a peer whose replies break the wire format or the
    schema, or answer what nobody asked.
    """

    def __init__(
        self,
        transport: Transport,
        loop: asyncio.AbstractEventLoop,
        on_lie: Callable[[PeerId, DecodeError], None] = lambda *_: None,
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._on_lie = on_lie
        self._queue: deque[CallGroup] = deque()
        self._scheduled = False
        self._exchanges: dict[asyncio.Task[None], _Waiting] = {}
        self._closed = False
        self.exchanges = 0
        """HTTP exchanges begun."""
        self.calls = 0
        self._arrived: list[Call] = []
        self.unanswered = 0
        """Calls under way; changed on the loop alone."""
        self._held: asyncio.TimerHandle | None = None
        self._relay = Relay()
        self._nudge: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Dispatcher: {self.exchanges} exchanges, {self.calls} calls, {len(self._exchanges)} running>"

    def submit(self, group: CallGroup) -> None:
        """Send the group's calls: one exchange for each node. Raises ClosedError after close."""
        if self._closed:
            raise ClosedError("the swarm is closed; make a new Swarm")
        group.wake_through(self._wake, self._relay.woke)
        self._queue.append(group)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._flush)

    def abandon(self, group: CallGroup) -> None:
        """Nobody waits for the rest of this group any more."""
        if any(call.result is None for call in group.calls) and not self._closed:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._abandon, group)

    async def close(self) -> None:
        """End every exchange; waiting callers get PeerUnreachableError."""
        self._closed = True
        self._send_queue()
        for task in list(self._exchanges):
            task.cancel()
        if self._exchanges:
            await asyncio.wait(list(self._exchanges), timeout=2.0)

    # -- on the loop

    def _flush(self) -> None:
        """Send what is queued; while many calls are under way, let it grow for a moment into one larger exchange."""
        if self.unanswered >= _CROWD and not self._closed:
            self._held = self._loop.call_later(_HOLD_S, self._send_queue)
        else:
            self._send_queue()

    def _send_queue(self) -> None:
        if self._held is not None:
            self._held.cancel()
            self._held = None
        self._scheduled = False
        open_batches: dict[Endpoint, list[Call]] = {}
        sizes: dict[Endpoint, int] = {}
        while self._queue:
            for endpoint, calls in _by_endpoint(self._queue.popleft().calls).items():
                size = sum(call.frame.nbytes for call in calls)
                batch = open_batches.get(endpoint)
                merges = batch is not None and sizes[endpoint] + size <= _MERGE_BYTES
                if batch is None or not merges or len(batch) + len(calls) > _MERGE_CALLS:
                    if batch is not None:
                        self._start(endpoint, batch)
                    batch = open_batches[endpoint] = []
                    sizes[endpoint] = 0
                batch.extend(calls)
                sizes[endpoint] += size
        for endpoint, batch in open_batches.items():
            self._start(endpoint, batch)

    def _start(self, endpoint: Endpoint, calls: list[Call]) -> None:
        self.exchanges += 1
        self.calls += len(calls)
        self.unanswered += len(calls)
        waiting = _Waiting((call.id, call) for call in calls)
        waiting.peer_id = calls[0].peer_id
        task = self._loop.create_task(self._run(endpoint, calls, waiting))
        self._exchanges[task] = waiting
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._exchanges[task]

    async def _run(self, endpoint: Endpoint, calls: list[Call], waiting: _Waiting) -> None:
        reason: P2PMoEError = PeerUnreachableError(f"{endpoint} ended the exchange without answering every call")
        try:
            frames = [call.frame for call in calls]
            replies = self._transport.exchange(endpoint, frames, lambda header: self._inspect(waiting, header))
            async with contextlib.aclosing(replies):
                while waiting and (frame := await anext(replies, None)) is not None:
                    reason = self._receive(waiting, frame) or reason
                if not waiting:
                    # Read the end of the body, so that the connection can serve the next exchange.
                    linger = self._loop.call_later(_LINGER_S, _current_task().cancel)
                    await anext(replies, None)
                    linger.cancel()
        except P2PMoEError as error:
            reason = error
            if isinstance(error, DecodeError):
                self._note_lie(waiting, error)
        except asyncio.CancelledError:
            reason = PeerUnreachableError(f"the exchange with {endpoint} was cancelled")
        finally:
            for call in list(waiting.values()):
                self._finish(waiting, call, reason)

    def _inspect(self, waiting: _Waiting, header: ResponseHeader) -> bool:
        call = waiting.get(header.id)
        if call is None:
            return self._inspect_stray(waiting, header)
        try:
            call.check(header)
        except DecodeError as error:
            self._note_lie(waiting, error)
            self._finish(waiting, call, error)
            return False
        return True

    def _inspect_stray(self, waiting: _Waiting, header: ResponseHeader) -> bool:
        """A frame that answers no call: an error for the exchange as a whole, or nothing that was asked for."""
        stands_for_all = not header.id and header.code != 200 and not header.outputs
        if not stands_for_all:
            self._note_lie(waiting, DecodeError(f"a reply {header.id[:64]!r} that nobody asked for, or a second one"))
        waiting.strays += 1
        if waiting.strays > _MAX_STRAYS:  # else a node could keep this loop busy with empty frames for ever
            raise DecodeError(f"more than {_MAX_STRAYS} frames of an exchange answer no call of it")
        return stands_for_all

    def _note_lie(self, waiting: _Waiting, error: DecodeError) -> None:
        if waiting.peer_id is not None and not waiting.lied:
            waiting.lied = True
            self._on_lie(waiting.peer_id, error)

    def _receive(self, waiting: _Waiting, frame: Frame[ResponseHeader]) -> P2PMoEError | None:
        """Give a call its result. An error without a call's id is returned: it ends the exchange for the rest."""
        call = waiting.get(frame.header.id)
        try:
            frame.header.raise_for_error()
        except P2PMoEError as error:
            if call is None:
                return None if frame.header.id else error
            self._finish(waiting, call, error)
        else:
            if call is not None:
                self._finish(waiting, call, frame.tensors)
        return None

    def _finish(self, waiting: _Waiting, call: Call, result: Flat | P2PMoEError) -> None:
        if waiting.pop(call.id, None) is not None:
            self.unanswered -= 1
        if not isinstance(result, P2PMoEError) and self.unanswered >= _CROWD:
            call.result = result
            self._arrived.append(call)
            if len(self._arrived) == 1:
                self._loop.call_soon(self._complete_arrived)
        elif call.group is not None:
            call.group.complete(call, result, self._loop)
        if not waiting and self._held is not None:
            self._send_queue()

    def _complete_arrived(self) -> None:
        """Results that came together are looked at together, which is cheaper than in each caller's thread."""
        arrived, self._arrived = self._arrived, []
        finite = all_surely_finite([tensor for call in arrived for tensor in call.result])  # type: ignore[union-attr]
        for call in arrived:
            call.is_finite = finite
            if call.group is not None and call.result is not None:
                call.group.complete(call, call.result, self._loop)

    def _wake(self, bell: Doorbell) -> None:
        if self._relay.wake(bell) and self._nudge is None:
            self._nudge = self._loop.call_later(RELAY_PATIENCE_S, self._nudge_relay)

    def _nudge_relay(self) -> None:
        waits = self._relay.nudge()
        self._nudge = self._loop.call_later(RELAY_PATIENCE_S, self._nudge_relay) if waits else None

    def _abandon(self, group: CallGroup) -> None:
        for call in group.calls:
            call.group = None
        for task, waiting in list(self._exchanges.items()):
            if waiting and all(call.group is None for call in waiting.values()):
                task.cancel()


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _by_endpoint(calls: Sequence[Call]) -> dict[Endpoint, list[Call]]:
    grouped: dict[Endpoint, list[Call]] = {}
    for call in calls:
        grouped.setdefault(call.endpoint, []).append(call)
    return grouped
