"""The DHT's demands, row by row: 128 nodes on one loop; loss and delay by the shipped `BadLine`; everything seeded.

Each line has the figures, the demand and whether it was met. Stock kademlia does the same work beside ours
(`dht_stock.py`), and hivemind's DHT where a Python with it is given (`hivemind_dht.py`).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import dht_abuse, dht_churn, dht_stock
from benchmarks.dht_crowd import Crowd, SeatedNode, side_by_side
from benchmarks.hivemind_rows import hivemind_rows
from p2pmoe.dht.bad_line import BadLine
from p2pmoe.experts.directory import ExpertDirectory
from p2pmoe.protocol.records import key_of
from p2pmoe.types import Endpoint

Emit = Callable[..., None]
NODES = 128
SEED = 20
KILLED_KEYS = 1000
DIGEST = "ab" * 16
PROVIDERS, CHILDREN = 16, 256


def dht(emit: Emit, repeats: int, hivemind: str | None = None, nodes: int = NODES) -> None:
    def row(name: str, figures: dict[str, Any], **demand: Any) -> None:
        emit(case="dht", row=name, seed=SEED, **figures, **judged(figures, **demand))

    asyncio.run(_ours(row, repeats, nodes))
    for name, figures in asyncio.run(dht_stock.measure(nodes, SEED)):
        emit(case="dht", row=name, system="kademlia, stock", seed=SEED, **figures)
    if hivemind:
        for figures in hivemind_rows(hivemind, "dht", 150):
            emit(case="dht", system="hivemind", **figures)


def judged(
    figures: dict[str, Any], *, at_most: dict[str, float] | None = None, at_least: dict[str, float] | None = None
) -> dict[str, Any]:
    """The demand in words, and whether the figures meet it. A figure that could not be had is no failure."""
    at_most, at_least = at_most or {}, at_least or {}
    demand = {name: f"<= {limit}" for name, limit in at_most.items()}
    demand |= {name: f">= {limit}" for name, limit in at_least.items()}
    met = all(figures[name] is None or figures[name] <= limit for name, limit in at_most.items())
    met = met and all(figures[name] is None or figures[name] >= limit for name, limit in at_least.items())
    return {"demand": demand, "met": met} if demand else {}


async def _ours(row: Callable[..., None], repeats: int, nodes: int) -> None:
    await _quiet_rows(row, repeats, nodes)
    await _killed(row, nodes, share=0.3, rtt_s=0.0, p99_ms=300, found=99.9)
    await _killed(row, nodes, share=0.3, rtt_s=0.08, p99_ms=500, found=99.9)
    await _killed(row, nodes, share=0.5, rtt_s=0.0, p99_ms=1500, found=99.0)
    await _loss(row, nodes)
    figures = await dht_churn.churn(nodes // 2, SEED)
    row("churn", figures, at_least={"complete_percent": 99.0})
    figures = await dht_abuse.fuzz(SEED)
    row("fuzz", figures, at_most={"loop_errors": 0}, at_least={"transport_alive": 1, "still_finds": 1})
    figures = await dht_abuse.stall(32, SEED)
    row("loop_stall", figures, at_most={"contacts_evicted": 0, "missed_requests": 0})


# --- nobody dies ------------------------------------------------------------------------------------------------


async def _quiet_rows(row: Callable[..., None], repeats: int, nodes: int) -> None:
    crowd = await Crowd.of(nodes, seed=SEED)
    figures = {"nodes": nodes, **await _put_and_get(crowd, repeats, 100)}
    row("quiet", figures, at_most={**_limits("put", 15, 40), **_limits("get", 10, 30), **_limits("quick", 8, 20)})
    row("recall", await _recall(crowd), at_least={"recall_percent": 99.9})
    figures = await _prefix(crowd, repeats)
    limits = {"pages": 4, "datagrams": 80, "p50_ms": 25}
    row("prefix_of_256", figures, at_most=limits, at_least={"children": CHILDREN})
    declared, found = await _declare_and_find(crowd, repeats)
    row("declare_1024", declared, at_most={"p50_ms": 400, "datagrams": 2500, "kernel_drops": 0})
    row("find_1024", found, at_most={"p50_ms": 400, "datagrams": 1500}, at_least={"found": 1024})
    crowd.fit(BadLine(seed=SEED, delay_s=0.04))
    await _put_and_get(crowd, 1, 20)  # the round trips are learned anew
    figures = {"nodes": nodes, **await _put_and_get(crowd, repeats, 30)}
    row("rtt_80ms", figures, at_most={"put_p50_ms": 600, "get_p50_ms": 400, "quick_p50_ms": 150})
    await crowd.close()


async def _put_and_get(crowd: Crowd, repeats: int, count: int) -> dict[str, Any]:
    """Medians over the repeats of each repeat's p50 and p99, one operation at a time."""
    figures: dict[str, list[float]] = {}
    found = asked = 0
    for repeat in range(repeats):
        times: dict[str, list[float]] = {"put": [], "get": [], "quick": []}
        for number in range(count):
            writer, *readers = crowd.dice.sample(crowd.nodes, 3)
            prefix = f"k{repeat}x{number}x{time.monotonic_ns()}."
            begin = time.perf_counter()
            await writer.put(prefix, [b"value"])
            times["put"].append(time.perf_counter() - begin)
            for reader, name in zip(readers, ("get", "quick"), strict=True):
                begin = time.perf_counter()
                found += len(await reader.get(prefix, quick=name == "quick"))
                asked += 1
                times[name].append(time.perf_counter() - begin)
        for name, each in times.items():
            figures.setdefault(f"{name}_p50_ms", []).append(percentile_ms(each, 50))
            figures.setdefault(f"{name}_p99_ms", []).append(percentile_ms(each, 99))
    medians = {name: round(statistics.median(each), 2) for name, each in figures.items()}
    return {**medians, "found_percent": 100 * found / asked, "operations": count, "repeats": repeats}


