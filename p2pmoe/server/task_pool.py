"""Groups the calls to one expert and pass into batches. Knows nothing about threads, devices or HTTP.

Synchronous bookkeeping: `submit` queues, `take_batch` hands out what a device should compute next. Calls may come
from the event loop and batches may be taken by a device thread: one lock guards the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch

from p2pmoe.errors import BadRequestError, CallError, ExpiredCallError, OverloadedError, SchemaError
from p2pmoe.protocol.schema import BatchTensorProto
from p2pmoe.rpc.base import Flat
from p2pmoe.rpc.prompt import PromptFuture
from p2pmoe.server.fair_queue import ANY_KEY, FairQueue
from p2pmoe.types import LOCAL_CALLER, Manner

PLAIN_MANNER: Final = Manner()
_manner: ContextVar[Manner] = ContextVar("manner", default=PLAIN_MANNER)
ProcessFunction = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(slots=True, eq=False)
class Task:
    """One queued call: flat tensors, [rows, …] each."""

    tensors: tuple[torch.Tensor, ...]
    rows: int
    future: asyncio.Future[tuple[torch.Tensor, ...]]
    arrived: float
    deadline: float | None
    caller: str = LOCAL_CALLER.key
    """Whose fair share it is taken from."""
    manner: Manner = PLAIN_MANNER
    key: Hashable = PLAIN_MANNER
    """Only tasks of equal keys share a batch; None shares with nobody."""
    is_probe: bool = False
    """It asks whether the expert works: nothing is counted for it."""
    taken: bool = False
    call_id: str = ""
    """Of a call that must not be applied twice."""
    halvings: int = 0
    """How often its gradients were halved before they were batched; its results are doubled as often."""

    def is_dead(self, now: float) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.cancelled() or (self.deadline is not None and now >= self.deadline)


@dataclass(slots=True)
class Batch:
    """Tasks of one pool that are computed together, in their order of arrival when they have one caller."""

    pool: TaskPool
    tasks: list[Task]
    rows: int
    taken_at: float

    @property
    def manner(self) -> Manner:
        """How its calls want to be computed, all alike."""
        return self.tasks[0].manner

    def compute(self, inputs: Flat) -> Flat:
        """The pool's function of merged inputs, which finds the batch's manner with `manner_now`."""
        before = _manner.set(self.manner)
        try:
            return self.pool.process_function(*inputs)
        finally:
            _manner.reset(before)

    def part(self, tasks: list[Task]) -> Batch:
        """The same of some of its tasks."""
        return replace(self, tasks=tasks, rows=sum(task.rows for task in tasks))


def manner_now() -> Manner:
    """How the batch that this thread computes is to be computed."""
    return _manner.get()


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

    def give_back(self, task: Task, results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | CallError:
        """The results of a task that was scaled down, as they would have been if it had not."""

    def undo(self) -> None:
        """The batch failed: take back what it left in the expert."""

    def split(self, batch: Batch) -> tuple[Batch, Batch]:
        """Two smaller batches instead of one that gave NaN or infinity."""

    def failed_alone(self, task: Task, error: Exception) -> CallError:
        """What a call is answered that gave NaN or infinity on its own."""


class TaskPool:
    """A bounded queue of tasks for one function, fair to its callers (`fair_queue.py`).

    Args:
        process_function: takes flat tensors of a merged batch, returns a flat tuple of tensors of as many rows.
        max_batch_size: rows of one batch; a single larger task still goes alone.
        min_batch_size: rows to wait for, at most `max_queue_delay_ms`.
        max_queue_delay_ms: how long the oldest task may wait for `min_batch_size` rows. 0 with
            `min_batch_size` > 1 means that the pool waits for the rows without limit.
        max_queue_size: tasks that may wait. One more is refused; when others wait with more tasks than its caller, the
            newest of theirs is refused instead.
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
        self.results: tuple[BatchTensorProto, ...] | None = None
        """What the function must give, where that is known."""
        self.splits_by_shape = False
        """Calls may differ in the sizes of a row; then only those of equal ones share a batch."""
        self.may_repeat: Callable[[], bool] = _never
        """Whether the batch that has just raised may be computed again in parts: nothing of it was applied."""
        self._clock = clock
        self._queue: FairQueue[Task] = FairQueue(_key_of)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<TaskPool {self.uid}: {len(self._queue)} tasks, {self._queue.rows} rows>"

    def __len__(self) -> int:
        return len(self._queue)

    def submit_task(
        self, *tensors: torch.Tensor, deadline: float | None = None, manner: Manner = PLAIN_MANNER
    ) -> asyncio.Future[tuple[torch.Tensor, ...]]:
        """Queue one call and wake the device; the future gives the flat results.

        Args:
            tensors: flat, each [rows, …] with the same number of rows.
            deadline: on the pool's clock; the task is dropped when it has not reached the device by then.
            manner: how to compute it; tasks of different manners do not share a batch.

        Raises:
            OverloadedError: `max_queue_size` tasks are waiting.
            BadRequestError: there are no tensors, or they differ in rows.
        """
        future = self.submit(tensors, deadline=deadline, manner=manner).future
        if self.runtime is not None:
            self.runtime.wake()
        return future

    def submit(
        self,
        tensors: tuple[torch.Tensor, ...],
        *,
        deadline: float | None = None,
        caller: str = LOCAL_CALLER.key,
        manner: Manner = PLAIN_MANNER,
        alone: bool = False,
        is_probe: bool = False,
        call_id: str = "",
    ) -> Task:
        """`submit_task` without waking the device: several calls that arrive together share a batch.

        Not one that is `alone`, as one with a seed always is: what it draws would depend on its neighbours' rows.
        """
        if not tensors or any(tensor.ndim == 0 for tensor in tensors):
            raise BadRequestError("a call needs tensors with the batch dimension in front")
        rows = tensors[0].shape[0]
        if any(tensor.shape[0] != rows for tensor in tensors):
            raise BadRequestError(f"the tensors of a call differ in rows: {[len(tensor) for tensor in tensors]}")
        future: PromptFuture[Flat] = PromptFuture(loop=asyncio.get_running_loop())
        key: Hashable = None if alone or manner.seed is not None else manner
        if key is not None and self.splits_by_shape:
            key = (manner, *(tensor.shape[1:] for tensor in tensors))
        task = Task(tensors, rows, future, self._clock(), deadline, caller, manner, key, is_probe, call_id=call_id)
        with self._lock:
            if len(self._queue) >= self.max_queue_size:
                self._make_room(task)
            self._queue.append(task)
        if self.runtime is not None:
            self.runtime.queued(self)
        return task

    def oldest(self) -> float | None:
        """When the oldest live task arrived, or None when nothing waits. Dead tasks are dropped on the way."""
        with self._lock:
            if dead := self._queue.drop_dead_heads(self._clock()):
                self._discard(dead)
            return self._queue.oldest()

    def ready_at(self) -> float | None:
        """When a batch may be taken, on the pool's clock: the past means now. None: nothing waits."""
        if self.min_batch_size > 1:
            with self._lock:  # rows that nobody waits for any more must not fill a batch
                self._discard(self._queue.drop_dead(self._clock()))
        oldest = self.oldest()
        if oldest is None:
            return None
        if self.min_batch_size <= 1:
            return oldest
        with self._lock:
            groups = self._queue.groups()
            if any(self._is_full(key, rows) for key, (rows, _) in groups.items()):
                return oldest
            ready = oldest + self.max_queue_delay_s if self.max_queue_delay_s > 0 else float("inf")
            # A task that expires while the pool waits for rows must be told so then.
            return min([ready, *(task.deadline for task in self._queue.tasks() if task.deadline is not None)])

    def take_batch(self) -> Batch | None:
        """The next batch: live tasks up to `max_batch_size` rows, fair to the callers; None when nothing waits."""
        now = self._clock()
        with self._lock:
            batch, rows, dead = self._queue.take(self.max_batch_size, now, self._first_key(now))
            for task in batch:
                task.taken = True
            if dead:
                self._discard(dead)
        return Batch(self, batch, rows, now) if batch else None

    def callers(self) -> list[str]:
        """Who has something waiting."""
        with self._lock:
            return self._queue.callers()

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
            tasks, self._queue = self._queue.tasks(), FairQueue(_key_of)
        return tasks

    # -- private, with the lock held

    def _is_full(self, key: Hashable, rows: int) -> bool:
        """Whether tasks of this key need not wait for more rows; those that share with nobody never do."""
        return key is None or rows >= self.min_batch_size

    def _first_key(self, now: float) -> Hashable:
        """Whose turn it is where some keys wait for more rows and others need not; ANY_KEY leaves it to fairness."""
        if self.min_batch_size <= 1:
            return ANY_KEY
        groups = self._queue.groups()
        if len(groups) < 2:
            return ANY_KEY
        late = now - self.max_queue_delay_s if self.max_queue_delay_s > 0 else -math.inf
        ready = [
            (arrived, index, key)
            for index, (key, (rows, arrived)) in enumerate(groups.items())
            if self._is_full(key, rows) or arrived <= late
        ]
        return min(ready)[2] if ready else ANY_KEY

    def _make_room(self, task: Task) -> None:
        """Raises OverloadedError when it is this task's caller who has most in the full queue."""
        self._discard(self._queue.drop_dead(task.arrived))
        if len(self._queue) < self.max_queue_size:
            return
        error = OverloadedError(f"{self.uid}: {self.max_queue_size} calls are waiting; try again soon")
        error.retry_after_s = 1.0
        greedy = self._queue.push_out(task.caller)
        if greedy is None:
            raise error
        _fail_soon(greedy, error)

    def _discard(self, dead: Iterable[Task]) -> None:
        for task in dead:
            _fail_soon(task, ExpiredCallError(f"{self.uid}: the call's deadline passed while it was queued"))


def _key_of(task: Task) -> Hashable:
    return task.key


def _never() -> bool:
    return False


def _fail_soon(task: Task, error: CallError) -> None:
    if not task.future.cancelled():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            task.future.get_loop().call_soon_threadsafe(_fail, task.future, error)


def _fail(future: asyncio.Future[tuple[torch.Tensor, ...]], error: CallError) -> None:
    if not future.done():
        future.set_exception(error)
