"""Whether a record may be believed. No I/O and no clock: the time, the source and the table's view are passed in."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from p2pmoe.dht.ownership import ClosedSwarm
from p2pmoe.dht.store import RecordStore
from p2pmoe.errors import (
    BadSignatureError,
    DecodeError,
    ExpiredRecordError,
    NotDelegatedError,
    RecordError,
    StaleRecordError,
)
from p2pmoe.protocol.datagrams import Status
from p2pmoe.protocol.records import KEY_BYTES, Record, decode_record

MAX_TTL_S: Final = 3600.0
MAX_SEQUENCE_AHEAD_S: Final = 30.0
REPLICAS: Final = 8
MAX_VERIFIED: Final = 16_384


class NoRoomError(RecordError):
    """The key, the source's share or the store is full."""


class TooFarError(RecordError):
    """Too many nodes are nearer to the key than we are."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How far ahead of our clock a record may be, in seconds."""

    max_ttl_s: float = MAX_TTL_S
    max_sequence_ahead_s: float = MAX_SEQUENCE_AHEAD_S


class RecordTrust:
    """Every rule by which a record is believed, cheap ones first, so that garbage costs us little.

     A record somebody asks us to store must pass, in this order (`admit`):

     1. at most 1,040 bytes, of the right types and sizes, in msgpack's shortest form      DecodeError
     2. a key of 20 bytes                                                                  DecodeError
     3. now < expires_at <= now + 3,600 s                                                  ExpiredRecordError
     4. sequence <= now + 30 s                                                             StaleRecordError
     5. in a closed swarm: a delegation, not over for more than 60 s                       NotDelegatedError
     6. sequence above the stored one's; an equal one must be byte for byte the same       StaleRecordError
     7. room within the caps of the key, the source and the store                          NoRoomError
     8. fewer than 2R = 16 nodes that we know are nearer to the key than we are            TooFarError
     9. in a closed swarm: the owner gave the delegation to this signer in this swarm      NotDelegatedError
    10. the signature, by the key in the record, over this key                             BadSignatureError

     The request that brings it has passed before that: the sizes of a datagram, the sender's byte budget and its
     write token (`protocol.py`, `tokens.py`). A signer writes only its own slots, because the slot is named by its
     public key, and anybody may relay. A reader believes only its own checks of rules 1 to 5, 9 and 10 (`check_read`);
     that the delegation covers the prefix is checked by those who know the prefix (`ClosedSwarm.open`).
    """

    def __init__(self, store: RecordStore, limits: Limits | None = None, *, closed: ClosedSwarm | None = None) -> None:
        self.store = store
        self.closed = closed
        self.limits = limits or Limits()
        self._verified: OrderedDict[bytes, None] = OrderedDict()

    def admit(self, key: bytes, raw: bytes, *, source: str, count_nearer: int, now: float) -> Record:
        """Store a record of a stranger, or raise the error of the first rule that it breaks."""
        record = self._well_formed(key, raw)
        self._timely(record, now)
        delegation = self.closed.delegation_of(record, now) if self.closed else None
        held = self.store.get(key, record.slot)
        if held is not None:
            if held.raw == record.raw:
                return held
            if record.sequence <= held.sequence:
                raise StaleRecordError(f"sequence {record.sequence} is not above the stored {held.sequence}")
        if not self.store.has_room(key, record, source):
            raise NoRoomError(f"no room for another record of source {source} under key {key.hex()}")
        if count_nearer >= 2 * REPLICAS:
            raise TooFarError(f"{count_nearer} nodes are nearer to key {key.hex()}")
        if self.closed and delegation:
            self.closed.check(record, delegation)
        self._signed(key, record)
        if not self.store.put(key, record, source, now):
            raise NoRoomError(f"no room under key {key.hex()}")
        return record

    def check_read(self, key: bytes, raw: bytes, now: float) -> Record:
        """A record that a holder answered with, checked as if the holder were a liar.

        Raises DecodeError, ExpiredRecordError, StaleRecordError, NotDelegatedError or BadSignatureError.
        """
        record = self._well_formed(key, raw)
        self._timely(record, now)
        if self.closed:
            self.closed.check(record, self.closed.delegation_of(record, now))
        self._signed(key, record)
        return record

    def _well_formed(self, key: bytes, raw: bytes) -> Record:
        record = decode_record(raw)
        if len(key) != KEY_BYTES:
            raise DecodeError(f"a key has {KEY_BYTES} bytes, got {len(key)}")
        return record

    def _timely(self, record: Record, now: float) -> None:
        if not now < record.expires_at <= now + self.limits.max_ttl_s:
            raise ExpiredRecordError(
                f"the record expires {record.expires_at - now:.1f} s from now; "
                f"more than 0 and at most {self.limits.max_ttl_s:.0f} are allowed"
            )
        ahead_s = record.sequence / 1e6 - now
        if ahead_s > self.limits.max_sequence_ahead_s:
            raise StaleRecordError(f"the sequence is {ahead_s:.0f} s ahead of our clock; is the signer's clock wrong?")

    def _signed(self, key: bytes, record: Record) -> None:
        name = hashlib.sha256(key + record.raw).digest()
        if name in self._verified:
            self._verified.move_to_end(name)
            return
        record.check_signature(key)
        self._verified[name] = None
        if len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)


def status_of(error: RecordError | DecodeError) -> Status:
    """What to answer for a record that was refused."""
    if isinstance(error, DecodeError):
        return Status.MALFORMED
    by_kind = {
        ExpiredRecordError: Status.EXPIRED,
        StaleRecordError: Status.STALE,
        NotDelegatedError: Status.NOT_DELEGATED,
        NoRoomError: Status.FULL,
        TooFarError: Status.FAR,
        BadSignatureError: Status.BAD_SIGNATURE,
    }
    return by_kind.get(type(error), Status.MALFORMED)
