"""The stock `kademlia` package on the DHT's work. Its timeout is 5 s: each row's time is bounded."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

from kademlia.crawling import NodeSpiderCrawl
from kademlia.network import Server
from kademlia.node import Node
from kademlia.utils import digest

ROW_S = 20.0
"""No operation starts later than this in a row."""
OPERATIONS = 100


class StockCrowd:
    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.nodes: list[Server] = []
        self.loss = 0.0
        self.delay_s = 0.0

    async def open(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        for number in range(count):
            node = Server(node_id=digest(f"{number}"))
            node.transport, node.protocol = await loop.create_datagram_endpoint(
                node._create_protocol,  # noqa: SLF001 - `listen` cannot say which port it got, and starts timers
                local_addr=("127.0.0.1", 0),
            )
            node.transport.sendto = self._line(node.transport.sendto)  # type: ignore[method-assign]
            if self.nodes:
                peer = self.dice.choice(self.nodes)
                await node.bootstrap([peer.transport.get_extra_info("sockname")])
            self.nodes.append(node)

    def _line(self, straight: Any) -> Any:
        def send(data: bytes, address: Any) -> None:
            if self.dice.random() < self.loss:
                return
            if self.delay_s:
                asyncio.get_running_loop().call_later(self.delay_s, straight, data, address)
            else:
                straight(data, address)

        return send

    def kill(self, share: float) -> None:
        victims = self.dice.sample(self.nodes, round(share * len(self.nodes)))
        for victim in victims:
            victim.transport.close()
        self.nodes = [node for node in self.nodes if node not in victims]

    async def close(self) -> None:
        for node in self.nodes:
            node.transport.close()
        await asyncio.sleep(0)


async def measure(nodes: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """`(row, figures)` of what the package can be asked at all."""
    logging.getLogger("kademlia").setLevel(logging.CRITICAL)
    logging.getLogger("rpcudp").setLevel(logging.CRITICAL)
    return [row async for row in _rows(nodes, seed)]


async def _rows(nodes: int, seed: int) -> Any:
    crowd = StockCrowd(seed)
    await crowd.open(nodes)
    yield "quiet", await _put_and_get(crowd, "quiet")
    yield "recall", await _recall(crowd)
    yield "prefix_of_256", await _dictionary(crowd)
    crowd.delay_s = 0.04
    yield "rtt_80ms", await _put_and_get(crowd, "delay")
    crowd.delay_s, crowd.loss = 0.0, 0.2
    yield "loss_20", await _put_and_get(crowd, "loss")
    crowd.loss = 0.0
    names = [f"killed{number}" for number in range(OPERATIONS)]
    for name in names:
        await crowd.nodes[0].set(name, "value")
    crowd.kill(0.3)
    yield "killed_30", await _get_only(crowd, names)
    await crowd.close()


def _in_time(work: Iterable[Any]) -> Iterator[Any]:
    ends_at = time.monotonic() + ROW_S
    for each in work:
        if time.monotonic() > ends_at:
            return
        yield each


async def _put_and_get(crowd: StockCrowd, name: str) -> dict[str, Any]:
    puts, gets, found = [], [], 0
    for number in _in_time(range(OPERATIONS)):
        writer, reader = crowd.dice.sample(crowd.nodes, 2)
        begin = time.perf_counter()
        await writer.set(f"{name}{number}", "value")
        puts.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        found += await reader.get(f"{name}{number}") == "value"
        gets.append(time.perf_counter() - begin)
    return {
        "nodes": len(crowd.nodes),
        **_percentiles("put", puts),
        **_percentiles("get", gets),
        "found_percent": round(100 * found / len(gets), 2),
        "operations": len(gets),
    }


async def _get_only(crowd: StockCrowd, names: list[str]) -> dict[str, Any]:
    gets, found = [], 0
    for name in _in_time(names):
        begin = time.perf_counter()
        found += await crowd.dice.choice(crowd.nodes).get(name) == "value"
        gets.append(time.perf_counter() - begin)
    figures = {"found_percent": round(100 * found / len(gets), 2), "operations": len(gets)}
    return {"nodes": len(crowd.nodes), **_percentiles("get", gets), **figures}


async def _recall(crowd: StockCrowd, lookups: int = 100, width: int = 8) -> dict[str, Any]:
    hits = 0
    for number in _in_time(range(lookups)):
        asker, target = crowd.dice.choice(crowd.nodes), Node(digest(f"recall{number}"))
        nearest = asker.protocol.router.find_neighbors(target)
        crawl = NodeSpiderCrawl(asker.protocol, target, nearest, asker.ksize, asker.alpha)
        found = {node.id for node in (await crawl.find())[:width]}
        others = [node.node for node in crowd.nodes if node is not asker]
        hits += len(found & {node.id for node in sorted(others, key=target.distance_to)[:width]})
    total = (number + 1) * width
    return {"nodes": len(crowd.nodes), "hits": hits, "of": total, "recall_percent": round(100 * hits / total, 3)}


async def _dictionary(crowd: StockCrowd, providers: int = 16, children: int = 256) -> dict[str, Any]:
    """One value holds the prefix's children; every provider reads it, adds its own and writes it back."""
    each = children // providers

    async def add(node: Server, number: int) -> None:
        held = json.loads(await node.get("wide") or "{}")
        held |= {str(child): f"127.0.0.1:{1024 + number}" for child in range(number * each, (number + 1) * each)}
        await node.set("wide", json.dumps(held))

    writers = crowd.dice.sample(crowd.nodes, providers)
    await asyncio.gather(*(add(node, number) for number, node in enumerate(writers)), return_exceptions=True)
    begin = time.perf_counter()
    found = json.loads(await crowd.dice.choice(crowd.nodes).get("wide") or "{}")
    return {"children": len(found), "of": children, "p50_ms": round(1e3 * (time.perf_counter() - begin), 2)}


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    p50, p99 = ordered[(len(ordered) - 1) // 2], ordered[max(0, -(-99 * len(ordered) // 100) - 1)]
    return {f"{name}_p50_ms": round(1e3 * p50, 2), f"{name}_p99_ms": round(1e3 * p99, 2)}
