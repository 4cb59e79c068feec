"""Many DHT nodes on one event loop, seeded: what the DHT's cases are measured on. Also a process of its own.

`python -m benchmarks.dht_crowd '{"nodes": 32, "grid": [64, 64]}'` opens nodes, has them declare the grid's experts,
prints an address for `--initial-peers` and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from p2pmoe.config import DHTConfig
from p2pmoe.dht.addresses import bind
from p2pmoe.dht.bad_line import BadLine
from p2pmoe.dht.node import DHTNode
from p2pmoe.experts.directory import ExpertDirectory
from p2pmoe.identity import Identity
from p2pmoe.protocol.datagrams import Address
from p2pmoe.types import Endpoint

T = TypeVar("T")
SWARM_ID = "bench"
CONFIG = DHTConfig(swarm_id=SWARM_ID, max_source_bytes_per_s=1e9)
"""Hundreds of nodes' work passes between a few sockets of one machine: the byte budget is not what is measured."""


class SeatedNode(DHTNode):
    """A DHT node on the loop that runs already, instead of on a thread of its own."""

    async def open(self) -> Self:
        """Bind to loopback and serve."""
        sock = bind("127.0.0.1", 0)
        self._address = sock.getsockname()[:2]
        await self.server.open(sock)
        self.straight = self.server.protocol.transmit
        return self

    async def join(self, address: Address) -> None:
        """What a node does after start: look itself up, then look into every bucket."""
        assert await self.server.bootstrap([address])
        await self.server.refresh_buckets(0)

    async def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await make()

    def kill(self) -> None:
        """Gone without a word."""
        self.server.protocol.close()
        self.server.transport.close()


class Crowd:
    """`nodes` are those that live."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.nodes: list[SeatedNode] = []
        self._born = itertools.count()
        self._seed = seed

    @classmethod
    async def of(cls, count: int, *, seed: int) -> Crowd:
        crowd = cls(seed)
        for _ in range(count):
            await crowd.add()
        return crowd

    async def add(self) -> SeatedNode:
        """One more, joined through a random one."""
        name = hashlib.sha256(f"{self._seed}/{next(self._born)}".encode()).digest()
        node = await SeatedNode(Identity.from_seed(name), CONFIG).open()
        if self.nodes:
            await node.join(self.dice.choice(self.nodes).address)
        self.nodes.append(node)
        return node

    def kill(self, victims: Sequence[SeatedNode]) -> None:
        gone = set(map(id, victims))
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        for victim in victims:
            victim.kill()

    def fit(self, line: BadLine | None) -> None:
        """Have everything that the nodes send go over this line; None: straight."""
        for node in self.nodes:
            node.server.protocol.transmit = node.straight
            if line is not None:
                line.fit(node.server.protocol, node.address)

    def nearest(self, key: bytes, count: int, *, but: SeatedNode) -> list[bytes]:
        """The true nearest node ids, nearest first."""
        target = int.from_bytes(key, "big")
        ids = [node.identity.node_id for node in self.nodes if node is not but]
        return sorted(ids, key=lambda each: int.from_bytes(each, "big") ^ target)[:count]

    @property
    def datagrams(self) -> int:
        """Sent by all so far, answers included."""
        return sum(node.server.protocol.counters.datagrams_out for node in self.nodes)

    @property
    def kernel_drops(self) -> int | None:
        """Datagrams that the kernel had no room for, at the sockets that are open; None where it does not say."""
        table = Path("/proc/net/udp")
        if not table.exists():
            return None
        ports = {node.address[1] for node in self.nodes}
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
        return sum(int(row[-1]) for row in rows if int(row[1].partition(":")[2], 16) in ports)

    async def close(self) -> None:
        for node in self.nodes:
            await node.server.close()
        self.nodes = []


async def side_by_side(count: int, work: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run all of the work, `count` at a time."""
    waiting = iter(work)

    async def worker() -> None:
        for each in waiting:
            await each()

    await asyncio.gather(*(worker() for _ in range(count)))


async def declare_grid(crowd: Crowd, prefix: str, grid: tuple[int, int], *, ttl_s: float) -> None:
    """Each node declares its share of the grid's rows of experts."""
    digest = hashlib.sha256(prefix.encode()).hexdigest()
    for number, node in enumerate(crowd.nodes):
        rows = range(number, grid[0], len(crowd.nodes))
        uids = {f"{prefix}.{row}.{column}": digest for row in rows for column in range(grid[1])}
        if uids:
            await ExpertDirectory(node).declare(uids, Endpoint("127.0.0.1", 1024 + number), ttl_s)


async def _serve(options: dict[str, Any]) -> None:
    crowd = await Crowd.of(options["nodes"], seed=options.get("seed", 0))
    await declare_grid(crowd, options.get("prefix", "ffn"), tuple(options["grid"]), ttl_s=1800)
    print(json.dumps({"dht_address": crowd.nodes[0].dht_address, "swarm_id": SWARM_ID}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await crowd.close()


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
