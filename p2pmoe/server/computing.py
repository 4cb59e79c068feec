"""Computes batches and answers their calls, whatever happens meanwhile. On a device thread; knows no queues' order.

Every task that was taken in hand is answered: with its results, with its own failure, or, should something raise that
nobody foresaw, with an error by `abandon`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from p2pmoe.errors import (
    BadRequestError,
    CallError,
    ExpertFailedError,
    NonFiniteResultError,
    describe,
    is_out_of_memory,
    message_of,
    out_of_memory,
)
from p2pmoe.faults import unexpected
from p2pmoe.rpc.base import Flat
from p2pmoe.server.devices import Device, Launched, Staged
from p2pmoe.server.fair_queue import DeviceShares
from p2pmoe.server.outbox import Outbox
from p2pmoe.server.recovery import Culprits, Parting
from p2pmoe.server.task_pool import Batch, BatchGate, Task

logger = logging.getLogger(__name__)

BatchObserver = Callable[[Batch, float, bool], None]
QUIET_S = 10.0
"""Failures of one pool are logged once in so many seconds: callers may cause them."""


@dataclass(frozen=True, slots=True)
class Failed:
    """What was raised. Never asked what it is an instance of: that calls a property which a user may have written."""

    error: BaseException


class Computing:
    """What a device thread has in hand.

    Args:
        device: where batches are computed.
        outbox: where results go.
        shares: who pays for the device's time.
        culprits: who is known for failing batches.
        may_wait: whether the results of a batch may be held for a moment, since their callers wait for more.
        on_batch: told of every batch, its seconds and whether it succeeded.
    """

    def __init__(
        self,
        device: Device,
        outbox: Outbox,
        shares: DeviceShares,
        culprits: Culprits,
        *,
        may_wait: Callable[[Batch], bool],
        on_batch: BatchObserver | None,
    ) -> None:
        self._device = device
        self._outbox = outbox
        self._shares = shares
        self._culprits = culprits
        self._may_wait = may_wait
        self._on_batch = on_batch
        self._in_hand: dict[Task, None] = {}
        self._logged: dict[str, float] = {}  # by pool

    def __repr__(self) -> str:
        return f"<Computing: {len(self._in_hand)} calls in hand>"

    @property
    def running(self) -> int:
        """Calls in hand."""
        return len(self._in_hand)

    @property
    def prefetches(self) -> bool:
        """See `Device.prefetches`."""
        return self._device.prefetches

    def in_hand(self) -> list[Task]:
        """What is not answered yet."""
        return list(self._in_hand)

    def hold(self, tasks: Iterable[Task]) -> None:
        """Take tasks in hand."""
        self._in_hand.update(dict.fromkeys(tasks))

    def take(self, batch: Batch) -> bool:
        """Take a batch in hand and screen it; whether something of it is to be computed."""
        self.hold(batch.tasks)
        gate = batch.pool.gate
        if gate is None:
            return True
        try:
            refused = dict(gate.screen(batch.tasks))
            if refused:
                batch.tasks = [task for task in batch.tasks if task not in refused]
                batch.rows -= sum(task.rows for task in refused)
                self._answer(list(refused), list(refused.values()))
        except BaseException as error:  # noqa: BLE001 - the thread must outlive any expert
            self._fail_all(batch, error)
            return False
        return bool(batch.tasks)

    def stage(self, batch: Batch) -> Staged | Failed:
        """Start bringing a batch to the device, or why that failed; then `recover` it when nothing is computed."""
        try:
            return self._device.stage(batch)
        except BaseException as error:  # noqa: BLE001
            return Failed(error)

    def launch(self, staged: Staged) -> Launched | Failed:
        """Compute a batch, or why that failed."""
        try:
            return self._device.launch(staged)
        except BaseException as error:  # noqa: BLE001
            return Failed(error)

    def finish(self, launched: Launched, started: float) -> Failed | None:
        """Answer a computed batch, or why it cannot be answered."""
        batch = launched.batch
        try:
            outputs = self._device.finish(launched)
            results = _results(batch, outputs, batch.pool.gate)
        except BaseException as error:  # noqa: BLE001
            return Failed(error)
        self._answer(batch.tasks, results, may_wait=self._may_wait(batch))
        self._observe(batch, time.perf_counter() - started, True)
        return None

    def recover(self, batch: Batch, failure: Failed | None, *, computed: bool = True) -> None:
        """Answer a failed batch: in parts where that can be, so that only the culprits fail.

        `computed` is whether the expert has seen the batch.
        """
        started = time.perf_counter()
        parting = Parting(self._culprits)
        part: Batch | None = batch
        while part is not None:
            if failure is not None:
                self._part(part, failure.error, parting, computed=computed)
            part = parting.next()
            if part is not None:
                failure, computed = self._compute(part)
                parting.succeeded |= failure is None
        self._shares.charge(parting.blame() or batch.tasks, time.perf_counter() - started)

    def abandon(self, error: BaseException) -> None:
        """Something raised that nobody foresaw: whoever waits for what is in hand gets an error."""
        tasks = list(self._in_hand)
        self._in_hand.clear()
        fault = ExpertFailedError(f"the node failed: {unexpected('a device thread', error, by_a_stranger=True)}")
        self._outbox.put(tasks, [fault] * len(tasks), may_wait=False)

    # -- private

    def _compute(self, batch: Batch) -> tuple[Failed | None, bool]:
        """From staging to the answers, for a batch that was screened before: why it failed, and if it was computed."""
        started = time.perf_counter()
        staged = self.stage(batch)
        if isinstance(staged, Failed):
            return staged, False
        launched = self.launch(staged)
        if isinstance(launched, Failed):
            return launched, True
        return self.finish(launched, started), True

    def _part(self, batch: Batch, error: BaseException, parting: Parting, *, computed: bool) -> None:
        """Undo a failed batch and say what to compute instead, or answer it."""
        gate = batch.pool.gate
        overflowed = gate is not None and issubclass(type(error), NonFiniteResultError)
        try:
            if issubclass(type(error), torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if gate is not None:
                gate.undo()
            if len(batch.tasks) == 1:
                parting.failed_alone += batch.tasks
                if gate is not None and overflowed:
                    overflow = NonFiniteResultError(message_of(error))
                    self._answer(batch.tasks, [gate.failed_alone(batch.tasks[0], overflow)])
                    self._observe(batch, 0.0, False)
                    return
            elif gate is not None and overflowed:
                parting.add(gate.split(batch))
                return
            elif not computed or (batch.pool.may_repeat() and not self._device.is_lost(error)):
                parting.cut(batch)
                return
        except BaseException as failure:  # noqa: BLE001
            unexpected(f"{batch.pool.uid}: undoing a failed batch", failure, by_a_stranger=True)
        self._fail_all(batch, error)

    def _fail_all(self, batch: Batch, error: BaseException) -> None:
        reason = describe(error)
        now = time.monotonic()
        is_theirs = type(error) is BadRequestError  # only computing showed that the calls do not fit
        if not is_theirs and now - self._logged.get(batch.pool.uid, -QUIET_S) >= QUIET_S:
            self._logged[batch.pool.uid] = now
            logger.warning("%s: a batch of %d calls failed: %s", batch.pool.uid, len(batch.tasks), reason)
        self._observe(batch, 0.0, False)
        failed: CallError = ExpertFailedError(f"{batch.pool.uid}: the expert failed: {reason}")
        if is_theirs:
            failed = BadRequestError(message_of(error))
        elif is_out_of_memory(error):
            failed = out_of_memory(error)
        self._answer(batch.tasks, [failed] * len(batch.tasks))

    def _answer(self, tasks: Sequence[Task], results: Sequence[Flat | CallError], *, may_wait: bool = False) -> None:
        for task in tasks:
            self._in_hand.pop(task, None)
        self._outbox.put(tasks, results, may_wait=may_wait)

    def _observe(self, batch: Batch, seconds: float, succeeded: bool) -> None:
        if self._on_batch is None:
            return
        try:
            self._on_batch(batch, seconds, succeeded)
        except BaseException as error:  # noqa: BLE001
            unexpected(f"{batch.pool.uid}: the observer of batches", error, by_a_stranger=True)


def _results(batch: Batch, outputs: Flat, gate: BatchGate | None) -> list[Flat | CallError]:
    """Each task's rows, or its error."""
    tasks = batch.tasks
    if gate is None:
        return [*_split(tasks, outputs)]
    spoilt = dict(gate.inspect(batch, outputs))
    return [
        spoilt[task] if task in spoilt else gate.give_back(task, result) if task.halvings else result
        for task, result in zip(tasks, _split(tasks, outputs), strict=True)
    ]


def _split(tasks: list[Task], outputs: Flat) -> list[Flat]:
    if len(tasks) == 1:
        return [outputs]
    sizes = [task.rows for task in tasks]
    return list(zip(*(torch.split(output, sizes) for output in outputs), strict=True)) or [()] * len(tasks)
