"""Whose turn it is: a queue that serves callers by rows, and the device time that each has used. No lock, no clock.

Start-time fair queueing (Goyal, Vin and Cheng 1996): every caller has a line of its own and a tag, the rows served to
it so far; the line with the least tag is next. Who comes back after a pause starts from the tag of the line that was
served last: a pause earns nothing and costs nothing. Unlike a round robin there is no quantum to choose, so one batch
takes from every line that waits, and between two callers who always have something waiting the rows served differ by
at most one call of each. With a single caller it is a plain queue.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, Protocol, TypeVar

ANY_KEY: Final = object()
"""Of the task whose turn it is."""
_FORGET_AT = 64  # idle lines are swept out once there are so many more than busy ones


class Queued(Protocol):
    """What waits. `caller` is whose line it stands in."""

    @property
    def rows(self) -> int: ...
    @property
    def arrived(self) -> float: ...
    @property
    def caller(self) -> str: ...
    def is_dead(self, now: float) -> bool:
        """Whether nobody waits for it any more."""


T = TypeVar("T", bound=Queued)


class _Line(Generic[T]):
    __slots__ = ("caller", "tag", "tasks", "turn")

    def __init__(self, caller: str, tag: int) -> None:
        self.caller = caller
        self.tag = tag
        self.turn = 0
        self.tasks: deque[T] = deque()

    def __lt__(self, other: _Line[T]) -> bool:
        return self.tag < other.tag if self.tag != other.tag else self.turn < other.turn


def _no_key(_: object) -> Hashable:
    return ANY_KEY


class FairQueue(Generic[T]):
    """Lines by caller. Tasks of one caller keep their order.

    `key_of` says which tasks may be taken together: those of equal keys, and one whose key is None by itself. Without
    it all may.
    """

    def __init__(self, key_of: Callable[[T], Hashable] | None = None) -> None:
        self._key_of = key_of or _no_key
        self._lines: dict[str, _Line[T]] = {}
        self._busy: list[_Line[T]] = []  # a heap: the line that is next in front
        self._tag = 0  # of the line that was served last
        self._turn = 0
        self._count = 0
        self.rows = 0

    def __repr__(self) -> str:
        return f"<FairQueue: {self._count} tasks, {self.rows} rows of {len(self._busy)} callers>"

    def __len__(self) -> int:
        return self._count

    def append(self, task: T) -> None:
        """Queue a task at the end of its caller's line."""
        line = self._lines.get(task.caller)
        if line is None:
            line = self._lines[task.caller] = _Line(task.caller, self._tag)
        if not line.tasks:
            line.tag = max(line.tag, self._tag)
            self._turn += 1
            line.turn = self._turn
            heapq.heappush(self._busy, line)
        line.tasks.append(task)
        self._count += 1
        self.rows += task.rows

    def take(self, max_rows: int, now: float, key: Hashable = ANY_KEY) -> tuple[list[T], int, list[T]]:
        """The next tasks, at least one and up to `max_rows` in fair order; their rows; the dead found on the way.

        All have the key of the first, or share with nobody (None). A line whose next task has another key is passed
        over and is first the next time, for its tag has not grown. Stops at the first task that does not fit, so that
        a large one is never overtaken for ever.
        """
        taken: list[T] = []
        dead: list[T] = []
        passed: list[_Line[T]] = []
        rows = 0
        key_of = self._key_of
        while self._busy and not (taken and key is None):
            line = self._busy[0]
            tasks = line.tasks
            alone = len(self._busy) == 1
            is_other = is_full = False
            while tasks:
                task = tasks[0]
                if task.is_dead(now):
                    dead.append(tasks.popleft())
                    continue
                its_key = key_of(task)
                is_other = key is not ANY_KEY and its_key != key
                is_full = not is_other and bool(taken) and rows + task.rows > max_rows
                if is_other or is_full:
                    break
                key = its_key
                taken.append(tasks.popleft())
                rows += task.rows
                self._tag = line.tag
                line.tag += task.rows or 1
                if not alone or key is None:
                    break
            if is_full:
                break
            if is_other:
                passed.append(heapq.heappop(self._busy))
            else:
                self._settle_first(line)
        for line in passed:
            heapq.heappush(self._busy, line)
        self._forget_idle()
        return self._took(taken, rows, dead)

    def groups(self) -> dict[Hashable, tuple[int, float]]:
        """By key, of what `take` can reach: how many rows are in front of all lines, and when the oldest arrived."""
        groups: dict[Hashable, tuple[int, float]] = {}
        for line in self._busy:
            first, rows = line.tasks[0], 0
            key = self._key_of(first)
            for task in line.tasks:
                if self._key_of(task) != key:
                    break
                rows += task.rows
            known, arrived = groups.get(key, (0, first.arrived))
            groups[key] = known + rows, min(arrived, first.arrived)
        return groups

    def drop_dead_heads(self, now: float) -> list[T]:
        """The dead in front of any line, taken out: what is in front of a line then is its oldest live task."""
        dead: list[T] = []
        for line in self._busy:
            tasks = line.tasks
            while tasks and tasks[0].is_dead(now):
                dead.append(tasks.popleft())
        if dead:
            self._removed(dead)
        return dead

    def drop_dead(self, now: float) -> list[T]:
        """All the dead, taken out."""
        dead: list[T] = []
        for line in self._busy:
            live: deque[T] = deque()
            for task in line.tasks:
                (dead if task.is_dead(now) else live).append(task)
            line.tasks = live
        if dead:
            self._removed(dead)
        return dead

    def oldest(self) -> float | None:
        """When the first of all heads arrived; None when nothing waits."""
        busy = self._busy
        if len(busy) == 1:
            return busy[0].tasks[0].arrived
        return min((line.tasks[0].arrived for line in busy), default=None)

    def push_out(self, caller: str) -> T | None:
        """Make room for a task of `caller` in a full queue: the newest task of the longest line, taken out.

        None when no line is longer than the caller's would be: then it is the caller who asks for too much.
        """
        own = self._lines.get(caller)
        longest = max(self._busy, key=lambda line: len(line.tasks), default=None)
        if longest is None or len(longest.tasks) <= (len(own.tasks) if own else 0) + 1:
            return None
        task = longest.tasks.pop()
        self._count -= 1
        self.rows -= task.rows
        return task

    def callers(self) -> list[str]:
        """Who has something waiting."""
        return [line.caller for line in self._busy]

    def tasks(self) -> list[T]:
        """Everything that waits, line by line."""
        return [task for line in self._busy for task in line.tasks]

    # -- private

    def _took(self, taken: list[T], rows: int, dead: list[T]) -> tuple[list[T], int, list[T]]:
        self._count -= len(taken)
        self.rows -= rows
        if dead:
            self._count -= len(dead)
            self.rows -= sum(task.rows for task in dead)
        return taken, rows, dead

    def _settle_first(self, line: _Line[T]) -> None:
        """Put the first line where it belongs after it was served."""
        if line.tasks:
            self._turn += 1
            line.turn = self._turn
            heapq.heapreplace(self._busy, line)
        else:
            heapq.heappop(self._busy)

    def _removed(self, dead: list[T]) -> None:
        self._count -= len(dead)
        self.rows -= sum(task.rows for task in dead)
        self._busy = [line for line in self._busy if line.tasks]
        heapq.heapify(self._busy)
        self._forget_idle()

    def _forget_idle(self) -> None:
        if not self._busy:  # nobody waits, so nobody is behind
            self._tag = 0
            if len(self._lines) == 1:
                next(iter(self._lines.values())).tag = 0
            else:
                self._lines.clear()
        elif len(self._lines) > len(self._busy) + _FORGET_AT:
            self._lines = {line.caller: line for line in self._lines.values() if line.tasks or line.tag > self._tag}


class DeviceShares:
    """Seconds of one device that each caller has used, by the same rule: the device asks it which queue is next."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._tag = 0.0

    def __repr__(self) -> str:
        return f"<DeviceShares: {len(self._used)} callers>"

    def least(self, callers: Iterable[str]) -> float:
        """The tag of the caller among these who has used least."""
        used, tag = self._used, self._tag
        return min((max(tag, used.get(caller, 0.0)) for caller in callers), default=tag)

    def charge(self, tasks: Iterable[Queued], seconds: float) -> None:
        """A batch took so long; its callers pay by rows."""
        rows: dict[str, int] = {}
        for task in tasks:
            rows[task.caller] = rows.get(task.caller, 0) + (task.rows or 1)
        row_s = seconds / sum(rows.values())
        for caller, count in rows.items():
            self._used[caller] = max(self._tag, self._used.get(caller, 0.0)) + count * row_s

    def advance(self, tag: float) -> None:
        """The caller of this tag is served now."""
        if tag > self._tag:
            self._tag = tag
            if len(self._used) > _FORGET_AT:
                self._used = {caller: used for caller, used in self._used.items() if used > tag}

    def forget(self) -> None:
        """Nothing waits: nobody is behind."""
        self._used.clear()
        self._tag = 0.0
