"""hivemind's DHT and its beam search on our work; runs in an environment of its own: `python hivemind_dht.py dht`.

Each of its peers is two processes, so that 8 of them are what two cores carry. One JSON line a row.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
import uuid

import torch
from hivemind import DHT
from hivemind.moe import declare_experts, get_experts
from hivemind.moe.client.beam_search import MoEBeamSearcher
from hivemind.utils import get_dht_time

PEERS = {"dht": 8, "beam": 8}
OPERATIONS = 100
DECLARED_AT_ONCE = 64
"""More than about 900 uids in one call are too much for the pipe to its process."""


def open_peers(count: int) -> list[DHT]:
    peers: list[DHT] = []
    for _ in range(count):
        known = random.sample(peers, min(3, len(peers)))
        addresses = [address for peer in known for address in peer.get_visible_maddrs()]
        peers.append(DHT(initial_peers=addresses, start=True))
    return peers


def timed(function) -> tuple[float, object]:
    begin = time.perf_counter()
    answer = function()
    return 1e3 * (time.perf_counter() - begin), answer


def percentiles(name: str, times_ms: list[float]) -> dict[str, float]:
    ordered = sorted(times_ms)
    p99 = ordered[max(0, -(-99 * len(ordered) // 100) - 1)]
    return {f"{name}_p50_ms": round(statistics.median(ordered), 2), f"{name}_p99_ms": round(p99, 2)}


def emit(row: str, peers: list[DHT], **figures: object) -> None:
    print(json.dumps({"row": row, "nodes": len(peers), **figures}), flush=True)


def declare(peer: DHT, uids: list[str]) -> None:
    for start in range(0, len(uids), DECLARED_AT_ONCE):
        declare_experts(peer, uids[start : start + DECLARED_AT_ONCE], expiration_time=get_dht_time() + 3600)


def measure_dht(peers: list[DHT]) -> None:
    puts, gets, found = [], [], 0
    for _ in range(OPERATIONS):
        key = uuid.uuid4().hex
        writer, reader = random.sample(peers, 2)
        took, _ = timed(lambda: writer.store(key, "value", expiration_time=get_dht_time() + 300))  # noqa: B023
        puts.append(took)
        took, value = timed(lambda: reader.get(key))  # noqa: B023
        gets.append(took)
        found += value is not None and value.value == "value"
    found_percent = 100 * found / OPERATIONS
    emit("quiet", peers, **percentiles("put", puts), **percentiles("get", gets), found_percent=found_percent)
    uids = [f"grid.{i}.{j}" for i in range(32) for j in range(32)]
    took, _ = timed(lambda: declare(peers[0], uids))
    emit("declare_1024", peers, p50_ms=round(took, 1))
    took, experts = timed(lambda: get_experts(peers[1], uids))
    emit("find_1024", peers, p50_ms=round(took, 1), found=sum(expert is not None for expert in experts))


def measure_beam(peers: list[DHT]) -> None:
    for number, peer in enumerate(peers):
        declare(peer, [f"ffn.{i}.{j}" for i in range(number, 64, len(peers)) for j in range(64)])
    known = peers[0].get_visible_maddrs()
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(32, 64, generator=generator).numpy() for _ in range(2)]
    cold, warm = [], []
    for _ in range(3):
        fresh = DHT(initial_peers=known, start=True)
        searcher = MoEBeamSearcher(fresh, "ffn.", (64, 64))
        cold.append(timed(lambda: searcher.batch_find_best_experts(scores, 4))[0])  # noqa: B023
        for _ in range(5):
            took, best = timed(lambda: searcher.batch_find_best_experts(scores, 4))  # noqa: B023
            warm.append(took)
        fresh.shutdown()
    found = sum(map(len, best))
    medians = {"cold_ms": round(statistics.median(cold), 1), "warm_ms": round(statistics.median(warm), 1)}
    emit("beam", peers, grid=[64, 64], beam=4, batch=32, **medians, found=found, of=32 * 4)


if __name__ == "__main__":
    random.seed(0)
    mode = sys.argv[1]
    crowd = open_peers(PEERS[mode])
    {"dht": measure_dht, "beam": measure_beam}[mode](crowd)
    for each in crowd:
        each.shutdown()
