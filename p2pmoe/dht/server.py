"""The DHT's operations on one event loop: join, get, put, repair, keep the table fresh.

kademlia's `Server` with its look-ups, storage and persistence replaced. Knows no threads and no identity's secrets.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Final, Self

from kademlia.network import Server

from p2pmoe.dht.contacts import BUCKET_SIZE, ContactTable
from p2pmoe.dht.crawl import ALPHA, Crawl
from p2pmoe.dht.harvest import Harvest
from p2pmoe.dht.ownership import ClosedSwarm
from p2pmoe.dht.protocol import DatagramProtocol
from p2pmoe.dht.requests import ping_message
from p2pmoe.dht.sealing import Sealer
from p2pmoe.dht.store import RecordStore
from p2pmoe.dht.tokens import SourceBudgets
from p2pmoe.dht.validation import REPLICAS, RecordTrust
from p2pmoe.errors import DecodeError, RecordError
from p2pmoe.faults import own
from p2pmoe.identity import SwarmKey
from p2pmoe.protocol.datagrams import (
    CALL_ID_BYTES,
    PLAIN,
    RECORD_OVERHEAD_BYTES,
    SEALED,
    Address,
    Contact,
    Reply,
    Status,
    encode_datagram,
    header_of,
    proof_text,
)
from p2pmoe.protocol.records import Record
from p2pmoe.seldom import Seldom

log = logging.getLogger(__name__)

RECEIVE_BUFFER_BYTES: Final = 4 * 1024 * 1024
MAX_REPAIRS: Final = 16
PINGS_PER_ROUND: Final = 16
BUCKET_STALE_S: Final = 600.0
_CLOCK: Final = "is this machine's clock right to half a minute, and is our key in use on one machine only?"
REMEDIES: Final = {
    Status.STALE: _CLOCK,
    Status.EXPIRED: _CLOCK,
    Status.MALFORMED: "they speak another version; upgrade the older of the two",
    Status.BAD_SIGNATURE: "they speak another version; upgrade the older of the two",
    Status.NOT_DELEGATED: "ask the swarm's owner for a delegation (`p2pmoe id delegate`) and set dht.delegation_path",
}
"""What to do about a refusal that lasts; the others are over when there is room again."""
OWN: Final = "own"
"""The source that our own records are counted under."""


class SwarmServer(Server):  # type: ignore[misc]
    """One node of the DHT. Every method runs on the loop that `open` was called on."""

    protocol_class = DatagramProtocol
    protocol: DatagramProtocol
    storage: RecordStore

    def __init__(
        self,
        node_id: bytes,
        swarm_id: str,
        *,
        client_mode: bool = False,
        clock: Callable[[], float] = time.time,
        source_bytes_per_s: float = 1e6,
        closed: ClosedSwarm | None = None,
        swarm_key: SwarmKey | None = None,
        announce_port: int | None = None,
        sign: Callable[[bytes], bytes] | None = None,
    ) -> None:
        super().__init__(ksize=BUCKET_SIZE, alpha=ALPHA, node_id=node_id)
        self._refused = Seldom()
        self.header = header_of(swarm_id)
        self._announce_port = announce_port
        self._sign = sign
        self.sealer = Sealer(swarm_key, self.header) if swarm_key else None
        self._sizes = SEALED if swarm_key else PLAIN
        # Not as an argument: an empty store is false, and would be replaced.
        self.storage = RecordStore(sizes=self._sizes)
        self.client_mode = client_mode
        self.clock = clock
        self.table = ContactTable(node_id, BUCKET_SIZE)
        self.trust = RecordTrust(self.storage, closed=closed)
        self.budgets = SourceBudgets(source_bytes_per_s, 2 * source_bytes_per_s)
        self.lookups = 0
        self.repairs = 0
        self.forged = 0
        """Records with a wrong signature that holders answered with."""
        self.undelegated = 0
        """Records without the owner's leave, in a closed swarm, that holders answered with."""
        self._repairing: set[asyncio.Task[None]] = set()

    def _create_protocol(self, sock: socket.socket) -> DatagramProtocol:
        return self.protocol_class(
            own_id=self.node.id,
            header=self.header,
            table=self.table,
            store=self.storage,
            trust=self.trust,
            budgets=self.budgets,
            clock=self.clock,
            sock=sock,
            client_mode=self.client_mode,
            sealer=self.sealer,
            announce_port=self._announce_port,
            prove=None if self._sign is None else self._prove,
        )

    def _prove(self, call_id: bytes) -> bytes:
        assert self._sign is not None
        return self._sign(proof_text(self.header, call_id))

    async def open(self, sock: socket.socket) -> None:
        """Serve on a bound UDP socket. Instead of `listen`, which has no place for the socket's options."""
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        protocol = self._create_protocol(sock)
        loop = asyncio.get_running_loop()
        self.transport, self.protocol = await loop.create_datagram_endpoint(lambda: protocol, sock=sock)

    async def close(self) -> None:
        """Stop; nothing of ours is on the loop afterwards."""
        for task in self._repairing:
            task.cancel()
        await asyncio.gather(*self._repairing, return_exceptions=True)
        self.stop()
        if self.protocol is not None:
            self.protocol.close()
        await asyncio.sleep(0)  # the transport closes its socket on the loop's next turn

    # --- joining and staying ----------------------------------------------------------------------------------

    async def bootstrap(self, addrs: Collection[Address]) -> int:
        """Ask the nodes at these addresses; look ourselves up as soon as one answers.

        Returns how many answered until then: 0 when nobody does.
        """
        first: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiting = set(addrs)

        def settle(address: Address, reply: Reply | None) -> None:
            waiting.discard(address)
            is_other = reply is not None and reply.sender not in {b"", self.node.id}
            if (is_other or not waiting) and not first.done():
                first.set_result(int(is_other))

        for address in dict.fromkeys(addrs):  # in the order given, so that a seeded simulation repeats itself
            self.protocol.call(address, ping_message, partial(settle, address))
        answered = await first if addrs else 0
        if answered:
            await self.find_nearest(self.node.id, BUCKET_SIZE)
        return answered

    def make_ping(self) -> bytes:
        """A datagram that every node of the swarm answers."""
        datagram = encode_datagram(self.header, ping_message(secrets.token_bytes(CALL_ID_BYTES), b"", b""))
        return self.sealer.seal(datagram) if self.sealer else datagram

    async def _refresh_table(self) -> None:
        """Look into the buckets that nothing was heard of for ten minutes; ping who has been silent."""
        stale = self.table.stale_contacts(asyncio.get_running_loop().time())[:PINGS_PER_ROUND]
        await asyncio.gather(*(self.protocol.call_ping(contact.contact) for contact in stale))
        await self.refresh_buckets(BUCKET_STALE_S)

    async def refresh_buckets(self, older_than_s: float) -> None:
        """Look up a random id in every bucket that was not refreshed for so long."""
        for low, high in self.table.buckets_to_refresh(older_than_s):
            target = random.randint(low, min(high, 2**160 - 1)).to_bytes(20, "big")  # noqa: S311
            await self.find_nearest(target, BUCKET_SIZE)

    def refresh_table(self, interval: float = 0) -> None:
        """The package's hourly timer is not used: `maintain` has an owner that cancels it."""
        raise NotImplementedError

    def save_state(self, fname: str) -> None:
        """The package's pickle is never written: `state_file.py` keeps what a node remembers."""
        raise NotImplementedError

    @classmethod
    async def load_state(cls, fname: str, port: int, interface: str = "") -> Self:
        """The package's pickle is never read."""
        raise NotImplementedError

    def save_state_regularly(self, fname: str, frequency: int = 600) -> None:
        """The package's pickle is never written."""
        raise NotImplementedError

    async def maintain(self) -> None:
        """One round of upkeep."""
        self.storage.expire(self.clock())
        await self._refresh_table()

    # --- look-ups ---------------------------------------------------------------------------------------------

    async def find_nearest(self, key: bytes, width: int = REPLICAS) -> list[Contact]:
        """The nodes nearest to a key that answered, nearest first."""
        return await self._crawl(key, width=width).run()

    async def get(self, key: bytes, *, quick: bool = False) -> list[Record]:
        """The live records of a key: the newest of every slot over the R nearest holders.

        `quick` stops as soon as two holders agree. Holders found lacking are repaired in the background.
        """
        harvest = Harvest(key, self.trust)
        crawl = self._crawl(key, width=REPLICAS, harvest=harvest, quick=quick)
        nearest = await crawl.run()
        self.forged += harvest.forged
        self.undelegated += harvest.undelegated
        now = self.clock()
        merged = {record.slot: record for record in harvest.merged(now)}
        for record in self.storage.records(key, now):
            known = merged.get(record.slot)
            if known is None or known.sequence < record.sequence:
                merged[record.slot] = record
        if not quick:
            self._repair(key, harvest, nearest[:REPLICAS])
        return list(merged.values())

    async def set(self, key: bytes, value: Sequence[Record]) -> int:
        """Hand records to the R nodes nearest to their key. Returns how many took all of them, we included."""
        nearest = await self.find_nearest(key, REPLICAS)
        return await self.store_at(key, value, nearest)

    async def store_at(self, key: bytes, records: Sequence[Record], nearest: Sequence[Contact]) -> int:
        """Hand records to the nearest of these until R have taken them."""
        target = int.from_bytes(key, "big")
        own_distance = self.node.long_id ^ target
        places = REPLICAS
        if not self.client_mode:
            nearer = sum(int.from_bytes(each.node_id, "big") ^ target < own_distance for each in nearest[:REPLICAS])
            places -= nearer < REPLICAS and self._store_here(key, records)
        taken = REPLICAS - places
        batches = _batches([record.raw for record in records], self._sizes.page)
        waiting = list(nearest)
        refusals: Counter[Status] = Counter()
        handed = 0
        while places > 0 and waiting:
            chosen, waiting = waiting[:places], waiting[places:]
            results = await asyncio.gather(*(self._store_batches(each, key, batches) for each in chosen))
            took = sum(result is Status.STORED for result in results)
            refusals.update(result for result in results if result is not None)
            handed += took
            taken += took
            places -= took
        if not handed:
            self._tell_refused(refusals)
        return taken

    async def _store_batches(self, contact: Contact, key: bytes, batches: Sequence[list[bytes]]) -> Status | None:
        """What became of all of them: stored, or why the first one was refused; None when nobody answered."""
        for batch in batches:
            statuses = await self.protocol.call_store(contact, key, batch)
            if not statuses:
                return None
            refused = next((status for status in statuses if status is not Status.STORED), None)
            if refused is not None:
                return refused
        return Status.STORED

    def _tell_refused(self, refusals: Counter[Status]) -> None:
        """Everybody who was asked said no: they are right, and it is not over by itself."""
        reason = next((status for status, _ in refusals.most_common() if status in REMEDIES), None)
        if reason is not None and (note := self._refused.note()) is not None:
            log.error(
                "all %d nodes that were asked refuse our records (%s): %s%s",
                refusals.total(),
                reason.name.lower().replace("_", " "),
                REMEDIES[reason],
                note,
            )

    def _store_here(self, key: bytes, records: Iterable[Record]) -> bool:
        try:
            for record in records:
                self.trust.admit(key, record.raw, source=OWN, count_nearer=0, now=self.clock())
        except (RecordError, DecodeError):
            return False
        return True

    def _crawl(self, key: bytes, *, width: int, **options: Any) -> Crawl:
        self.lookups += 1
        seeds = self.table.closest(int.from_bytes(key, "big"), BUCKET_SIZE)
        return Crawl(self.protocol, key, [seed.contact for seed in seeds], width=width, **options)

    def _repair(self, key: bytes, harvest: Harvest, holders: Sequence[Contact]) -> None:
        now = self.clock()
        for holder in holders:
            records = harvest.lacking(holder, now)
            if records and len(self._repairing) < MAX_REPAIRS:
                own(
                    self._hand_over(key, holder, records),
                    self._repairing,
                    "repairing a holder's records",
                    by_a_stranger=True,
                )

    async def _hand_over(self, key: bytes, holder: Contact, records: Sequence[Record]) -> None:
        self.repairs += 1
        await self._store_batches(holder, key, _batches([record.raw for record in records], self._sizes.page))

    def __repr__(self) -> str:
        return f"<SwarmServer {self.node.id[:4].hex()}…: {self.table!r}, {self.storage!r}>"


def _batches(raws: Sequence[bytes], page_bytes: int) -> list[list[bytes]]:
    """Records in as few Store datagrams as they go."""
    batches: list[list[bytes]] = []
    room = 0
    for raw in raws:
        size = len(raw) + RECORD_OVERHEAD_BYTES
        if size > room or len(batches[-1]) >= 16:
            batches.append([])
            room = page_bytes
        batches[-1].append(raw)
        room -= size
    return batches
