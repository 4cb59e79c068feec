"""Memory for calls in flight, shared among callers. Knows keys and numbers only.

A caller that holds something may hold `_ALPHA` times what is still free for others (the rule of Choudhury and Hahne,
1998, for buffers of switches): one caller alone gets four fifths, two get four ninths each, and there is always room
for one more.
"""

from __future__ import annotations

from p2pmoe.errors import OverloadedError
from p2pmoe.rpc.exchange import ByteBudget

_ALPHA = 4


class SharedBudget(ByteBudget):
    """The budget of a node; `of` gives the part of one caller."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.limit_bytes = limit_bytes
        self.by_caller: dict[str, int] = {}

    def of(self, key: str) -> CallerBudget:
        """What one caller takes from and gives back to; cheap to make."""
        return CallerBudget(self, key)


class CallerBudget(ByteBudget):
    """One caller's part of a shared budget."""

    def __init__(self, whole: SharedBudget, key: str) -> None:
        self._whole = whole
        self._key = key

    def __repr__(self) -> str:
        return f"<CallerBudget: {self._whole.by_caller.get(self._key, 0)} bytes of {self._whole}>"

    def take(self, count: int) -> None:
        """Raises OverloadedError when the node's calls, or this caller's, hold too much."""
        whole = self._whole
        mine = whole.by_caller.get(self._key, 0)
        if mine and mine + count > _ALPHA * (whole.limit_bytes - whole.held):
            raise OverloadedError(f"your calls in flight hold {mine} bytes of this node's memory; try again soon")
        whole.take(count)
        whole.by_caller[self._key] = mine + count

    def give(self, count: int) -> None:
        whole = self._whole
        whole.give(count)
        left = whole.by_caller.get(self._key, 0) - count
        if left:
            whole.by_caller[self._key] = left
        else:
            whole.by_caller.pop(self._key, None)
