"""How training is shown."""

import io

from rich.console import Console

from p2pmoe.cli.progress import EverySecond, LiveLine, PlainLines, open_display
from p2pmoe.training.loop import Snapshot


def snapshot(step: int, accuracy: float | None = None, failed: int = 0) -> Snapshot:
    return Snapshot(step=step, loss=0.5, accuracy=accuracy, samples_per_s=1234.5, failed_steps=failed)


def test_plain_lines_come_every_few_seconds_and_for_the_last_step() -> None:
    written, now = io.StringIO(), 0.0
    display = PlainLines(Console(file=written, width=40), 4, lambda: 16, every_s=2.0, clock=lambda: now)

    with display:
        for step, now in [(1, 0.0), (2, 1.0), (3, 2.5), (4, 2.6)]:  # noqa: B007 - the clock reads it
            display.show(snapshot(step, accuracy=0.9375))

    lines = written.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["step=1/4", "step=3/4", "step=4/4"]
    assert lines[0] == "step=1/4 loss=0.5000 accuracy=93.8% samples_per_s=1234 experts_alive=16 failed=0"


def test_a_terminal_gets_a_live_line() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120)

    with open_display(console, 4, lambda: 16) as display:
        assert isinstance(display, LiveLine)
        display.show(snapshot(4, failed=2))

    for part in ("4/4", "0.500", "1234 samples/s", "16 experts alive", "2 failed"):
        assert part in written.getvalue()


def test_anything_else_gets_plain_lines() -> None:
    assert isinstance(open_display(Console(file=io.StringIO()), 4, lambda: 16), PlainLines)


def test_experts_are_counted_once_a_second() -> None:
    now, asked = 0.0, []
    alive = EverySecond(lambda: asked.append(now) or len(asked), clock=lambda: now)

    counts = []
    for now in (0.0, 0.5, 0.9, 1.0, 1.5, 2.1):  # noqa: B007 - the clock reads it
        counts.append(alive())

    assert counts == [1, 1, 1, 2, 2, 3]
