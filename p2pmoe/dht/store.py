"""The records a node keeps, within its caps, in pages. Synchronous; time is passed in; trusts what it is given.

Whether a record may be believed is decided in `validation.py` before it comes here.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pmoe.protocol.datagrams import (
    DIGEST_BYTES,
    PLAIN,
    RECORD_OVERHEAD_BYTES,
    Sizes,
)
from p2pmoe.protocol.records import Record, Slot

MAX_SLOTS_PER_KEY: Final = 1024
MAX_BYTES_PER_KEY: Final = 512 * 1024
MAX_KEYS: Final = 65_536
MAX_BYTES: Final = 64 * 1024 * 1024
SOURCE_SHARE: Final = 8
"""One source may fill at most one part in this many of the whole store."""


@dataclass(frozen=True, slots=True)
class RecordSet:
    """All live records of a key, cut into pages; the digest tells two nodes whether they hold the same."""

    digest: bytes
    pages: tuple[tuple[bytes, ...], ...]

    @property
    def page_count(self) -> int:
        return len(self.pages)


EMPTY: Final = RecordSet(b"", ())


@dataclass(slots=True)
class _Held:
    record: Record
    source: str
    order: bytes
    """Where it stands among the key's records: by signer and part, so that all holders cut the same pages."""


@dataclass(slots=True)
class _Shelf:
    held: dict[Slot, _Held] = field(default_factory=dict)
    size: int = 0
    soonest_ms: int = 0
    view: RecordSet | None = None


class RecordStore:
    """Slots by key. A slot holds the newest record; what has expired is gone.

    When a key is full, the source with most slots there loses first, in it the signer with most slots, in it the
    record that expires soonest; a newcomer that would itself be next to go is refused. When the whole store is
    full, what expires soonest goes. One source gets an eighth of the store.
    """

    def __init__(
        self,
        *,
        max_slots_per_key: int = MAX_SLOTS_PER_KEY,
        max_bytes_per_key: int = MAX_BYTES_PER_KEY,
        max_keys: int = MAX_KEYS,
        max_bytes: int = MAX_BYTES,
        sizes: Sizes = PLAIN,
    ) -> None:
        self.max_slots_per_key = max_slots_per_key
        self.max_bytes_per_key = max_bytes_per_key
        self.max_keys = max_keys
        self.max_bytes = max_bytes
        self._sizes = sizes
        self.size = 0
        self.count = 0
        self._shelves: dict[bytes, _Shelf] = {}
        self._by_source: Counter[str] = Counter()
        self._expiries: list[tuple[int, bytes, Slot]] = []

    def __len__(self) -> int:
        return self.count

    @property
    def key_count(self) -> int:
        return len(self._shelves)

    @property
    def all_keys(self) -> list[bytes]:
        return list(self._shelves)

    def get(self, key: bytes, slot: Slot) -> Record | None:
        """What the slot holds, expired or not."""
        shelf = self._shelves.get(key)
        held = shelf.held.get(slot) if shelf else None
        return held.record if held else None

    def records(self, key: bytes, now: float) -> list[Record]:
        """The live records of a key."""
        self.expire(now)
        shelf = self._shelves.get(key)
        return [held.record for held in shelf.held.values()] if shelf else []

    def view(self, key: bytes, now: float) -> RecordSet:
        """The live records of a key as pages with their digest."""
        self.expire(now)
        shelf = self._shelves.get(key)
        if shelf is None:
            return EMPTY
        if shelf.view is None:
            ordered = sorted(shelf.held.values(), key=lambda held: held.order)
            raws = [held.record.raw for held in ordered]
            shelf.view = RecordSet(digest_of(held.record for held in ordered), cut_pages(raws, self._sizes))
        return shelf.view

    def has_room(self, key: bytes, record: Record, source: str) -> bool:
        """False when `put` would refuse it; cheap enough to ask before the signature is checked."""
        shelf = self._shelves.get(key)
        old = shelf.held.get(record.slot) if shelf else None
        if not self._source_has_room(source, record, old):
            return False
        if shelf is None or old is not None or not self._is_full(shelf, record):
            return True
        return _next_to_go(shelf, record, source) is not None

    def put(self, key: bytes, record: Record, source: str, now: float) -> bool:
        """Keep a record in the place of an older one of its slot. False when there is no room for it."""
        self.expire(now)
        shelf = self._shelves.get(key)
        old = shelf.held.get(record.slot) if shelf else None
        if not self._source_has_room(source, record, old):
            return False
        if old is not None:
            self._drop(key, record.slot)
        if not self._make_room(key, record, source):
            if old is not None:  # it was there first, and a refused update changes nothing
                self._insert(key, old.record, old.source)
            return False
        self._insert(key, record, source)
        while self.size > self.max_bytes or len(self._shelves) > self.max_keys:
            self._drop_soonest()
        return self.get(key, record.slot) is record

    def expire(self, now: float) -> None:
        """Let go of what has expired."""
        now_ms = int(now * 1000)
        while self._expiries and self._expiries[0][0] <= now_ms:
            self._drop_soonest()

    def _source_has_room(self, source: str, record: Record, old: _Held | None) -> bool:
        freed = len(old.record.raw) if old is not None and old.source == source else 0
        return self._by_source[source] + len(record.raw) - freed <= self.max_bytes // SOURCE_SHARE

    def _is_full(self, shelf: _Shelf, record: Record) -> bool:
        too_many = len(shelf.held) >= self.max_slots_per_key
        return too_many or shelf.size + len(record.raw) > self.max_bytes_per_key

    def _make_room(self, key: bytes, record: Record, source: str) -> bool:
        shelf = self._shelves.get(key)
        while shelf is not None and self._is_full(shelf, record):
            victim = _next_to_go(shelf, record, source)
            if victim is None:
                return False
            self._drop(key, victim)
        return True

    def _insert(self, key: bytes, record: Record, source: str) -> None:
        shelf = self._shelves.setdefault(key, _Shelf())
        shelf.held[record.slot] = _Held(record, source, record.public_key + bytes([record.part]))
        shelf.size += len(record.raw)
        shelf.view = None
        self.size += len(record.raw)
        self.count += 1
        self._by_source[source] += len(record.raw)
        heapq.heappush(self._expiries, (record.expires_at_ms, key, record.slot))
        if len(self._expiries) > 2 * self.count + 1024:
            self._rebuild_expiries()

    def _drop(self, key: bytes, slot: Slot) -> None:
        shelf = self._shelves[key]
        held = shelf.held.pop(slot)
        shelf.size -= len(held.record.raw)
        shelf.view = None
        self.size -= len(held.record.raw)
        self.count -= 1
        self._by_source[held.source] -= len(held.record.raw)
        if self._by_source[held.source] <= 0:
            del self._by_source[held.source]
        if not shelf.held:
            del self._shelves[key]

    def _drop_soonest(self) -> None:
        expires_at_ms, key, slot = heapq.heappop(self._expiries)
        current = self.get(key, slot)
        # The heap keeps entries of records that were replaced since.
        if current is not None and current.expires_at_ms <= expires_at_ms:
            self._drop(key, slot)

    def _rebuild_expiries(self) -> None:
        self._expiries = [
            (held.record.expires_at_ms, key, slot)
            for key, shelf in self._shelves.items()
            for slot, held in shelf.held.items()
        ]
        heapq.heapify(self._expiries)

    def __repr__(self) -> str:
        return f"<RecordStore {self.count} records under {len(self._shelves)} keys, {self.size} B>"