async def _recall(crowd: Crowd, lookups: int = 1800, width: int = 8) -> dict[str, Any]:
    hits = 0
    for number in range(lookups):
        asker, key = crowd.dice.choice(crowd.nodes), key_of("recall", str(number))
        found = [contact.node_id for contact in await asker.server.find_nearest(key, width)][:width]
        hits += len(set(found) & set(crowd.nearest(key, width, but=asker)))
    total = lookups * width
    return {"nodes": len(crowd.nodes), "hits": hits, "of": total, "recall_percent": round(100 * hits / total, 4)}


async def declare_prefix(crowd: Crowd, name: str) -> list[SeatedNode]:
    """256 children of one prefix, 16 by each of 16 providers."""
    providers = crowd.dice.sample(crowd.nodes, PROVIDERS)
    each = CHILDREN // PROVIDERS
    for number, provider in enumerate(providers):
        uids = {f"{name}.{child}": DIGEST for child in range(number * each, (number + 1) * each)}
        await ExpertDirectory(provider).declare(uids, Endpoint("127.0.0.1", 1024 + number), 600)
    return providers


async def _prefix(crowd: Crowd, repeats: int) -> dict[str, Any]:
    await declare_prefix(crowd, "wide")
    times, datagrams, children = [], [], []
    for _ in range(4 * repeats):
        reader = ExpertDirectory(crowd.dice.choice(crowd.nodes))
        before, begin = crowd.datagrams, time.perf_counter()
        found = await reader.get_prefixes(["wide."])
        times.append(time.perf_counter() - begin)
        children.append(len(found["wide."]))
        await asyncio.sleep(0.02)  # answers that nobody waited for, and repairs, count too
        datagrams.append(crowd.datagrams - before)
    view = max(
        (node.server.storage.view(key_of("bench", "wide."), time.time()) for node in crowd.nodes),
        key=lambda each: each.page_count,
    )
    return {
        "children": min(children),
        "providers": PROVIDERS,
        "pages": view.page_count,
        "datagrams": statistics.median(datagrams),
        "p50_ms": percentile_ms(times, 50),
        "max_ms": percentile_ms(times, 100),
        "repeats": len(times),
    }


