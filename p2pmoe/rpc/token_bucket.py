"""A rate with bursts. Knows neither what is counted nor a clock.

A bucket lends: an amount larger than the whole burst is taken from a full bucket and paid back before the next, so
that a tight limit slows large requests and never forbids them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

MAX_REMEMBERED: Final = 4096


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


class TokenBuckets:
    """A bucket for each of many keys, made on first use; of more than 4,096 the one that was silent longest goes."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __repr__(self) -> str:
        return f"<TokenBuckets: {len(self._buckets)} keys>"

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str, amount: float, now: float) -> float:
        """See `TokenBucket.take`."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(self._rate, self._burst, now)
            if len(self._buckets) > MAX_REMEMBERED:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        return bucket.take(amount, now)
