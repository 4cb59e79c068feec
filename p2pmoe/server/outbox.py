"""Results on their way from a device thread to the event loops of those who wait. Knows tasks and loops, no devices.

Every delivery wakes a loop, and then the process of the caller, on cores where the device's team of threads computes
the next batch; the whole team waits for the one that lost its core (docs/benchmarks.md). So results are gathered for a
moment while their callers wait for more. The loop that queues calls looks after them: however long the next batch
takes, nobody waits longer than `HOLD_S` for a result that is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Final

from p2pmoe.errors import CallError
from p2pmoe.faults import attempt
from p2pmoe.rpc.base import Flat
from p2pmoe.server.task_pool import Task

HOLD_S: Final = 0.02
Result = Flat | CallError


class Outbox:
    """Of one device. `watch` belongs to an event loop, everything else to any thread.

    `is_busy` says whether calls wait for the device or are on it.
    """

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._lock = threading.Lock()
        self._held: list[tuple[Task, Result]] = []
        self._watching: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"<Outbox: {len(self._held)} results>"

    def put(self, tasks: Sequence[Task], results: Sequence[Result], *, may_wait: bool) -> None:
        """Deliver results in the order of their tasks; those that may wait a little later, together with others."""
        with self._lock:
            self._held += zip(tasks, results, strict=True)
            if may_wait and self._watching is not None and not self._watching.is_closed():
                return
        self.flush()

    def flush(self) -> None:
        """Deliver everything that is held, in one crossing for each loop."""
        with self._lock:
            held, self._held = self._held, []
        if held:
            settle(held)

    def watch(self) -> None:
        """Calls were queued: see to it that no result is held for long."""
        if self._watching is not None and not self._watching.is_closed():
            return
        with contextlib.suppress(RuntimeError):  # no loop here: then nothing is held
            loop = asyncio.get_running_loop()
            self._watching = loop
            loop.call_later(HOLD_S, self._look)

    def _look(self) -> None:
        assert self._watching is not None
        busy = self._is_busy()
        if busy:
            self._watching.call_later(HOLD_S, self._look)
        else:
            self._watching = None
        self.flush()


def settle(pairs: Sequence[tuple[Task, Result]]) -> None:
    """Resolve the futures of tasks on their loops. Any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Task, Result]]] = {}
    for pair in pairs:
        by_loop.setdefault(pair[0].future.get_loop(), []).append(pair)
    for loop, its_pairs in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_set_results, its_pairs)


def _set_results(pairs: list[tuple[Task, Result]]) -> None:
    for task, result in pairs:
        attempt("handing over a result", _set_result, task, result, by_a_stranger=True)


def _set_result(task: Task, result: Result) -> None:
    if task.future.done():
        return
    if isinstance(result, CallError):
        task.future.set_exception(result)
    else:
        task.future.set_result(result)
