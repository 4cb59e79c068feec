"""What a node answers to a request. Synchronous; knows no socket; both clocks are passed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from p2pmoe.dht.contacts import ContactTable
from p2pmoe.dht.store import RecordStore
from p2pmoe.dht.tokens import AMPLIFICATION, WriteTokens, source_of
from p2pmoe.dht.validation import RecordTrust, status_of
from p2pmoe.errors import DecodeError, EncodeError, RecordError
from p2pmoe.identity import NODE_ID_BYTES
from p2pmoe.protocol.datagrams import (
    PLAIN,
    Address,
    Find,
    Found,
    Page,
    Paged,
    Ping,
    Pong,
    Proof,
    Prove,
    Reply,
    Request,
    Sizes,
    Status,
    Store,
    Stored,
    pack_address,
    pack_contacts,
)

CONTACTS_BESIDE_RECORDS: Final = 8
FOUND_BYTES: Final = 80
"""What a Found takes besides contacts and records, at most."""
PACKED_CONTACT_BYTES: Final = 38
PONG_BYTES: Final = 78
"""A Pong that carries an IPv6 address; a ping of less than a third of it is told no address."""
PROOF_BYTES: Final = 132
"""A Proof with its signature; a Prove of less than a third of it gets none."""
BAD_SIGNATURE_COST_BYTES: Final = 4096
"""A wrong signature, the owner's included, costs us a tenth of a millisecond; it is charged like this many bytes."""

SIGNATURE_COST_BYTES: Final = 4096
"""Making one costs us as much."""

_COSTLY: Final = frozenset({Status.BAD_SIGNATURE, Status.NOT_DELEGATED})


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, how many records were refused, and what the request cost beyond its bytes."""

    reply: Reply
    refused: int = 0
    cost_bytes: int = 0


class Answers:
    """The RPCs' table: one method per kind of request."""

    def __init__(
        self,
        own_id: bytes,
        table: ContactTable,
        store: RecordStore,
        trust: RecordTrust,
        sizes: Sizes = PLAIN,
        prove: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._own_id = own_id
        self._prove = prove
        self._table = table
        self._store = store
        self._trust = trust
        self._max_bytes = sizes.datagram
        self._tokens: WriteTokens | None = None

    def to(self, request: Request, address: Address, size: int, now: float, wall_s: float) -> Answer:
        """Answer a request of `size` bytes that came from `address`.

        `now` is seconds of a clock that never goes back, for tokens; `wall_s` seconds since 1970, for records.
        """
        if self._tokens is None:
            self._tokens = WriteTokens(now)
        fresh = self._tokens.make(address, now)
        if isinstance(request, Ping):
            seen = _packed(address) if AMPLIFICATION * size >= PONG_BYTES else b""
            return Answer(Pong(request.id, self._own_id, fresh, seen, int(wall_s * 1000)))
        if isinstance(request, Prove):
            fits = self._prove is not None and AMPLIFICATION * size >= PROOF_BYTES
            signature = self._prove(request.id) if self._prove is not None and fits else b""
            return Answer(Proof(request.id, self._own_id, fresh, signature), cost_bytes=SIGNATURE_COST_BYTES * fits)
        proven = self._tokens.holds(request.token, address, now)
        if isinstance(request, Find):
            limit = self._max_bytes if proven else min(AMPLIFICATION * size, self._max_bytes)
            return Answer(self._found(request, fresh, limit, wall_s))
        if isinstance(request, Page):
            return Answer(self._paged(request, fresh, wall_s, proven=proven))
        return self._stored(request, fresh, source_of(address), wall_s, proven=proven)

    def _found(self, request: Find, token: bytes, limit: int, wall_s: float) -> Found:
        view = self._store.view(request.key, wall_s)
        first = list(view.pages[0]) if view.pages and limit >= self._max_bytes else []
        want = min(request.want, CONTACTS_BESIDE_RECORDS) if first else request.want
        want = max(0, min(want, (limit - FOUND_BYTES) // PACKED_CONTACT_BYTES))
        nearest = self._table.closest(int.from_bytes(request.key, "big"), want + 1, answering_only=True)
        contacts = [each.contact for each in nearest if each.id != request.sender[:NODE_ID_BYTES]][:want]
        v4, v6 = pack_contacts(contacts)
        return Found(request.id, self._own_id, token, v4, v6, view.digest, view.page_count, first)

    def _paged(self, request: Page, token: bytes, wall_s: float, *, proven: bool) -> Paged:
        view = self._store.view(request.key, wall_s)
        if not proven or request.index >= view.page_count:
            return Paged(request.id, self._own_id, token, b"", 0, [])
        return Paged(request.id, self._own_id, token, view.digest, view.page_count, list(view.pages[request.index]))

    def _stored(self, request: Store, token: bytes, source: str, wall_s: float, *, proven: bool) -> Answer:
        if not proven:
            refused = [Status.BAD_TOKEN] * len(request.records)
            return Answer(Stored(request.id, self._own_id, token, bytes(refused)), refused=len(refused))
        nearer = self._table.count_nearer(int.from_bytes(request.key, "big"))
        statuses = [self._admit(request.key, raw, source, nearer, wall_s) for raw in request.records]
        return Answer(
            Stored(request.id, self._own_id, token, bytes(statuses)),
            refused=sum(status is not Status.STORED for status in statuses),
            cost_bytes=BAD_SIGNATURE_COST_BYTES * sum(status in _COSTLY for status in statuses),
        )

    def _admit(self, key: bytes, raw: bytes, source: str, nearer: int, wall_s: float) -> Status:
        try:
            self._trust.admit(key, raw, source=source, count_nearer=nearer, now=wall_s)
        except (RecordError, DecodeError) as error:
            return status_of(error)
        return Status.STORED


def _packed(address: Address) -> bytes:
    try:
        return pack_address(*address)
    except EncodeError:
        return b""
