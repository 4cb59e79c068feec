"""Groups the calls to one expert and pass into batches. Knows nothing about threads, devices or HTTP.

Synchronous bookkeeping: `submit` queues, `take_batch` hands out what a device should compute next. Calls may come
from the event loop and batches may be taken by a device thread: one lock guards the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from p2pmoe.errors import BadRequestError, CallError, ExpiredCallError, OverloadedError, SchemaError
from p2pmoe.rpc.base import Flat
from p2pmoe.rpc.prompt import PromptFuture

ProcessFunction = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(slots=True, eq=False)
class Task:
    """One queued call: flat tensors, [rows, …] each."""

    tensors: tuple[torch.Tensor, ...]
    rows: int
    future: asyncio.Future[tuple[torch.Tensor, ...]]
    arrived: float
    deadline: float | None
    taken: bool = False


@dataclass(slots=True)
class Batch:
    """Tasks of one pool that are computed together, in their order of arrival."""

    pool: TaskPool
    tasks: list[Task]
    rows: int
    taken_at: float


class Waker(Protocol):
    """What a pool tells about its queue."""

    def queued(self, pool: TaskPool) -> None:
        """Something waits in `pool`."""

    def wake(self) -> None:
        """Look at the queues now."""


class BatchGate(Protocol):
    """What stands around the computing of a pool's batches; asked on the device thread."""

    def screen(self, tasks: list[Task]) -> list[tuple[Task, CallError]]:
        """The tasks that must not be computed, and why."""

    def inspect(self, batch: Batch, outputs: tuple[torch.Tensor, ...]) -> list[tuple[Task, CallError]]:
        """The tasks whose results must not be sent. Raises NonFiniteResultError when the batch may be computed anew."""

    def undo(self) -> None:
        """The batch failed: take back what it left in the expert."""

    def split(self, batch: Batch) -> tuple[Batch, Batch]:
        """Two smaller batches instead of one that gave NaN or infinity."""

    def failed_alone(self, task: Task, error: Exception) -> CallError:
        """What a call is answered that gave NaN or infinity on its own."""


