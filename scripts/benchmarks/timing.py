"""Medians of repeats, alternated with a baseline. Knows nothing of what is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

Function = Callable[[], Any]


def seconds_per_call(function: Function, *, budget_s: float, least: int = 5, most: int = 2000) -> list[float]:
    """Durations of repeated calls, until the budget is used up."""
    durations: list[float] = []
    begin = time.perf_counter()
    while len(durations) < least or (time.perf_counter() - begin < budget_s and len(durations) < most):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return durations


def compare(ours: Function, baseline: Function, *, repeats: int, budget_s: float, warmup: int = 3) -> dict[str, Any]:
    """Medians (ms) of both, taken in turn, and the median of the ratios of neighbouring repeats."""
    for _ in range(warmup):
        ours()
        baseline()
    our_medians, base_medians = [], []
    for _ in range(repeats):
        base_medians.append(statistics.median(seconds_per_call(baseline, budget_s=budget_s)))
        our_medians.append(statistics.median(seconds_per_call(ours, budget_s=budget_s)))
    ratios = [a / b for a, b in zip(our_medians, base_medians, strict=True)]
    return {
        "p50_ms": round(statistics.median(our_medians) * 1e3, 3),
        "baseline_p50_ms": round(statistics.median(base_medians) * 1e3, 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "repeats": repeats,
    }
