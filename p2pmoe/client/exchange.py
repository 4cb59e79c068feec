"""Sends calls from any thread in as few HTTP exchanges as possible and collects their results.

Groups submitted while the loop was busy share an exchange when they are small and go to the same node. Knows frames
and endpoints; nothing of experts' names, gradients or the DHT.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from p2pmoe.client.ages import Ages
from p2pmoe.client.answers import Answers
from p2pmoe.client.calls import Call, CallGroup
from p2pmoe.client.lone_calls import LoneCalls
from p2pmoe.errors import ClosedError, DecodeError, P2PMoEError, PeerUnreachableError
from p2pmoe.faults import attempt, unexpected
from p2pmoe.protocol.finite import all_surely_finite
from p2pmoe.rpc.base import BlockingTransport, Flat, Transport, proving
from p2pmoe.rpc.doorbell import RELAY_PATIENCE_S, Doorbell, Relay
from p2pmoe.rpc.home_core import HomeCore
from p2pmoe.types import Endpoint, PeerId

_MERGE_BYTES = 1024 * 1024  # groups are merged into one exchange up to this size
_MERGE_CALLS = 256
_CROWD = 8  # calls under way from which on new ones are gathered, and threads from which on they share a core
_HOLD_S = 0.001
_LINGER_S = 2.0


class Dispatcher:
    """Puts groups on the wire. `call`, `submit` and `abandon` may be called from any thread.

    `on_lie` is told, once for each exchange and in the thread that reads it, of a peer whose replies break the wire
    format or the schema, or answer what nobody asked; `ages` of what replies say of the age of experts.
    """

    def __init__(
        self,
        transport: Transport,
        loop: asyncio.AbstractEventLoop,
        on_lie: Callable[[PeerId, DecodeError], None] = lambda *_: None,
        ages: Ages | None = None,
    ) -> None:
        self._ages = ages
        self._transport = transport
        self._loop = loop
        self._on_lie = on_lie
        self._queue: deque[CallGroup] = deque()
        self._scheduled = False
        self._proves = proving(transport)
        self._lone = LoneCalls(transport, on_lie, ages) if isinstance(transport, BlockingTransport) else None
        self._exchanges: dict[asyncio.Task[None], Answers] = {}
        self._closed = False
        self._started = 0
        self._sent = 0
        self._arrived: list[Call] = []
        self._running = 0  # calls of the loop's exchanges; changed on the loop alone
        self._held: asyncio.TimerHandle | None = None
        self._relay = Relay()
        self._home = HomeCore()
        self._lock = threading.Lock()
        self._waiting = 0  # threads in `call`
        self._nudge: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Dispatcher: {self.exchanges} exchanges, {self.calls} calls, {len(self._exchanges)} running>"

    @property
    def exchanges(self) -> int:
        """HTTP exchanges begun."""
        return self._started + (self._lone.exchanges if self._lone else 0)

    @property
    def calls(self) -> int:
        """Calls sent."""
        return self._sent + (self._lone.calls if self._lone else 0)

    @property
    def unanswered(self) -> int:
        """Calls and calling threads under way."""
        return self._running + (self._lone.running if self._lone else 0)

    def call(self, group: CallGroup, timeout_s: float) -> None:
        """Send the group's calls and block until it opens or `timeout_s` has passed. Raises ClosedError after close."""
        begun = time.monotonic()
        if self._lone and not self._closed and self._lone.try_call(group, timeout_s, self._running):
            return
        with self._lock:
            self._waiting += 1
        try:
            self.submit(group)
            group.wait(timeout_s - (time.monotonic() - begun))
        finally:
            self._go_on()
            self.abandon(group)

    def submit(self, group: CallGroup) -> None:
        """Send the group's calls: one exchange for each node. Raises ClosedError after close."""
        if self._closed:
            raise ClosedError("the swarm is closed; make a new Swarm")
        group.wake_through(self._wake, self._relay.woke, self._home)
        self._queue.append(group)
        if not self._scheduled:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._flush)
            except RuntimeError as error:  # the loop was closed since we looked
                raise ClosedError("the swarm is closed; make a new Swarm") from error

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

    def _go_on(self) -> None:
        """The calling thread waits no longer; the last ones of a crowd have the loop leave its core."""
        with self._lock:
            self._waiting -= 1
            thinned = self._waiting == _CROWD // 2
        if thinned and self._home.core is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._home.leave)

    # -- on the loop

    def _flush(self) -> None:
        """Send what is queued; while many calls are under way, let it grow for a moment into one larger exchange."""
        if self._running >= _CROWD and not self._closed:
            self._held = self._loop.call_later(_HOLD_S, self._send_queue)
        else:
            self._send_queue()

    def _send_queue(self) -> None:
        if self._held is not None:
            self._held.cancel()
            self._held = None
        self._scheduled = False
        groups: list[CallGroup] = []
        while self._queue:  # other threads add to it
            groups.append(self._queue.popleft())
        try:
            if self._waiting >= _CROWD:
                self._home.settle()
                if self._waiting <= _CROWD // 2:  # they went on meanwhile, and saw no home to leave
                    self._home.leave()
            self._send(groups)
        except Exception as error:  # noqa: BLE001 - they are in no queue any more: nobody else would tell them
            fault = unexpected("sending calls", error)
            for group in groups:
                group.fail(fault)

    def _send(self, groups: Sequence[CallGroup]) -> None:
        """Small groups that go to the same node share an exchange."""
        open_batches: dict[Endpoint, list[Call]] = {}
        sizes: dict[Endpoint, int] = {}
        for group in groups:
            for endpoint, calls in _by_endpoint(group.calls).items():
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
        answers = Answers(
            endpoint, calls, self._finish, self._on_lie, is_proven=self._proves(endpoint), ages=self._ages
        )
        if len(answers.missing) < len(calls):  # a call that is repeated beside itself: answers go by its id
            first = {call.id: call for call in reversed(calls)}
            self._start(endpoint, list(first.values()))
            self._start(endpoint, [call for call in calls if first[call.id] is not call])
            return
        self._started += 1
        self._sent += len(calls)
        self._running += len(calls)
        task = self._loop.create_task(self._run(endpoint, calls, answers))
        self._exchanges[task] = answers
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._exchanges[task]

    async def _run(self, endpoint: Endpoint, calls: list[Call], answers: Answers) -> None:
        try:
            replies = self._transport.exchange(endpoint, [call.frame for call in calls], answers)
            async with contextlib.aclosing(replies):
                while answers.missing and (frame := await anext(replies, None)) is not None:
                    answers.receive(frame)
                if not answers.missing:
                    if self._held is not None:
                        self._send_queue()
                    # Read the end of the body, so that the connection can serve the next exchange.
                    linger = self._loop.call_later(_LINGER_S, _current_task().cancel)
                    await anext(replies, None)
                    linger.cancel()
        except P2PMoEError as error:
            answers.fail(error)
        except asyncio.CancelledError:
            answers.fail(PeerUnreachableError(f"the exchange with {endpoint} was cancelled"))
        except BaseException as error:  # noqa: BLE001 - nobody awaits this task: its calls are told
            answers.fail(unexpected(f"the exchange with {endpoint}", error))
        finally:
            answers.close()

    def _finish(self, call: Call, result: Flat | P2PMoEError) -> None:
        self._running -= 1
        if not isinstance(result, P2PMoEError) and self._running >= _CROWD:
            call.result = result
            self._arrived.append(call)
            if len(self._arrived) == 1:
                self._loop.call_soon(self._complete_arrived)
        else:
            self._complete(call, result)

    def _complete_arrived(self) -> None:
        """Results that came together are looked at together, which is cheaper than in each caller's thread."""
        arrived, self._arrived = self._arrived, []
        finite = False  # then each caller looks for itself
        try:
            finite = all_surely_finite([tensor for call in arrived for tensor in call.result])  # type: ignore[union-attr]
        except Exception as error:  # noqa: BLE001 - the answers of all of them hang on it
            unexpected("looking at answers that came together", error)
        for call in arrived:
            call.is_finite = finite
            if call.result is not None:
                attempt("handing over an answer", self._complete, call, call.result)

    def _complete(self, call: Call, result: Flat | P2PMoEError) -> None:
        group = call.group
        if group is not None and (grace_s := group.complete(call, result)) is not None:
            group.open_later(self._loop.call_later(grace_s, group.open))

    def _wake(self, bell: Doorbell) -> None:
        if self._relay.wake(bell) and self._nudge is None:
            self._nudge = self._loop.call_later(RELAY_PATIENCE_S, self._nudge_relay)

    def _nudge_relay(self) -> None:
        waits = self._relay.nudge()
        self._nudge = self._loop.call_later(RELAY_PATIENCE_S, self._nudge_relay) if waits else None

    def _abandon(self, group: CallGroup) -> None:
        for call in group.calls:
            call.group = None
        for task, answers in list(self._exchanges.items()):
            if answers.missing and all(call.group is None for call in answers.missing.values()):
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
