"""What TLS costs: the same calls to two nodes, one over TLS 1.3 with a pinned key, one over plain HTTP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.tensor_path import server, swarm_for
from benchmarks.timing import compare

Emit = Callable[..., None]
SHAPES = ((1, 16, 0.7), (2048, 1024, 1.0))


def tls(emit: Emit, repeats: int, device: str) -> None:
    for rows, dim, budget_s in SHAPES:
        spec: dict[str, Any] = {"experts": {"nop.0": ["nop", dim]}, "device": device}
        with (
            server(**spec, tls=True) as secure,
            server(**spec) as plain,
            swarm_for(secure) as over_tls,
            swarm_for(plain) as over_http,
            torch.no_grad(),
        ):
            x = torch.randn(rows, dim)
            calls = [partial(swarm.expert("nop.0"), x) for swarm in (over_tls, over_http)]
            figures = compare(calls[0], calls[1], repeats=max(5, repeats), budget_s=budget_s, warmup=20)
        demand: dict[str, float] = {"demand_ratio": 1.5}
        if rows > 1:
            # One call at a time: throughput is the inverse of its duration.
            bytes_moved = 2 * 4 * rows * dim
            demand = {
                "throughput_ratio": round(1 / figures["ratio"], 3),
                "demand_throughput_ratio_at_least": 0.6,
                "mb_per_s": round(bytes_moved / figures["p50_ms"] / 1e3, 1),
                "baseline_mb_per_s": round(bytes_moved / figures["baseline_p50_ms"] / 1e3, 1),
            }
        emit(case="tls_nop", shape=[rows, dim], baseline="plain HTTP", **figures, **demand)
