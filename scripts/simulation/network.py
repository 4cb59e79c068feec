"""Simulated nodes and the network between them. The nodes are `SwarmServer`s: all of the DHT's code but the socket.

A node's table is made when the first datagram reaches it, from the membership at the start: at most k random nodes of
each bucket's range, the state that Kademlia's upkeep converges to. So 20,000 nodes need no 20,000 joins, and only the
nodes that a look-up touches cost memory.

Round trips: log-normal (our assumption) with a median of 159 ms and a mean of 178 ms, which are quoted for the King
data set between 1,740 Internet hosts (Gummadi et al., IMW 2002) from Dabek et al., SIGCOMM 2004, and Li et al., IPTPS
2004. A pair of nodes keeps its round trip; every datagram has up to 10 % of jitter on top.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import random
import socket
from typing import Any, Final

from p2pmoe.dht.contacts import BUCKET_SIZE
from p2pmoe.dht.crawl import Crawl
from p2pmoe.dht.lookup import Lookup
from p2pmoe.dht.server import SwarmServer
from p2pmoe.protocol.datagrams import Address, Contact

SWARM_ID: Final = "simulation"
EPOCH_S: Final = 1_700_000_000.0
"""What the nodes' wall clocks show at the start."""
MEDIAN_RTT_S: Final = 0.159
MEAN_RTT_S: Final = 0.178
SIGMA: Final = math.sqrt(2 * math.log(MEAN_RTT_S / MEDIAN_RTT_S))
JITTER: Final = 0.1
PORT: Final = 4000
ID_BITS: Final = 160


class _NoSocket:
    """Nothing is ever waiting in it."""

    family = socket.AF_INET

    def recvfrom(self, size: int) -> Any:
        raise BlockingIOError


class SimulatedNode(SwarmServer):
    """A node of the DHT on a simulated network. `lookups_made` are its look-ups, latest last."""

    def __init__(self, network: SimulatedNetwork, contact: Contact) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(contact.node_id, SWARM_ID, clock=lambda: EPOCH_S + loop.time(), source_bytes_per_s=1e9)
        self.contact = contact
        self.lookups_made: list[Lookup] = []
        self.protocol = self._create_protocol(_NoSocket())  # type: ignore[arg-type]
        self.protocol.transmit = lambda datagram, to: network.carry(contact, to, datagram)

    def _crawl(self, key: bytes, *, width: int, **options: Any) -> Crawl:
        crawl = super()._crawl(key, width=width, **options)
        self.lookups_made.append(crawl.lookup)
        return crawl


class SimulatedNetwork:
    """Who is there, how far apart, and what gets lost on the way."""

    def __init__(self, count: int, *, seed: int, loss: float) -> None:
        self.dice = random.Random(seed)
        self.loss = loss
        self.datagrams = 0
        self.alive: dict[Address, Contact] = {}
        self.nodes: dict[Address, SimulatedNode] = {}
        self._joining: set[Contact] = set()
        self._seed = seed
        self._next_host = 0
        for _ in range(count):
            self._give_birth()
        self._at_start = sorted((int.from_bytes(contact.node_id, "big"), contact) for contact in self.alive.values())
        self._ids_at_start = [node_id for node_id, _ in self._at_start]

    # --- membership -------------------------------------------------------------------------------------------

    def node(self, contact: Contact) -> SimulatedNode:
        """The node itself; made when it is first needed."""
        node = self.nodes.get(contact.address)
        if node is None:
            node = self.nodes[contact.address] = SimulatedNode(self, contact)
            self._fill_table(node)
        return node

    def random_node(self) -> SimulatedNode:
        """One that has joined: nobody asks a node for a record before."""
        return self.node(self.dice.choice([each for each in self.alive.values() if each not in self._joining]))

    def kill(self, contact: Contact) -> None:
        """Gone without a word."""
        del self.alive[contact.address]
        if contact.address in self.nodes:
            self.nodes.pop(contact.address).protocol.close()

    async def replace(self, contact: Contact) -> None:
        """One dies, and a new one joins as real nodes do: through anybody, then by looking itself up."""
        self.kill(contact)
        newcomer = self._give_birth()
        node = self.nodes[newcomer.address] = SimulatedNode(self, newcomer)
        known = self.dice.sample(list(self.alive.values()), 3)
        self._joining.add(newcomer)
        await node.bootstrap([each.address for each in known if each != newcomer])
        self._joining.discard(newcomer)

    def _give_birth(self) -> Contact:
        # 10.0.0.0/8: a private network, so that the caps per subnet are not what is measured.
        number = self._next_host = self._next_host + 1
        host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        contact = Contact(self.dice.randbytes(ID_BITS // 8), host, PORT)
        self.alive[contact.address] = contact
        return contact

    def _fill_table(self, node: SimulatedNode) -> None:
        own = int.from_bytes(node.contact.node_id, "big")
        for bit in range(ID_BITS - 1, -1, -1):
            # All ids that first differ from ours in this bit: a bucket's range.
            low = (own ^ (1 << bit)) >> bit << bit
            start = bisect.bisect_left(self._ids_at_start, low)
            end = bisect.bisect_left(self._ids_at_start, low + (1 << bit))
            for _, contact in self.dice.sample(self._at_start[start:end], min(BUCKET_SIZE, end - start)):
                node.table.heard_from(contact, 0.0)
            shared = own >> bit << bit
            if (
                bisect.bisect_left(self._ids_at_start, shared + (1 << bit))
                - bisect.bisect_left(self._ids_at_start, shared)
                <= 1
            ):
                break  # nobody but us is left on our side

    # --- datagrams --------------------------------------------------------------------------------------------

    def carry(self, sender: Contact, to: Address, datagram: bytes) -> None:
        """Deliver it after its way, or lose it."""
        self.datagrams += 1
        if self.dice.random() < self.loss:
            return
        delay_s = self._one_way_s(sender.host, to[0]) * (1 + JITTER * self.dice.random())
        asyncio.get_running_loop().call_later(delay_s, self._deliver, sender.address, to, datagram)

    def _deliver(self, sender: Address, to: Address, datagram: bytes) -> None:
        contact = self.alive.get(to)
        if contact is not None:
            self.node(contact).protocol.datagram_received(datagram, sender)

    def _one_way_s(self, one: str, other: str) -> float:
        low, high = sorted((one, other))
        pair = random.Random(f"{self._seed}/{low}/{high}")
        return pair.lognormvariate(math.log(MEDIAN_RTT_S / 2), SIGMA)
