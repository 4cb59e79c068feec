"""Nodes come and go without a word, their lives exponential with a mean of 28 s; dictionaries are read meanwhile."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.dht_crowd import Crowd, SeatedNode
from p2pmoe.experts.directory import ExpertDirectory
from p2pmoe.types import Endpoint

MEAN_LIFE_S = 28.0
RUN_S = 60.0
PROVIDERS = 8
CHILDREN = 16
"""Of each provider."""
DIGEST = "ab" * 16


async def churn(nodes: int, seed: int, run_s: float = RUN_S) -> dict[str, Any]:
    """Providers stay and declare again every 20 s; all others are replaced as they die."""
    crowd = await Crowd.of(nodes, seed=seed)
    providers = crowd.nodes[:PROVIDERS]
    deaths = [0]
    tasks = [asyncio.create_task(_provide(provider, number)) for number, provider in enumerate(providers)]
    tasks += [asyncio.create_task(_maintain(provider)) for provider in providers]
    await asyncio.sleep(1.0)
    ends_at = time.monotonic() + run_s
    tasks += [asyncio.create_task(_live(crowd, node, deaths)) for node in crowd.nodes[PROVIDERS:]]
    complete, times = [], []
    while time.monotonic() < ends_at:
        reader = crowd.dice.choice(crowd.nodes)
        begin = time.perf_counter()
        found = await ExpertDirectory(reader).get_prefixes(["wide."])
        times.append(time.perf_counter() - begin)
        complete.append(len(found["wide."]) == PROVIDERS * CHILDREN)
        await asyncio.sleep(0.2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await crowd.close()
    times.sort()
    return {
        "nodes": nodes,
        "mean_life_s": MEAN_LIFE_S,
        "run_s": run_s,
        "deaths": deaths[0],
        "reads": len(complete),
        "complete_percent": round(100 * sum(complete) / len(complete), 3),
        "p50_ms": round(1e3 * times[len(times) // 2], 2),
        "p99_ms": round(1e3 * times[len(times) * 99 // 100], 2),
    }


async def _provide(provider: SeatedNode, number: int) -> None:
    directory = ExpertDirectory(provider)
    uids = {f"wide.{child}": DIGEST for child in range(number * CHILDREN, (number + 1) * CHILDREN)}
    while True:
        await directory.declare(uids, Endpoint("127.0.0.1", 1024 + number), 60)
        await asyncio.sleep(20)


async def _maintain(node: SeatedNode) -> None:
    while True:
        await asyncio.sleep(10)
        await node.server.maintain()


async def _live(crowd: Crowd, node: SeatedNode, deaths: list[int]) -> None:
    """The life of one seat: whoever sits there dies, and somebody new comes."""
    while True:
        upkeep = asyncio.create_task(_maintain(node))
        try:
            await asyncio.sleep(crowd.dice.expovariate(1 / MEAN_LIFE_S))
        finally:
            upkeep.cancel()
            await asyncio.gather(upkeep, return_exceptions=True)
        crowd.kill([node])
        deaths[0] += 1
        node = await crowd.add()
