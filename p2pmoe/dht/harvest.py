"""Gathers the records of one key from several holders, of whom some lie. Synchronous; knows no socket.

Holders are compared by the digest of what they hold; of equal ones the pages are read once. A holder whose pages
do not add up to the digest it named loses its voice, and the next one with that digest is read instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pmoe.dht.store import digest_of
from p2pmoe.dht.validation import RecordTrust
from p2pmoe.errors import BadSignatureError, DecodeError, NotDelegatedError, RecordError
from p2pmoe.protocol.datagrams import Contact, Found, Paged
from p2pmoe.protocol.records import Record, Slot

MAX_PAGES: Final = 512
MAX_PAGES_ASKED: Final = 2048
"""Over all holders: some of them may have named pages that they do not have."""
MAX_DIGESTS: Final = 16
QUICK_AGREEMENT: Final = 2

PageRequest = tuple[Contact, int]
"""Ask this holder for that page."""


@dataclass(slots=True)
class _RecordSetRead:
    """What was read of the set with one digest."""

    holders: list[Contact] = field(default_factory=list)
    first_pages: dict[Contact, Found] = field(default_factory=dict)
    reader: Contact | None = None
    missing: set[int] = field(default_factory=set)
    records: dict[Slot, Record] = field(default_factory=dict)
    complete: bool = False


class Harvest:
    """Merges the answers to `Find` and `Page` for one key (20 bytes) into the newest record of each slot."""

    def __init__(self, key: bytes, trust: RecordTrust) -> None:
        self.key = key
        self.pages_asked = 0
        self.rejected = 0
        self.forged = 0
        self.undelegated = 0
        self._trust = trust
        self._sets: dict[bytes, _RecordSetRead] = {}
        self._empty_handed: list[Contact] = []
        self._merged: dict[Slot, Record] = {}

    def found(self, contact: Contact, reply: Found, now: float) -> list[PageRequest]:
        """A holder's first answer; returns the pages to ask for."""
        if not reply.pages or not reply.digest:
            self._empty_handed.append(contact)
            return []
        known = self._sets.get(reply.digest)
        if known is None:
            if len(self._sets) >= MAX_DIGESTS:
                return []
            known = self._sets[reply.digest] = _RecordSetRead()
        known.holders.append(contact)
        known.first_pages[contact] = reply
        return [] if known.reader or known.complete else self._read_from(known, contact, now)

    def paged(self, contact: Contact, digest: bytes, index: int, reply: Paged | None, now: float) -> list[PageRequest]:
        """The answer to a page request (None: there was none); returns further pages to ask for."""
        read = self._sets.get(digest)
        if read is None or contact not in read.holders or index not in read.missing:
            return []
        if reply is None or not reply.pages:
            return self._next_reader(read, now) if contact == read.reader else []
        read.missing.discard(index)
        self._take(read, reply.records, now)
        return self._finish(digest, read, now) if not read.missing else []

    def elsewhere(self, contact: Contact, digest: bytes, index: int) -> list[PageRequest]:
        """Another holder of a page that this one is slow to send."""
        read = self._sets.get(digest)
        if read is None or index not in read.missing or self.pages_asked >= MAX_PAGES_ASKED:
            return []
        others = [holder for holder in read.holders if holder != contact][:1]
        self.pages_asked += len(others)
        return [(other, index) for other in others]

    @property
    def is_reading(self) -> bool:
        """True while pages are missing."""
        return any(read.missing for read in self._sets.values())

    @property
    def is_empty(self) -> bool:
        """True while no record has been found."""
        return not self._merged

    @property
    def has_complete(self) -> bool:
        """True when some holder's set has been read whole."""
        return any(read.complete for read in self._sets.values())

    def agreed(self, count: int = QUICK_AGREEMENT) -> bool:
        """True when that many holders hold the same set, and it has been read."""
        return any(read.complete and len(read.holders) >= count for read in self._sets.values())

    def merged(self, now: float) -> list[Record]:
        """The newest live record of every slot."""
        return [record for record in self._merged.values() if record.expires_at > now]

    def lacking(self, contact: Contact, now: float) -> list[Record]:
        """What this holder is missing or has an older record of; nothing when its set was not read whole."""
        has: dict[Slot, Record] = {}
        if contact not in self._empty_handed:
            read = next((read for read in self._sets.values() if contact in read.holders and read.complete), None)
            if read is None:
                return []
            has = read.records
        return [
            record
            for record in self.merged(now)
            if record.slot not in has or has[record.slot].sequence < record.sequence
        ]

    def _read_from(self, read: _RecordSetRead, contact: Contact, now: float) -> list[PageRequest]:
        first = read.first_pages[contact]
        read.reader = contact
        read.records = {}
        read.missing = set(range(1, min(first.pages, MAX_PAGES)))
        if not first.records:
            # An unproven address got the count without the page.
            read.missing.add(0)
        self._take(read, first.records, now)
        if not read.missing:
            return self._finish(first.digest, read, now)
        if self.pages_asked + len(read.missing) > MAX_PAGES_ASKED:
            read.missing.clear()
            return []
        self.pages_asked += len(read.missing)
        return [(contact, index) for index in sorted(read.missing)]

    def _next_reader(self, read: _RecordSetRead, now: float) -> list[PageRequest]:
        liar = read.reader
        read.missing.clear()
        read.reader = None
        read.holders = [holder for holder in read.holders if holder != liar]
        if read.holders:
            return self._read_from(read, read.holders[0], now)
        return []

    def _finish(self, digest: bytes, read: _RecordSetRead, now: float) -> list[PageRequest]:
        records = read.records.values()
        if digest_of(records) == digest:
            read.complete = True
            return []
        return self._next_reader(read, now)

    def _take(self, read: _RecordSetRead, raws: Sequence[bytes], now: float) -> None:
        for raw in raws:
            try:
                record = self._trust.check_read(self.key, raw, now)
            except (DecodeError, RecordError) as error:
                self.rejected += 1
                self.forged += isinstance(error, BadSignatureError)
                self.undelegated += isinstance(error, NotDelegatedError)
                continue
            read.records[record.slot] = record
            newest = self._merged.get(record.slot)
            if newest is None or newest.sequence < record.sequence:
                self._merged[record.slot] = record

    def __repr__(self) -> str:
        return f"<Harvest {self.key.hex()}: {len(self._merged)} records, {len(self._sets)} sets>"
