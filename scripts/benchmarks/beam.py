"""Beam search for a batch: 64×64 experts declared on 32 DHT nodes of another process, beam 4, batch 32.

Cold is the first search of a client that has just joined; warm is a search of other scores with everything cached.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import p2pmoe
from benchmarks.dht import judged
from benchmarks.hivemind_rows import hivemind_rows
from benchmarks.tensor_path import child
from p2pmoe.client.beam_search import BeamSearch, MaskCache
from p2pmoe.experts.directory import Provider
from p2pmoe.types import Endpoint, PeerId

Emit = Callable[..., None]
GRID, BEAM, BATCH, NODES, SEED = (64, 64), 4, 32, 32, 20
WARM_SEARCHES = 50
LARGE_GRIDS = ((1024, 1024), (256, 256, 256), (1024, 1024, 1024, 1024))


def beam(emit: Emit, repeats: int, hivemind: str | None = None) -> None:
    generator = torch.Generator().manual_seed(SEED)
    cold, warm, complete = [], [], 0
    with child([sys.executable, "-m", "benchmarks.dht_crowd", json.dumps({"nodes": NODES, "grid": GRID})]) as line:
        told = json.loads(line)
        for _ in range(repeats):
            with p2pmoe.Swarm(initial_peers=[told["dht_address"]], swarm_id=told["swarm_id"]) as swarm:
                mixture = p2pmoe.RemoteMixtureOfExperts(
                    swarm, in_features=8, grid_size=GRID, uid_prefix="ffn", k_best=BEAM, beam_size=BEAM
                )
                seconds, _ = _search(mixture, generator)
                cold.append(seconds)
                # Rows that no beam has stood on yet are read now, so that what follows is warm.
                for _ in range(5):
                    _search(mixture, generator)
                for _ in range(WARM_SEARCHES):
                    seconds, found = _search(mixture, generator)
                    warm.append(seconds)
                    complete += int(found.valid.sum())
    figures = {
        "cold_ms": round(1e3 * statistics.median(cold), 2),
        "warm_ms": round(1e3 * statistics.median(warm), 3),
        "warm_p99_ms": round(1e3 * sorted(warm)[len(warm) * 99 // 100], 3),
        "found_percent": round(100 * complete / (len(warm) * BATCH * BEAM), 3),
    }
    demand = judged(figures, at_most={"cold_ms": 400, "warm_ms": 5}, at_least={"found_percent": 100})
    emit(case="beam", grid=GRID, nodes=NODES, beam=BEAM, batch=BATCH, seed=SEED, repeats=repeats, **figures, **demand)
    for grid in LARGE_GRIDS:
        emit(case="beam_large_grid", grid=grid, beam=BEAM, batch=BATCH, seed=SEED, **_large(grid, generator))
    if hivemind:
        for figures_of_theirs in hivemind_rows(hivemind, "beam", 150):
            emit(case="beam", system="hivemind", **figures_of_theirs)


def _search(mixture: Any, generator: torch.Generator) -> tuple[float, Any]:
    scores = [torch.randn(BATCH, size, generator=generator) for size in mixture.grid_size]
    begin = time.perf_counter()
    found = mixture._drive(mixture._search(scores), 30.0)  # noqa: SLF001 - the search without the calls that follow it
    return time.perf_counter() - begin, found


def _large(grid: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    """A full grid of which all prefixes are known: what the search itself costs. The first search makes the masks."""
    somebody = (Provider(PeerId("a" * 32), Endpoint("127.0.0.1", 1), "ab", 0.0, 0),)
    levels = [dict.fromkeys(range(size), somebody) for size in grid]
    masks, times, prefixes = MaskCache(), [], 0
    for _ in range(20):
        scores = [torch.randn(BATCH, size, generator=generator) for size in grid]
        begin = time.perf_counter()
        search, prefixes = BeamSearch(scores, "ffn", BEAM, masks), 0
        while wanted := search.wanted():
            prefixes += len(wanted)
            children = levels[wanted[0].count(".") - 1]
            search.advance(dict.fromkeys(wanted, children))
        times.append(time.perf_counter() - begin)
    return {
        "first_ms": round(1e3 * times[0], 2),
        "p50_ms": round(1e3 * statistics.median(times), 2),
        "prefixes": prefixes,
    }
