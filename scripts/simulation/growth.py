"""How figures grow with the number of nodes: a line over its logarithm, and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def fit(nodes: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Least squares of `value = intercept + per_doubling · log2(nodes)`, with r²."""
    xs = [math.log2(count) for count in nodes]
    mean_x, mean_y = sum(xs) / len(xs), sum(values) / len(values)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, values, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    left = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, values, strict=True))
    total = sum((y - mean_y) ** 2 for y in values)
    r_squared = 1 - left / total if total else 1.0
    return {"per_doubling": round(slope, 4), "intercept": round(intercept, 4), "r_squared": round(r_squared, 4)}


def plot(rows: Sequence[dict[str, Any]], fits: dict[str, dict[str, float]], path: Path) -> None:
    """Hops, requests, latency and success against the number of nodes, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    nodes = [row["nodes"] for row in rows]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    panels = (
        ("hops", ["hops"]),
        ("requests of a look-up", ["requests"]),
        ("latency of a get, ms (virtual)", ["p50_ms", "p90_ms", "p99_ms"]),
        ("gets that found the record, %", ["success_percent"]),
    )
    for axis, (title, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            axis.plot(nodes, [row[name] for row in rows], marker="o", label=name)
            if name in fits:
                line = [fits[name]["intercept"] + fits[name]["per_doubling"] * math.log2(count) for count in nodes]
                axis.plot(nodes, line, linestyle="--", label=f"logarithmic, r² {fits[name]['r_squared']:.3f}")
        axis.set(title=title, xscale="log", xlabel="nodes", ylim=(0, 105 if names == ["success_percent"] else None))
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
