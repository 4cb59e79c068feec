"""Whose fault a failed batch is: how it is parted, and who is known for it. Synchronous; knows no devices.

Rules:
1. A batch that raised is computed again in two parts, and so on, until each culprit is alone and fails alone.
2. Callers who were culprits lately are parted from the others first; else the batch is cut in the middle.
3. After `MAX_FAILED_PARTS` failures of one batch each call that is left is computed alone. So a batch of n calls costs
   at most 7 times its rows and n + 63 passes, however many of its calls are bad; where one is, 2 log n + 1 passes.
4. A caller who was a culprit again and again is taken out of the batches of others before they are computed, and waits
   until nothing else does, up to `MAX_PATIENCE_S`. `FORGIVEN_AFTER_S` without a fault, and it is forgotten.
5. When every call of a batch failed it is the expert's fault, and nobody is remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from p2pmoe.server.task_pool import Batch, Task

MAX_FAILED_PARTS: Final = 32
MAX_CULPRITS: Final = 256
"""Callers remembered; the one whose last fault is longest ago is forgotten first."""
FORGIVEN_AFTER_S: Final = 60.0
MAX_PATIENCE_S: Final = 2.0
_FIRST_PATIENCE_S: Final = 0.05
_MAX_FAULTS: Final = 16


class Culprits:
    """Callers whose calls failed where those of others went through."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: OrderedDict[str, tuple[int, float]] = OrderedDict()  # faults, and when the last one was

    def __repr__(self) -> str:
        return f"<Culprits: {len(self._known)} callers>"

    def blame(self, caller: str) -> None:
        """One more batch failed because of this caller."""
        faults, _ = self._known.pop(caller, (0, 0.0))
        self._known[caller] = min(faults + 1, _MAX_FAULTS), self._clock()
        if len(self._known) > MAX_CULPRITS:
            self._known.popitem(last=False)

    def faults(self, caller: str) -> int:
        """How many batches failed because of a caller; 0 when that is forgotten."""
        if not self._known:
            return 0
        faults, last = self._known.get(caller, (0, 0.0))
        if faults and self._clock() - last > FORGIVEN_AFTER_S:
            del self._known[caller]
            return 0
        return faults

    def part(self, tasks: list[Task]) -> tuple[list[Task], list[Task]]:
        """Tasks of callers who are known for nothing, and the others."""
        if not self._known:
            return tasks, []
        suspects = {caller for caller in {task.caller for task in tasks} if self.faults(caller)}
        if not suspects:
            return tasks, []
        return (
            [task for task in tasks if task.caller not in suspects],
            [task for task in tasks if task.caller in suspects],
        )

    def patience_s(self, tasks: Iterable[Task]) -> float:
        """How long tasks of culprits may be kept waiting for others: the more faults, the longer."""
        faults = max((self.faults(task.caller) for task in tasks), default=0)
        return min(MAX_PATIENCE_S, _FIRST_PATIENCE_S * 2.0 ** (faults - 1)) if faults else 0.0


class Parting:
    """What is left to compute of one failed batch."""

    def __init__(self, culprits: Culprits) -> None:
        self._culprits = culprits
        self._left: list[Batch] = []  # the next one last
        self._failed = 0
        self.failed_alone: list[Task] = []
        self.succeeded = False
        """Whether any call of the batch went through."""

    def next(self) -> Batch | None:
        """The part to compute now; None when there is no more."""
        return self._left.pop() if self._left else None

    def cut(self, batch: Batch) -> None:
        """A batch of several calls failed: compute it in parts."""
        self._failed += 1
        if self._failed >= MAX_FAILED_PARTS:
            self.add([batch.part([task]) for task in batch.tasks])
            return
        others, suspects = self._culprits.part(batch.tasks)
        if not others or not suspects:
            half = len(batch.tasks) // 2
            others, suspects = batch.tasks[:half], batch.tasks[half:]
        self.add([batch.part(others), batch.part(suspects)])

    def add(self, parts: Iterable[Batch]) -> None:
        """Compute these next, in this order."""
        self._left.extend(reversed(list(parts)))

    def blame(self) -> list[Task]:
        """The calls that failed where others went through; their callers are remembered."""
        if not self.succeeded or not self.failed_alone:
            return []
        for caller in {task.caller for task in self.failed_alone}:
            self._culprits.blame(caller)
        return self.failed_alone