class TaskPool:
    """A bounded queue of tasks for one function.

    Args:
        process_function: takes flat tensors of a merged batch, returns a flat tuple of tensors of as many rows.
        max_batch_size: rows of one batch; a single larger task still goes alone.
        min_batch_size: rows to wait for, at most `max_queue_delay_ms`.
        max_queue_delay_ms: how long the oldest task may wait for `min_batch_size` rows. 0 with
            `min_batch_size` > 1 means that the pool waits for the rows without limit.
        max_queue_size: tasks that may wait; one more is refused.
        priority: pools of higher priority go first.
        uid: name in messages and metrics.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        process_function: ProcessFunction,
        *,
        max_batch_size: int = 4096,
        min_batch_size: int = 1,
        max_queue_delay_ms: float = 0.0,
        max_queue_size: int = 1024,
        priority: int = 0,
        uid: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min_batch_size > max_batch_size:
            raise SchemaError(f"min_batch_size {min_batch_size} is over max_batch_size {max_batch_size}")
        self.process_function = process_function
        self.max_batch_size = max_batch_size
        self.min_batch_size = min_batch_size
        self.max_queue_delay_s = max_queue_delay_ms / 1e3
        self.max_queue_size = max_queue_size
        self.priority = priority
        self.uid = uid
        self.runtime: Waker | None = None
        """Told of queued tasks; set by the runtime that takes this pool's batches."""
        self.gate: BatchGate | None = None
        self._clock = clock
        self._tasks: deque[Task] = deque()
        self._rows = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<TaskPool {self.uid}: {len(self._tasks)} tasks, {self._rows} rows>"

    def __len__(self) -> int:
        return len(self._tasks)

    def submit_task(
        self, *tensors: torch.Tensor, deadline: float | None = None
    ) -> asyncio.Future[tuple[torch.Tensor, ...]]:
        """Queue one call and wake the device; the future gives the flat results.

        Args:
            tensors: flat, each [rows, …] with the same number of rows.
            deadline: on the pool's clock; the task is dropped when it has not reached the device by then.

        Raises:
            OverloadedError: `max_queue_size` tasks are waiting.
            BadRequestError: there are no tensors, or they differ in rows.
        """
        future = self.submit(tensors, deadline=deadline).future
        if self.runtime is not None:
            self.runtime.wake()
        return future

    def submit(self, tensors: tuple[torch.Tensor, ...], *, deadline: float | None = None) -> Task:
        """`submit_task` without waking the device: several calls that arrive together share a batch."""
        if not tensors or any(tensor.ndim == 0 for tensor in tensors):
            raise BadRequestError("a call needs tensors with the batch dimension in front")
        rows = tensors[0].shape[0]
        if any(tensor.shape[0] != rows for tensor in tensors):
            raise BadRequestError(f"the tensors of a call differ in rows: {[len(tensor) for tensor in tensors]}")
        future: PromptFuture[Flat] = PromptFuture(loop=asyncio.get_running_loop())
        task = Task(tensors, rows, future, self._clock(), deadline)
        with self._lock:
            if len(self._tasks) >= self.max_queue_size:
                self._drop_dead(task.arrived)
            if len(self._tasks) >= self.max_queue_size:
                error = OverloadedError(f"{self.uid}: {self.max_queue_size} calls are waiting; try again soon")
                error.retry_after_s = 1.0
                raise error
            self._tasks.append(task)
            self._rows += rows
        if self.runtime is not None:
            self.runtime.queued(self)
        return task

    def oldest(self) -> float | None:
        """When the oldest live task arrived, or None when nothing waits. Dead tasks are dropped on the way."""
        with self._lock:
            now = self._clock()
            while self._tasks and self._is_dead(self._tasks[0], now):
                self._discard(self._tasks.popleft())
            return self._tasks[0].arrived if self._tasks else None

    def ready_at(self) -> float | None:
        """When a batch may be taken, on the pool's clock: the past means now. None: nothing waits."""
        if self.min_batch_size > 1:
            self._drop_all_dead()  # rows that nobody waits for any more must not fill a batch
        oldest = self.oldest()
        if oldest is None:
            return None
        if self._rows >= self.min_batch_size:
            return oldest
        ready = oldest + self.max_queue_delay_s if self.max_queue_delay_s > 0 else float("inf")
        with self._lock:
            # A task that expires while the pool waits for rows must be told so then.
            return min([ready, *(task.deadline for task in self._tasks if task.deadline is not None)])

    def take_batch(self) -> Batch | None:
        """The next batch: the oldest live tasks up to `max_batch_size` rows; None when nothing waits."""
        batch: list[Task] = []
        rows = 0
        now = self._clock()
        with self._lock:
            while self._tasks:
                task = self._tasks[0]
                if self._is_dead(task, now):
                    self._discard(self._tasks.popleft())
                    continue
                if batch and rows + task.rows > self.max_batch_size:
                    break
                self._tasks.popleft()
                self._rows -= task.rows
                task.taken = True
                batch.append(task)
                rows += task.rows
        return Batch(self, batch, rows, now) if batch else None

    def cancel(self, task: Task) -> bool:
        """Drop a task unless a device has taken it; whether it was dropped."""
        with self._lock:
            if task.taken:
                return False
            task.future.cancel()
            return True

    def drain(self) -> list[Task]:
        """Everything that still waits, taken out."""
        with self._lock:
            tasks, self._tasks, self._rows = list(self._tasks), deque(), 0
        return tasks

    def _drop_all_dead(self) -> None:
        with self._lock:
            self._drop_dead(self._clock())

    # -- private, with the lock held

    @staticmethod
    def _is_dead(task: Task, now: float) -> bool:
        return task.future.cancelled() or (task.deadline is not None and now >= task.deadline)

    def _discard(self, task: Task) -> None:
        self._rows -= task.rows
        if not task.future.cancelled():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                task.future.get_loop().call_soon_threadsafe(_expire, task.future, self.uid)

    def _drop_dead(self, now: float) -> None:
        live: deque[Task] = deque()
        for task in self._tasks:
            if self._is_dead(task, now):
                self._discard(task)
            else:
                live.append(task)
        self._tasks = live


def _expire(future: asyncio.Future[tuple[torch.Tensor, ...]], uid: str) -> None:
    if not future.done():
        future.set_exception(ExpiredCallError(f"{uid}: the call's deadline passed while it was queued"))
