"""One core for many threads that pass the interpreter's lock around. Knows nothing of what they wait for.

The scheduler wakes each on whatever core is idle. There it waits for the lock, which a thread on another core holds,
and runs with caches that are cold: a turn takes 90 to 160 µs where it takes 30 on the core of the thread before
(docs/benchmarks.md). Threads are bound only while they wait: what they do between calls runs where it likes. Linux
only; elsewhere nothing is done.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_STAY_S: Final = 0.1
"""After which the scheduler may choose again: somebody else may need this core."""
_ROAM_S: Final = 0.002


@dataclass(slots=True)
class Bound:
    """A thread that is bound to a core, and where it might run before."""

    core: int
    before: set[int]

    def release(self) -> None:
        """Let the calling thread run there again, unless somebody has decided otherwise meanwhile."""
        try:
            if os.sched_getaffinity(0) == {self.core}:
                os.sched_setaffinity(0, self.before)
        except OSError:  # those cores were taken from the process, and the system has chosen others
            pass


class HomeCore:
    """Where threads are woken. `settle` and `leave` belong to the one that wakes them, `enter` to those that wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._works = sys.platform == "linux"
        self._settled: Bound | None = None
        self._due = 0.0
        self.core: int | None = None
        """None while threads run wherever there is room."""

    def __repr__(self) -> str:
        return f"<HomeCore: {self.core}>"

    def settle(self) -> None:
        """Keep the calling thread, and those that wait, on the core where it runs. Call it often: it moves at times."""
        if not self._works or (self.core is not None and self._clock() < self._due):
            return
        if self._settled is not None:  # for a moment the scheduler decides; then it stays where that has put it
            self._settled.release()
            self._settled, self._due = None, self._clock() + _ROAM_S
            return
        try:
            core = _current_core()
        except (OSError, ValueError, IndexError):  # a sandbox without /proc
            self._works = False
            self.leave()
            return
        self._settled = _bind(core)
        self.core = None if self._settled is None else core
        self._due = self._clock() + _STAY_S

    def leave(self) -> None:
        """Let the settled thread run anywhere again, and those that wait from now on."""
        self.core = None
        if self._settled is not None:
            self._settled.release()
            self._settled = None

    def enter(self) -> Bound | None:
        """The calling thread is about to wait, and is to be woken at home. `release` what this gives afterwards."""
        core = self.core
        return None if core is None else _bind(core)


def _bind(core: int) -> Bound | None:
    """Bind the calling thread to a core; None where it may not run there, or nowhere else anyway."""
    try:
        before = os.sched_getaffinity(0)
        if core not in before or len(before) == 1:
            return None
        os.sched_setaffinity(0, (core,))
    except OSError:  # a sandbox
        return None
    return Bound(core, before)


def _current_core() -> int:
    return int(Path("/proc/thread-self/stat").read_bytes().rpartition(b")")[2].split()[36])
