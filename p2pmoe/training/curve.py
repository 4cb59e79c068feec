"""The loss curve as a PNG. Knows a history; draws without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from p2pmoe.training.loop import History

_LOSS, _ACCURACY = "#2563ab", "#c2571a"


def draw_curve(history: History, title: str, path: Path) -> None:
    """Loss of every step with its moving average on the left, held-out accuracy on the right."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(history.steps, history.losses, color=_LOSS, alpha=0.25, linewidth=0.8)
    axes.plot(history.steps, moving_average(history.losses), color=_LOSS, label="training loss")
    axes.set(xlabel="step", ylabel="loss", title=title, ylim=(0, None))
    axes.grid(alpha=0.2)
    right = axes.twinx()
    right.plot(*zip(*history.accuracies, strict=True), color=_ACCURACY, marker="o", markersize=3, label="accuracy")
    right.set(ylabel="held-out accuracy", ylim=(0, 1))
    lines = [*axes.lines[1:], *right.lines]
    axes.legend(handles=lines, loc="center right", frameon=False)
    figure.savefig(path)


def moving_average(values: Sequence[float], share: float = 0.25) -> list[float]:
    """Exponential, started at the first value."""
    averages: list[float] = []
    for value in values:
        averages.append(value if not averages else averages[-1] + share * (value - averages[-1]))
    return averages
