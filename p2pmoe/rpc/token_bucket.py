"""A rate with bursts. Knows neither what is counted nor a clock.

A bucket lends: an amount larger than the whole burst is taken from a full bucket and paid back before the next, so
that a tight limit slows large requests and never forbids them.
"""

from __future__ import annotations

import math


class TokenBucket:
    """Up to `burst` at once, `rate` a second in the long run; `inf` is no limit."""

    __slots__ = ("_level", "_rate", "_updated", "burst")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self.burst = burst
        self._level = burst
        self._updated = now

    def __repr__(self) -> str:
        return f"<TokenBucket: {self._level:.1f} of {self.burst:.1f}>"

    def take(self, amount: float, now: float) -> float:
        """0.0 when the amount is taken, else after how many seconds it would be; then nothing is taken."""
        if self._rate == math.inf:
            return 0.0
        level = self._level
        if now > self._updated:
            level = min(self.burst, level + (now - self._updated) * self._rate)
            self._updated = now
            self._level = level
        needed = min(amount, self.burst)
        if level >= needed:
            self._level = level - amount
            return 0.0
        return (needed - level) / self._rate
