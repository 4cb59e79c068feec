"""One thread a device: takes the pool whose turn it is, computes, hands back results.

It is the turn of the caller who has used least of the device (`fair_queue.py`); of the pools where that caller waits
it is the one whose oldest task has waited longest.

Knows pools and devices; nothing of experts, HTTP or schemas. A class has a thread; it is not one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from p2pmoe import forks
from p2pmoe.errors import (
    BadRequestError,
    CallError,
    DrainingError,
    ExpertFailedError,
    NonFiniteResultError,
    is_out_of_memory,
    out_of_memory,
)
from p2pmoe.rpc.base import Flat
from p2pmoe.rpc.doorbell import Doorbell
from p2pmoe.server.devices import Device, Launched, Staged, open_device
from p2pmoe.server.fair_queue import DeviceShares
from p2pmoe.server.memory import keep_freed_memory, trim_memory
from p2pmoe.server.outbox import Outbox, settle
from p2pmoe.server.task_pool import Batch, BatchGate, Task, TaskPool

logger = logging.getLogger(__name__)

_TRIM_AFTER_S = 0.5
_IDLE_S = 60.0  # how long the thread sleeps when nothing is queued; any submit wakes it
BatchObserver = Callable[[Batch, float, bool], None]


class Runtime:
    """Computes the batches of pools on one device.

    Args:
        pools: the pools to serve; `add` takes more later.
        device: a torch device name.
        on_batch: told of every batch, its seconds and whether it succeeded, on the device thread.
    """

    def __init__(
        self, pools: Iterable[TaskPool] = (), *, device: str = "cpu", on_batch: BatchObserver | None = None
    ) -> None:
        self.device = device
        self._on_batch = on_batch
        self._waiting: dict[TaskPool, None] = {}
        self._bell = Doorbell()
        self._rung = False
        self._closing = False
        self._pools: list[TaskPool] = []
        self._running = 0
        self._shares = DeviceShares()
        self._outbox = Outbox(lambda: bool(self._running or self.tasks_waiting))
        self._computed_since_trim = True  # making experts leaves freed memory too
        self._thread: threading.Thread | None = None
        for pool in pools:
            self.add(pool)
        forks.tell(self)

    def __repr__(self) -> str:
        return (
            f"<Runtime {self.device}: {len(self._pools)} pools, {len(self._waiting)} waiting, {self._running} running>"
        )

    @property
    def tasks_waiting(self) -> int:
        return sum(len(pool) for pool in self._pools)

    @property
    def tasks_running(self) -> int:
        return self._running

    def add(self, pool: TaskPool) -> None:
        """Serve one more pool."""
        pool.runtime = self
        self._pools.append(pool)
        if len(pool):
            self.queued(pool)

    def start(self) -> None:
        """Start the device thread."""
        keep_freed_memory()
        self._thread = threading.Thread(target=self._run, name=f"p2pmoe-device-{self.device}", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Let the running batch end, fail what still waits with DrainingError, end the thread."""
        self._closing = True
        self._rung = False
        self.wake()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                logger.warning("device %s is still computing after %.1f s; leaving it", self.device, timeout_s)
            else:
                self._bell.close()
            self._thread = None
        for pool in self._pools:
            error = DrainingError(f"{pool.uid}: the node is shutting down")
            settle([(task, error) for task in pool.drain()])

    def queued(self, pool: TaskPool) -> None:
        """See `Waker`."""
        self._waiting[pool] = None

    def wake(self) -> None:
        """See `Waker`."""
        self._outbox.watch()
        if not self._rung:
            self._rung = True
            self._bell.ring()

    def became_a_child(self) -> None:
        """See `forks`: the device thread stayed in the parent, and nobody would compute."""
        if self._thread is not None:
            self._thread, self._closing = None, True
            for pool in self._pools:
                pool.runtime = _OfTheParent()

    # -- the device thread

    def _run(self) -> None:
        device = open_device(self.device)
        staged: Staged | None = None
        while not self._closing:
            if staged is None:
                batch = self._wait_for_batch()
                staged = None if batch is None else self._stage(device, batch)
                continue
            started = time.perf_counter()
            tasks = staged.batch.tasks
            launched = self._launch(device, staged)
            staged = None
            if device.prefetches and (following := self._take_now()[0]) is not None:
                staged = self._stage(device, following)
            if launched is not None:
                self._finish(device, launched, started)
            self._shares.charge(tasks, time.perf_counter() - started)
        if staged is not None:
            self._deliver_error(staged.batch.tasks, DrainingError("the node is shutting down"))
        self._outbox.flush()

    def _wait_for_batch(self) -> Batch | None:
        batch, delay_s = self._take_now()
        if batch is None:
            self._outbox.flush()
            self._rest(delay_s)
        return batch

    def _rest(self, delay_s: float) -> None:
        """Sleep until something is submitted; give freed memory back to the system before a longer sleep."""
        if self._bell.wait(min(delay_s, _TRIM_AFTER_S)) or delay_s <= _TRIM_AFTER_S:
            return
        if self._computed_since_trim:
            self._computed_since_trim = False
            trim_memory()
        self._bell.wait(delay_s - _TRIM_AFTER_S)

    def _take_now(self) -> tuple[Batch | None, float]:
        """The batch to compute now, or how many seconds nothing will be ready unless somebody rings."""
        self._rung = False  # before the queues are read: a task that comes later rings again
        now = time.monotonic()
        best: tuple[int, float, float] | None = None
        chosen: TaskPool | None = None
        delay_s = _IDLE_S
        waiting = list(self._waiting)
        for pool in waiting:
            ready_at = pool.ready_at()
            if ready_at is None:
                self._forget(pool)
            elif ready_at > now:
                delay_s = min(delay_s, ready_at - now)
            else:
                rank = (-pool.priority, self._shares.least(pool.callers()) if len(waiting) > 1 else 0.0, ready_at)
                if best is None or rank < best:
                    best, chosen = rank, pool
        if best is None or chosen is None:
            self._shares.forget()
            return None, delay_s
        self._shares.advance(best[1])
        return chosen.take_batch(), 0.0

    def _forget(self, pool: TaskPool) -> None:
        self._waiting.pop(pool, None)
        if len(pool):  # a task came in between
            self._waiting[pool] = None

    def _stage(self, device: Device, batch: Batch) -> Staged | None:
        self._running += len(batch.tasks)
        try:
            if batch.pool.gate is not None:
                self._screen(batch, batch.pool.gate)
            return device.stage(batch) if batch.tasks else None
        except BaseException as error:  # noqa: BLE001 - the thread must outlive any expert
            self._fail(device, batch, error)
            return None

    def _screen(self, batch: Batch, gate: BatchGate) -> None:
        refused = dict(gate.screen(batch.tasks))
        if refused:
            batch.tasks = [task for task in batch.tasks if task not in refused]
            batch.rows -= sum(task.rows for task in refused)
            self._running -= len(refused)
            self._outbox.put(list(refused), list(refused.values()), may_wait=False)

    def _launch(self, device: Device, staged: Staged) -> Launched | None:
        try:
            return device.launch(staged)
        except BaseException as error:  # noqa: BLE001
            self._fail(device, staged.batch, error)
            return None

    def _finish(self, device: Device, launched: Launched, started: float) -> None:
        batch = launched.batch
        try:
            outputs = device.finish(launched)
            results = _results(batch, outputs, batch.pool.gate)
        except BaseException as error:  # noqa: BLE001
            self._fail(device, batch, error)
            return
        self._running -= len(batch.tasks)
        self._computed_since_trim = True
        self._deliver(batch, results)
        self._observe(batch, time.perf_counter() - started, True)

    def _fail(self, device: Device, batch: Batch, error: BaseException) -> None:
        self._running -= len(batch.tasks)
        if batch.pool.gate is not None and self._recover(device, batch, batch.pool.gate, error):
            return
        if isinstance(error, BadRequestError):  # only computing showed that the calls do not fit
            self._observe(batch, 0.0, False)
            self._deliver_error(batch.tasks, error)
            return
        logger.warning(
            "%s: a batch of %d calls failed: %s: %s", batch.pool.uid, len(batch.tasks), type(error).__name__, error
        )
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        self._observe(batch, 0.0, False)
        if is_out_of_memory(error):
            self._deliver_error(batch.tasks, out_of_memory(error))
            return
        reason = str(error).partition("\n")[0][:500]
        self._deliver_error(
            batch.tasks, ExpertFailedError(f"{batch.pool.uid}: the expert failed: {type(error).__name__}: {reason}")
        )

    def _recover(self, device: Device, batch: Batch, gate: BatchGate, error: BaseException) -> bool:
        """Undo a failed batch; whether it was answered: one that gave NaN or infinity is computed in two parts."""
        try:
            gate.undo()
            if not isinstance(error, NonFiniteResultError):
                return False
            if len(batch.tasks) == 1:
                self._deliver_error(batch.tasks, gate.failed_alone(batch.tasks[0], error))
                self._observe(batch, 0.0, False)
                return True
            parts = gate.split(batch)
        except Exception:
            logger.exception("%s: a failed batch could not be undone", batch.pool.uid)
            return False
        for part in parts:
            self._compute(device, part)
        return True

    def _compute(self, device: Device, batch: Batch) -> None:
        """From staging to the answers, for a batch that was screened before."""
        self._running += len(batch.tasks)
        started = time.perf_counter()
        try:
            staged = device.stage(batch)
        except BaseException as error:  # noqa: BLE001
            self._fail(device, batch, error)
            return
        launched = self._launch(device, staged)
        if launched is not None:
            self._finish(device, launched, started)

    def _deliver(self, batch: Batch, results: Sequence[Flat | CallError]) -> None:
        """Results of callers all of whom wait for other experts too may go together with theirs."""
        callers = {task.caller for task in batch.tasks}
        for pool in list(self._waiting):
            if not callers:
                break
            if pool is not batch.pool:
                callers.difference_update(pool.callers())
        self._outbox.put(batch.tasks, results, may_wait=not callers)

    def _deliver_error(self, tasks: list[Task], error: CallError) -> None:
        self._outbox.put(tasks, [error] * len(tasks), may_wait=False)

    def _observe(self, batch: Batch, seconds: float, succeeded: bool) -> None:
        if self._on_batch is None:
            return
        try:
            self._on_batch(batch, seconds, succeeded)
        except Exception:
            logger.exception("%s: the observer of batches failed", batch.pool.uid)


class _OfTheParent:
    """The device of a pool that a forked child inherited."""

    def queued(self, pool: TaskPool) -> None:
        """Raises ForkedError."""
        raise forks.forked("started the device of this expert", "make experts and a Node there")

    def wake(self) -> None:
        """Nobody is there."""


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
