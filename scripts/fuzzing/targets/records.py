"""Signed records and the bundles in them."""

from __future__ import annotations

import hashlib
from typing import Final

from fuzzing.target import KIB, Target
from p2pmoe.dht.store import RecordStore
from p2pmoe.dht.validation import RecordTrust, status_of
from p2pmoe.errors import DecodeError, RecordError
from p2pmoe.experts.bundles import Bundle, decode_bundle, encode_bundle, tombstone
from p2pmoe.experts.children import children_of
from p2pmoe.identity import Identity
from p2pmoe.protocol.records import MAX_RECORD_BYTES, MAX_VALUE_BYTES, Record, decode_record, sign_record
from p2pmoe.types import Endpoint

NOW: Final = 1_700_000_000.0
KEY: Final = hashlib.sha256(b"key").digest()[:20]
ALICE: Final = Identity.from_seed(hashlib.sha256(b"alice").digest())
ENDPOINT: Final = Endpoint("192.0.2.1", 31337)


def record_of(value: bytes, *, part: int = 0, ahead_s: float = 0.0, ttl_s: float = 60.0) -> Record:
    """One of alice's, valid now."""
    return sign_record(
        ALICE, KEY, value, part=part, sequence=int((NOW + ahead_s) * 1e6), expires_at_ms=int((NOW + ttl_s) * 1000)
    )


def admit(data: bytes) -> str:
    """A record that somebody wants stored; what is stored is what was signed."""
    trust = RecordTrust(RecordStore())
    try:
        record = trust.admit(KEY, data, source="s", count_nearer=0, now=NOW)
    except (RecordError, DecodeError) as error:
        status_of(error)
        raise
    if decode_record(record.raw) != record or record.public_key != ALICE.public_key:
        raise AssertionError("a record that nobody signed was stored")
    return f"stored {len(children_of([record]))}"


def read_bundle(data: bytes) -> str:
    """What a provider says that it has."""
    bundle = decode_bundle(data, ALICE.public_key)
    bundle.endpoint.url.encode("ascii")
    if not bundle.is_tombstone:
        bundle.endpoint.host.encode("idna")  # as the resolver does
    if decode_bundle(encode_bundle(bundle), ALICE.public_key) != bundle:
        raise AssertionError("a bundle that changes when it is passed on")
    return f"{len(bundle.children) > 1} {bundle.endpoint.scheme}"


def record_seeds() -> dict[str, bytes]:
    return {
        "bundle": record_of(encode_bundle(Bundle(ENDPOINT, "ab" * 8, (0, 1, 5)))).raw,
        "empty": record_of(b"", part=7).raw,
        "largest": record_of(bytes(MAX_VALUE_BYTES), ahead_s=29, ttl_s=3599).raw,
        "tombstone": record_of(tombstone(ENDPOINT)).raw,
    }


def bundle_seeds() -> dict[str, bytes]:
    return {
        "list": encode_bundle(Bundle(ENDPOINT, "ab" * 8, (3, 200, 70_000, 2**31 - 1))),
        "bitmap": encode_bundle(Bundle(ENDPOINT, "", tuple(range(0, 256, 2)))),
        "ipv6": encode_bundle(Bundle(Endpoint("2001:db8::1", 1, "https"), "00", (0,))),
        "name": encode_bundle(Bundle(Endpoint("node-1.example.org", 65535), "ff" * 32, (7,))),
        "tombstone": tombstone(ENDPOINT),
    }


TARGETS: Final = (
    Target(
        "records", admit, (RecordError, DecodeError), MAX_RECORD_BYTES, record_seeds,
        mutate="msgpack", max_input_bytes=2 * KIB,
    ),
    Target(
        "bundles", read_bundle, (DecodeError,), MAX_VALUE_BYTES, bundle_seeds,
        mutate="msgpack", max_input_bytes=2 * KIB,
    ),
)  # fmt: skip