async def _declare_and_find(crowd: Crowd, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    declared, found, datagrams, read_datagrams, counts = [], [], [], [], []
    drops_before = crowd.kernel_drops
    for repeat in range(repeats):
        name = f"grid{repeat}"
        author, reader = crowd.dice.sample(crowd.nodes, 2)
        uids = {f"{name}.{i}.{j}": DIGEST for i in range(32) for j in range(32)}
        before, begin = crowd.datagrams, time.perf_counter()
        await ExpertDirectory(author).declare(uids, Endpoint("127.0.0.1", 1), 600)
        declared.append(time.perf_counter() - begin)
        await asyncio.sleep(0.05)
        datagrams.append(crowd.datagrams - before)
        before, begin = crowd.datagrams, time.perf_counter()
        counts.append(len(await ExpertDirectory(reader).find_experts(f"{name}.*")))
        found.append(time.perf_counter() - begin)
        await asyncio.sleep(0.05)
        read_datagrams.append(crowd.datagrams - before)
    drops = crowd.kernel_drops
    written = {
        "p50_ms": percentile_ms(declared, 50),
        "max_ms": percentile_ms(declared, 100),
        "datagrams": statistics.median(datagrams),
        "kernel_drops": None if drops is None else drops - (drops_before or 0),
        "repeats": repeats,
    }
    read = {
        "found": min(counts),
        "p50_ms": percentile_ms(found, 50),
        "max_ms": percentile_ms(found, 100),
        "datagrams": statistics.median(read_datagrams),
        "repeats": repeats,
    }
    return written, read


# --- nodes die, datagrams are lost ------------------------------------------------------------------------------


async def _killed(
    row: Callable[..., None], nodes: int, *, share: float, rtt_s: float, p99_ms: float, found: float
) -> None:
    """1,000 keys are put, then a share of the nodes dies at once, then every key is read by a random survivor."""
    crowd = await Crowd.of(nodes, seed=SEED)
    if rtt_s:
        crowd.fit(BadLine(seed=SEED, delay_s=rtt_s / 2))
    victims = crowd.dice.sample(crowd.nodes, round(share * nodes))
    survivors = [node for node in crowd.nodes if node not in victims]
    prefixes = [f"key{number}." for number in range(KILLED_KEYS)]
    authors = [crowd.dice.choice(survivors) for _ in prefixes]
    await _put_all(authors, prefixes)
    crowd.kill(victims)
    figures = {"nodes": nodes, "killed_percent": 100 * share, "rtt_ms": 1e3 * rtt_s}
    figures |= await _read_all(crowd, prefixes)
    demand: dict[str, Any] = {"at_most": {"p99_ms": p99_ms}, "at_least": {"found_percent": found}}
    if share >= 0.5:
        await _put_all(authors, prefixes)
        figures["found_after_refresh_percent"] = (await _read_all(crowd, prefixes))["found_percent"]
        demand["at_least"]["found_after_refresh_percent"] = 100
    row(f"killed_{100 * share:.0f}" + ("_rtt_80ms" if rtt_s else ""), figures, **demand)
    await crowd.close()


async def _put_all(authors: Sequence[SeatedNode], prefixes: Sequence[str]) -> None:
    def put(author: SeatedNode, prefix: str) -> Callable[[], Any]:
        return lambda: author.put(prefix, [b"value"], 600)

    await side_by_side(16, [put(*each) for each in zip(authors, prefixes, strict=True)])


async def _read_all(crowd: Crowd, prefixes: Sequence[str], *, concurrency: int = 4) -> dict[str, Any]:
    times: list[float] = []
    found: list[bool] = []

    def read(prefix: str) -> Callable[[], Any]:
        async def once() -> None:
            begin = time.perf_counter()
            found.append(bool(await crowd.dice.choice(crowd.nodes).get(prefix)))
            times.append(time.perf_counter() - begin)

        return once

    await side_by_side(concurrency, [read(prefix) for prefix in prefixes])
    return {
        "found_percent": round(100 * sum(found) / len(found), 3),
        "p50_ms": percentile_ms(times, 50),
        "p99_ms": percentile_ms(times, 99),
        "keys": len(prefixes),
        "concurrency": concurrency,
    }


async def _loss(row: Callable[..., None], nodes: int) -> None:
    crowd = await Crowd.of(nodes, seed=SEED)
    crowd.fit(BadLine(seed=SEED, loss=0.2))
    prefixes = [f"key{number}." for number in range(300)]
    await _put_all([crowd.dice.choice(crowd.nodes) for _ in prefixes], prefixes)
    await declare_prefix(crowd, "wide")
    figures = {"nodes": nodes, "loss_percent": 20, **await _read_all(crowd, prefixes)}
    complete = []
    for _ in range(50):
        found = await ExpertDirectory(crowd.dice.choice(crowd.nodes)).get_prefixes(["wide."])
        complete.append(len(found["wide."]) == CHILDREN)
    figures |= {"dictionaries_complete": sum(complete), "dictionaries": len(complete)}
    limits = {"found_percent": 100, "dictionaries_complete": len(complete)}
    row("loss_20", figures, at_most={"p99_ms": 400}, at_least=limits)
    await crowd.close()


# --- figures ----------------------------------------------------------------------------------------------------


def percentile_ms(seconds: Sequence[float], percent: int) -> float:
    """By nearest rank, in milliseconds."""
    ordered = sorted(seconds)
    rank = max(0, -(-percent * len(ordered) // 100) - 1)
    return round(1e3 * ordered[rank], 2)


def _limits(name: str, p50_ms: float, p99_ms: float) -> dict[str, float]:
    return {f"{name}_p50_ms": p50_ms, f"{name}_p99_ms": p99_ms}
