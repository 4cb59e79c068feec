"""The replay window: a backward id is applied at most once. Synchronous; knows no HTTP and no experts.

Rules:
1. The first call with an id runs; a later one with the same id gets the first one's answer, also while it runs.
2. A call that never reached a device (refused, expired, cancelled in the queue) leaves no trace: it may come again.
3. Answers are kept for `window_s`, at most `max_bytes` of them; ids outlive their answers, then a repeat is refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

from p2pmoe.errors import ReplayConflictError
from p2pmoe.rpc.base import Flat
from p2pmoe.rpc.prompt import PromptFuture, when_done
from p2pmoe.server.task_pool import Task, TaskPool

WINDOW_S: Final = 120.0
"""How long an id is remembered."""
MAX_IDS: Final = 100_000


@dataclass(slots=True, eq=False)
class _Entry:
    uid: str
    pool: TaskPool
    task: Task | None  # until it is answered
    started: float
    answer: asyncio.Future[Flat] | None  # None: evicted
    waiters: int = 0
    nbytes: int = 0


class ReplayWindow:
    """Answers of backward calls by id."""

    def __init__(
        self,
        *,
        window_s: float = WINDOW_S,
        max_bytes: int = 32 * 1024 * 1024,
        max_ids: int = MAX_IDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window_s = window_s
        self._max_bytes = max_bytes
        self._max_ids = max_ids
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._answered: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<ReplayWindow: {len(self._entries)} ids, {self._bytes} bytes>"

    def repeat(self, call_id: str, uid: str) -> asyncio.Future[Flat] | None:
        """The first answer of this id, or None when the id is new. Raises ReplayConflictError."""
        self._prune()
        entry = self._entries.get(call_id)
        if entry is None:
            return None
        if entry.uid != uid:
            raise ReplayConflictError(f"backward id {call_id} was used for {entry.uid}; every call needs its own id")
        if entry.answer is None:
            raise ReplayConflictError(f"backward id {call_id} was applied already; its answer is no longer kept")
        return self._wait_for(call_id, entry, entry.answer)

    def first(self, call_id: str, uid: str, pool: TaskPool, task: Task) -> asyncio.Future[Flat]:
        """Remember a call that was just queued; the future to wait for instead of the task's own."""
        entry = _Entry(uid, pool, task, self._clock(), task.future)
        self._entries[call_id] = entry
        when_done(task.future, partial(self._answer, call_id, entry))
        return self._wait_for(call_id, entry, task.future)

    def restore(self, applied: Iterable[tuple[str, str, float]], pool_of: Callable[[str], TaskPool]) -> None:
        """Refuse to repeat calls of an earlier run of the node, whose answers are gone.

        Args:
            applied: ids, uids, and how many seconds ago.
            pool_of: the backward pool of a uid.
        """
        now = self._clock()
        for call_id, uid, age_s in sorted(applied, key=lambda each: -each[2]):
            if age_s < self._window_s:
                self._entries.setdefault(call_id, _Entry(uid, pool_of(uid), None, now - age_s, None))

    # -- private

    def _wait_for(self, call_id: str, entry: _Entry, source: asyncio.Future[Flat]) -> asyncio.Future[Flat]:
        """A future of its own for each caller, so that one who leaves does not take the answer from the others."""
        waiter: PromptFuture[Flat] = PromptFuture(loop=source.get_loop())
        entry.waiters += 1
        when_done(waiter, partial(self._leave, call_id, entry))
        when_done(source, partial(_copy_result, waiter))
        return waiter

    def _leave(self, call_id: str, entry: _Entry, waiter: asyncio.Future[Flat]) -> None:
        entry.waiters -= 1
        if not waiter.cancelled() or entry.waiters or entry.task is None:
            return
        if entry.pool.cancel(entry.task):
            self._forget(call_id, entry)

    def _answer(self, call_id: str, entry: _Entry, future: asyncio.Future[Flat]) -> None:
        task, entry.task = entry.task, None  # its inputs are no longer needed
        if task is not None and not task.taken:
            self._forget(call_id, entry)
        elif self._entries.get(call_id) is entry and not future.cancelled() and future.exception() is None:
            entry.nbytes = sum(tensor.nbytes for tensor in future.result())
            self._bytes += entry.nbytes
            self._answered[call_id] = entry

    def _forget(self, call_id: str, entry: _Entry) -> None:
        if self._entries.get(call_id) is not entry:
            return  # forgotten before; the id may have come again since
        del self._entries[call_id]
        self._answered.pop(call_id, None)
        self._bytes -= entry.nbytes

    def _prune(self) -> None:
        oldest_allowed = self._clock() - self._window_s
        while self._entries:
            call_id, entry = next(iter(self._entries.items()))
            if entry.started > oldest_allowed and len(self._entries) <= self._max_ids:
                break
            self._forget(call_id, entry)
        while self._bytes > self._max_bytes:
            _, entry = self._answered.popitem(last=False)
            self._bytes -= entry.nbytes
            entry.nbytes = 0
            entry.answer = None


def _copy_result(waiter: asyncio.Future[Flat], source: asyncio.Future[Flat]) -> None:
    if waiter.done():
        return
    if source.cancelled():
        waiter.cancel()
    elif (error := source.exception()) is not None:
        waiter.set_exception(error)
    else:
        waiter.set_result(source.result())