def _next_to_go(shelf: _Shelf, newcomer: Record, source: str) -> Slot | None:
    """The slot that makes room, or None when that would be the newcomer's own."""
    per_source = Counter(held.source for held in shelf.held.values())
    per_source[source] += 1
    loser, _ = max(per_source.items(), key=lambda item: (item[1], item[0] == source))
    rivals = [(held.record, slot) for slot, held in shelf.held.items() if held.source == loser]
    if loser == source:
        rivals.append((newcomer, newcomer.slot))
    per_signer = Counter(record.public_key for record, _ in rivals)
    victim, slot = min(rivals, key=lambda rival: (-per_signer[rival[0].public_key], rival[0].expires_at_ms))
    return None if victim is newcomer else slot


def digest_of(records: Iterable[Record]) -> bytes:
    """Eight bytes that are equal for equal sets of records; empty for none."""
    hashes = sorted(hashlib.sha256(record.raw).digest() for record in records)
    return hashlib.sha256(b"".join(hashes)).digest()[:DIGEST_BYTES] if hashes else b""


def cut_pages(raws: Sequence[bytes], sizes: Sizes = PLAIN) -> tuple[tuple[bytes, ...], ...]:
    """Page 0 has at most 800 bytes and may be empty; the others have at most 1,120; less where they are sealed."""
    pages: list[list[bytes]] = [[]]
    room = sizes.first_page
    for raw in raws:
        size = len(raw) + RECORD_OVERHEAD_BYTES
        if size > room or len(pages[-1]) >= 16:
            pages.append([])
            room = sizes.page
        pages[-1].append(raw)
        room -= size
    return tuple(map(tuple, pages)) if raws else ()
