"""One thread a device: takes the pool whose turn it is, computes, hands back results.

It is the turn of the caller who has used least of the device (`fair_queue.py`); of the pools where that caller waits
it is the one whose oldest task has waited longest.

Knows pools and devices; nothing of experts, HTTP or schemas. A class has a thread; it is not one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from p2pmoe import forks
from p2pmoe.errors import CallError, DrainingError, ExpertFailedError, ExpiredCallError, describe
from p2pmoe.faults import attempt, unexpected
from p2pmoe.rpc.doorbell import Doorbell
from p2pmoe.server.computing import BatchObserver, Computing, Failed
from p2pmoe.server.devices import Staged, open_device
from p2pmoe.server.fair_queue import DeviceShares
from p2pmoe.server.memory import keep_freed_memory, trim_memory
from p2pmoe.server.outbox import Outbox, settle
from p2pmoe.server.recovery import Culprits
from p2pmoe.server.task_pool import Batch, Task, TaskPool

logger = logging.getLogger(__name__)

_TRIM_AFTER_S = 0.5
_IDLE_S = 60.0  # how long the thread sleeps when nothing is queued; any submit wakes it


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
        self._computing: Computing | None = None
        self._ended: CallError | None = None
        self._shares = DeviceShares()
        self._culprits = Culprits(time.monotonic)
        self._set_aside: deque[tuple[Batch, float]] = deque()  # of culprits, and how long they may be kept waiting
        self._outbox = Outbox(lambda: bool(self.tasks_running or self.tasks_waiting))
        self._computed_since_trim = True  # making experts leaves freed memory too
        self._thread: threading.Thread | None = None
        self._jobs: deque[Callable[[], None]] = deque()
        for pool in pools:
            self.add(pool)
        forks.tell(self)

    def __repr__(self) -> str:
        return (
            f"<Runtime {self.device}: {len(self._pools)} pools, {len(self._waiting)} waiting, "
            f"{self.tasks_running} running>"
        )

    @property
    def tasks_waiting(self) -> int:
        # Of the pools that have something only: there may be thousands, and this is asked for every batch.
        return sum(len(pool) for pool in list(self._waiting)) + sum(
            len(each[0].tasks) for each in list(self._set_aside)
        )

    @property
    def tasks_running(self) -> int:
        return 0 if self._computing is None else self._computing.running

    @property
    def alive(self) -> bool:
        """False once the device thread has ended though nobody closed it: calls are refused."""
        return self._ended is None

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
        if self._ended is not None:
            error = self._ended
            settle([(task, error) for task in pool.drain()])

    def wake(self) -> None:
        """See `Waker`."""
        self._outbox.watch()
        if not self._rung:
            self._rung = True
            self._bell.ring()

    def between_batches(self, job: Callable[[], None]) -> None:
        """Run `job` on the device thread before the next batch is taken; it must not raise. Any thread.

        One job a batch, so that many of them hold up no call for long. Once the device thread has ended, whoever asks
        runs it: nothing computes then.
        """
        self._jobs.append(job)
        if self._thread is not None and self._thread.is_alive():
            self.wake()
        else:
            self._run_jobs()

    def became_a_child(self) -> None:
        """See `forks`: the device thread stayed in the parent, and nobody would compute."""
        if self._thread is not None:
            self._thread, self._closing = None, True
            for pool in self._pools:
                pool.runtime = _OfTheParent()

    # -- the device thread

    def _run(self) -> None:
        reason = "its thread has ended"
        try:
            self._serve()
        except BaseException as error:  # noqa: BLE001 - whoever waits for this thread must hear of it
            reason = describe(error)
            unexpected(f"the thread of device {self.device}", error)
        finally:
            self._end(reason)

    def _serve(self) -> None:
        computing = self._computing = Computing(
            open_device(self.device),
            self._outbox,
            self._shares,
            self._culprits,
            may_wait=self._may_wait,
            on_batch=self._on_batch,
        )
        staged: Staged | None = None
        while not self._closing:
            try:
                staged = self._turn(computing, staged)
            except BaseException as error:  # noqa: BLE001 - nothing that a batch does may end the thread
                staged = None
                if not computing.running:  # it is the queues themselves
                    computing.hold(self._drain_pools())
                computing.abandon(error)

    def _turn(self, computing: Computing, staged: Staged | None) -> Staged | None:
        """Wait for a batch, or compute the one that is staged; the batch staged meanwhile."""
        if self._jobs and staged is None:
            self._run_job()
        if staged is None:
            batch = self._wait_for_batch()
            return None if batch is None else self._stage(computing, batch)
        started = time.perf_counter()
        batch, tasks = staged.batch, staged.batch.tasks
        launched = computing.launch(staged)
        following = self._take_now()[0] if computing.prefetches and not self._jobs else None
        following = following if following is not None and computing.take(following) else None
        prepared = None if following is None else computing.stage(following)
        failure = launched if isinstance(launched, Failed) else computing.finish(launched, started)
        self._computed_since_trim = True
        self._shares.charge(tasks, time.perf_counter() - started)
        if failure is not None:
            computing.recover(batch, failure)
        if not isinstance(prepared, Failed):
            return prepared
        assert following is not None
        computing.recover(following, prepared, computed=False)
        return None

    def _stage(self, computing: Computing, batch: Batch) -> Staged | None:
        if not computing.take(batch):
            return None
        staged = computing.stage(batch)
        if not isinstance(staged, Failed):
            return staged
        computing.recover(batch, staged, computed=False)
        return None

    def _end(self, reason: str) -> None:
        """Nothing will be computed any more: nobody may wait for it."""
        tasks = [] if self._computing is None else self._computing.in_hand()
        while self._set_aside:
            tasks += self._set_aside.popleft()[0].tasks
        if self._closing:
            error: CallError = DrainingError("the node is shutting down")
        else:
            self._ended = error = ExpertFailedError(f"device {self.device} has stopped: {reason}; restart the node")
            tasks += self._drain_pools()
        self._outbox.put(tasks, [error] * len(tasks), may_wait=False)
        self._run_jobs()

    def _run_jobs(self) -> None:
        while self._jobs:
            self._run_job()

    def _run_job(self) -> None:
        try:
            job = self._jobs.popleft()
        except IndexError:  # another thread was quicker
            return
        attempt("a job between two batches", job)

    def _drain_pools(self) -> list[Task]:
        self._waiting.clear()  # first: what comes from now on is told of again
        return [task for pool in self._pools for task in pool.drain()]

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
        if self._set_aside and time.monotonic() >= self._set_aside[0][1]:
            return self._take_aside(), 0.0
        batch, delay_s = self._take_next()
        if batch is None:
            return (self._take_aside(), 0.0) if self._set_aside else (None, delay_s)
        others, suspects = self._culprits.part(batch.tasks)
        if not others or not suspects:
            return batch, 0.0
        until = time.monotonic() + self._culprits.patience_s(suspects)
        self._set_aside.append((batch.part(suspects), until))
        return batch.part(others), 0.0

    def _take_aside(self) -> Batch | None:
        """The calls that were set aside longest, without those that nobody waits for any more."""
        batch, now = self._set_aside.popleft()[0], time.monotonic()
        dead = [task for task in batch.tasks if task.is_dead(now)]
        for task in dead:
            task.taken = False  # no device has seen it: it may come again
        error = ExpiredCallError(
            f"{batch.pool.uid}: the call's deadline passed; calls of yours failed, so it came last"
        )
        self._outbox.put(dead, [error] * len(dead), may_wait=False)
        live = [task for task in batch.tasks if task not in dead]
        return batch.part(live) if live else None

    def _take_next(self) -> tuple[Batch | None, float]:
        """The same of the queues."""
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

    def _may_wait(self, batch: Batch) -> bool:
        """Results of callers all of whom wait for other experts too may go together with theirs."""
        callers = {task.caller for task in batch.tasks}
        for pool in list(self._waiting):
            if not callers:
                break
            if pool is not batch.pool:
                callers.difference_update(pool.callers())
        return not callers


class _OfTheParent:
    """The device of a pool that a forked child inherited."""

    def queued(self, pool: TaskPool) -> None:
        """Raises ForkedError."""
        raise forks.forked("started the device of this expert", "make experts and a Node there")

    def wake(self) -> None:
        """Nobody is there."""
