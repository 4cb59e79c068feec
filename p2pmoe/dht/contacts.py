"""The routing table: which nodes we know, how well they answer. Synchronous; knows no socket.

Kademlia's `Node`, `KBucket` and `RoutingTable` with what strangers make necessary: a contact enters only after it
answered a request of ours, leaves after three misses, keeps its address while it answers there, and one subnet
gets two places in a bucket. Nearest contacts are exact; the package's traversal misses a quarter of them.
"""

from __future__ import annotations

import functools
import ipaddress
import time
from collections.abc import Iterator
from operator import attrgetter
from typing import Final

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from p2pmoe.dht.timing import RoundTrip
from p2pmoe.protocol.datagrams import Address, Contact, scope_of

BUCKET_SIZE: Final = 20
MAX_MISSES: Final = 3
MAX_PER_SUBNET: Final = 2
STALE_AFTER_S: Final = 60.0


class TableContact(Node):  # type: ignore[misc]
    """A node that answered us, and how it did lately."""

    id: bytes
    ip: str
    port: int
    long_id: int

    def __init__(self, contact: Contact, now: float) -> None:
        super().__init__(*contact)
        self.contact = contact
        self.misses = 0
        self.last_heard = now
        self.first_heard = now
        self.subnet = subnet_of(contact.host)

    @property
    def address(self) -> Address:
        return self.contact.address

    def __repr__(self) -> str:
        return f"<TableContact {self.id[:4].hex()}… {self.ip}:{self.port} {self.misses} misses>"


class ContactTable(RoutingTable):  # type: ignore[misc]
    """The contacts of the node with id `own_id` (20 bytes), in buckets of `ksize`."""

    buckets: list[KBucket]

    def __init__(self, own_id: bytes, ksize: int = BUCKET_SIZE) -> None:
        super().__init__(protocol=None, ksize=ksize, node=Node(own_id))
        self.own_id = own_id
        self.round_trips: dict[Address, RoundTrip] = {}
        self._all: list[TableContact] | None = None

    def __iter__(self) -> Iterator[TableContact]:
        return iter(self._contacts())

    def __len__(self) -> int:
        return len(self._contacts())

    def get(self, node_id: bytes) -> TableContact | None:
        found: TableContact | None = self._bucket_of(node_id)[node_id]
        return found

    def heard_from(self, contact: Contact, now: float) -> None:
        """It answered a request of ours at this address."""
        if contact.node_id == self.own_id:
            return
        known = self.get(contact.node_id)
        if known is not None and known.contact == contact:
            known.misses, known.last_heard = 0, now
            return
        # Whoever claims a live contact's id from elsewhere gets its place only when the old address is silent.
        if known is not None:
            if not known.misses:
                return
            self.remove_contact(known)
        self.add_contact(TableContact(contact, now))

    def missed(self, contact: Contact, *, heard_others: bool) -> None:
        """It left a request unanswered, retransmissions included.

        A miss counts only when others answered meanwhile: a node that lost its own line keeps its table.
        """
        known = self.get(contact.node_id)
        if known is None or known.contact != contact or not heard_others:
            return
        known.misses += 1
        if known.misses >= MAX_MISSES:
            self.remove_contact(known)

    def forget(self, contact: Contact) -> None:
        """Another node answers at its address."""
        known = self.get(contact.node_id)
        if known is not None and known.contact == contact:
            self.remove_contact(known)

    def wants(self, contact: Contact) -> bool:
        """True when a ping could lead to a new entry."""
        if contact.node_id == self.own_id:
            return False
        bucket = self._bucket_of(contact.node_id)
        known = bucket[contact.node_id]
        if known is not None:
            return bool(known.contact != contact and known.misses)
        has_room = len(bucket) < self.ksize or bucket.has_in_range(self.node)
        return bool(has_room and self._subnet_has_room(bucket, contact.host))

    def closest(self, target: int, count: int, *, answering_only: bool = False) -> list[TableContact]:
        """The exact nearest contacts, nearest first; with `answering_only` those whose last request was answered."""
        contacts = self._contacts()
        if answering_only:
            contacts = [contact for contact in contacts if not contact.misses]
        return sorted(contacts, key=lambda contact: contact.long_id ^ target)[:count]

    def count_nearer(self, target: int) -> int:
        """How many answering contacts are nearer to the target than we are."""
        own = self.node.long_id ^ target
        return sum(contact.long_id ^ target < own for contact in self._contacts() if not contact.misses)

    def stale_contacts(self, now: float) -> list[TableContact]:
        """Those to ping: silent for a minute, or silent to our last request; the longest silent first."""
        stale = [c for c in self._contacts() if c.misses or c.last_heard < now - STALE_AFTER_S]
        return sorted(stale, key=attrgetter("last_heard"))

    def buckets_to_refresh(self, older_than_s: float) -> list[tuple[int, int]]:
        """The id ranges of buckets that no look-up touched for so long; they count as touched now."""
        before = time.monotonic() - older_than_s
        old = [bucket for bucket in self.buckets if bucket.last_updated < before]
        for bucket in old:
            bucket.touch_last_updated()
        return [bucket.range for bucket in old]

    def add_contact(self, node: TableContact) -> None:
        """Enter a contact, splitting our own bucket as needed; a full bucket keeps it as a replacement."""
        bucket = self._bucket_of(node.id)
        if not self._subnet_has_room(bucket, node.ip):
            return
        while not bucket.add_node(node):
            if not bucket.has_in_range(self.node):
                return
            self.split_bucket(self.get_bucket_for(node))
            bucket = self._bucket_of(node.id)
        self._all = None

    def remove_contact(self, node: TableContact) -> None:
        super().remove_contact(node)
        self._all = None

    def _bucket_of(self, node_id: bytes) -> KBucket:
        number = int.from_bytes(node_id, "big")
        for bucket in self.buckets:
            if number <= bucket.range[1]:
                return bucket
        raise AssertionError("the buckets cover all ids")

    def get_bucket_for(self, node: Node) -> int:
        return self.buckets.index(self._bucket_of(node.id))

    def _subnet_has_room(self, bucket: KBucket, host: str) -> bool:
        subnet = subnet_of(host)
        return subnet is None or sum(c.subnet == subnet for c in bucket.nodes.values()) < MAX_PER_SUBNET

    def _contacts(self) -> list[TableContact]:
        if self._all is None:
            self._all = [contact for bucket in self.buckets for contact in bucket.nodes.values()]
        return self._all

    def __repr__(self) -> str:
        return f"<ContactTable {len(self)} contacts in {len(self.buckets)} buckets>"


@functools.lru_cache(maxsize=65_536)
def subnet_of(host: str) -> str | None:
    """The /24 or /48 of an address in the world; None on the local network, where crowding is no attack."""
    if scope_of(host) < 2:
        return None
    return str(ipaddress.ip_network((host, 48 if ":" in host else 24), strict=False))
