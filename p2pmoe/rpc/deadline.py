"""When waiting ends. Knows nothing of what is waited for."""

from __future__ import annotations

import time


class Deadline:
    """A point of the monotonic clock that may be brought forward while somebody waits for it."""

    __slots__ = ("at",)

    def __init__(self, at: float) -> None:
        self.at = at

    def __repr__(self) -> str:
        return f"<Deadline in {self.at - time.monotonic():.3f} s>"

    def bring_forward(self, seconds: float) -> None:
        """Wait at most so long from now on."""
        self.at = min(self.at, time.monotonic() + seconds)

    def left_s(self) -> float:
        """Seconds left, more than none. Raises TimeoutError."""
        left_s = self.at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline has passed")
        return left_s
