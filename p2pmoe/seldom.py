"""Says at most so often what could be said all the time. Knows no logger."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

SELDOM_S: Final = 600.0
"""Between two lines about something that goes on."""


class Seldom:
    """One line, then one in `every_s` seconds that says how often it happened. For any thread.

    Use as `if (note := seldom.note()) is not None: logger.warning("… %s", …, note)`.
    """

    def __init__(self, every_s: float = SELDOM_S, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock = clock
        self._said_at: float | None = None
        self._unsaid = 0
        self._lock = threading.Lock()

    def note(self) -> str | None:
        """What to add to the line now: nothing at first, later " (N more times …)"; None: say nothing this time."""
        now = self._clock()
        with self._lock:
            if self._said_at is not None and now - self._said_at < self._every_s:
                self._unsaid += 1
                return None
            unsaid, self._unsaid = self._unsaid, 0
            since_s = 0.0 if self._said_at is None else now - self._said_at
            self._said_at = now
        times = "once" if unsaid == 1 else f"{unsaid} times"
        return f" (and {times} in the last {since_s / 60:.0f} min)" if unsaid else ""

    def reset(self) -> None:
        """It is over: the next time is news again."""
        with self._lock:
            self._said_at, self._unsaid = None, 0

    def __repr__(self) -> str:
        return f"<Seldom: {self._unsaid} unsaid>"
