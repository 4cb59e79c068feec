"""How training looks while it runs: one live line on a terminal, plain lines elsewhere. Knows snapshots only."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from p2pmoe.training.loop import Snapshot

PLAIN_EVERY_S: Final = 2.0
ALIVE_EVERY_S: Final = 1.0


class TrainingDisplay(Protocol):
    """Shows snapshots while it is open."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, snapshot: Snapshot) -> None:
        """After every step."""


class LiveLine:
    """A bar with step, loss, accuracy, samples/s and experts alive, redrawn in place."""

    def __init__(self, console: Console, steps: int, alive: Callable[[], int]) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._bar = self._progress.add_task("training", total=steps, state="")
        self._alive = alive

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, snapshot: Snapshot) -> None:
        """See `TrainingDisplay`."""
        state = f"loss [bold]{snapshot.loss:.3f}[/]  accuracy [bold]{_percent(snapshot.accuracy)}[/]"
        state += f"  {snapshot.samples_per_s:.0f} samples/s  {self._alive()} experts alive"
        if snapshot.failed_steps:
            state += f"  [yellow]{snapshot.failed_steps} failed[/]"
        self._progress.update(self._bar, completed=snapshot.step, state=state)


class PlainLines:
    """A `key=value` line every few seconds, and one for the last step."""

    def __init__(
        self,
        console: Console,
        steps: int,
        alive: Callable[[], int],
        *,
        every_s: float = PLAIN_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._steps, self._alive = console, steps, alive
        self._every_s, self._clock = every_s, clock
        self._shown_at = -every_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, snapshot: Snapshot) -> None:
        """See `TrainingDisplay`."""
        now = self._clock()
        if now - self._shown_at < self._every_s and snapshot.step < self._steps:
            return
        self._shown_at = now
        self._console.print(
            f"step={snapshot.step}/{self._steps} loss={snapshot.loss:.4f} accuracy={_percent(snapshot.accuracy)} "
            f"samples_per_s={snapshot.samples_per_s:.0f} experts_alive={self._alive()} failed={snapshot.failed_steps}",
            soft_wrap=True,
            highlight=False,
        )


def open_display(console: Console, steps: int, count_alive: Callable[[], int]) -> TrainingDisplay:
    """The display that fits the console. `count_alive` is asked at most once a second."""
    alive = EverySecond(count_alive)
    if console.is_terminal:
        return LiveLine(console, steps, alive)
    return PlainLines(console, steps, alive)


class EverySecond:
    """Remembers what a costly count gave for a second."""

    def __init__(self, count: Callable[[], int], clock: Callable[[], float] = time.monotonic) -> None:
        self._count, self._clock = count, clock
        self._value, self._asked_at = 0, -ALIVE_EVERY_S

    def __call__(self) -> int:
        now = self._clock()
        if now - self._asked_at >= ALIVE_EVERY_S:
            self._value, self._asked_at = self._count(), now
        return self._value


def _percent(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{accuracy:.1%}"
