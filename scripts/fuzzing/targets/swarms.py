"""Closed and private swarms: delegations in records and files, and sealed datagrams."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fuzzing.mutate import join_datagrams, split_datagrams
from fuzzing.target import KIB, MIB, Target
from fuzzing.targets.datagrams import HEADER
from fuzzing.targets.records import ALICE, ENDPOINT, KEY, NOW, record_of
from p2pmoe.dht.ownership import ClosedSwarm, OwnDelegation
from p2pmoe.dht.sealing import COUNTER_BYTES, SALT_BYTES, WINDOW, Sealer
from p2pmoe.dht.store import RecordStore
from p2pmoe.dht.validation import RecordTrust, status_of
from p2pmoe.errors import DecodeError, DelegationError, RecordError
from p2pmoe.experts.bundles import Bundle, encode_bundle
from p2pmoe.experts.children import children_of
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.protocol import datagrams as d
from p2pmoe.protocol.delegations import (
    MAX_FILE_BYTES,
    Delegation,
    delegate,
    format_delegation,
    is_wrapped,
    parse_delegation,
    room_beside,
    unwrap,
    wrap,
)
from p2pmoe.protocol.records import MAX_RECORD_BYTES, MAX_VALUE_BYTES, Record

OWNER: Final = Identity.from_seed(bytes(31) + b"o")
SWARM_ID: Final = "fuzz"
PREFIX: Final = "ffn.3."


def _given(scope: str, for_s: float = 3600.0) -> Delegation:
    return delegate(OWNER, SWARM_ID, ALICE.public_key, expires_at_ms=int((NOW + for_s) * 1000), scope=scope)


GIVEN: Final = {
    "everything": _given(""),
    "family": _given("ffn."),
    "deep": _given("ffn.3.7."),
    "elsewhere": _given("bert."),
    "just-over": _given("ffn.3.", for_s=-59.0),
}
_FOLDER: Final = Path(tempfile.mkdtemp(prefix="p2pmoe-fuzz-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
_FILE: Final = _FOLDER / "delegation.txt"

# -------------------------------------------------------------------------------------------------- delegations


def admit_member(data: bytes) -> str:
    """Bytes as a record of a closed swarm, and as the value of one that alice signs; stored is what both signed."""
    said: list[str] = []
    refused: list[RecordError | DecodeError] = []
    try:
        delegation, payload = unwrap(data)
    except DecodeError as error:
        refused.append(error)
    else:
        if len(data) <= MAX_VALUE_BYTES and unwrap(wrap(delegation, payload)) != (delegation, payload):
            raise AssertionError("a value that changes when it is passed on")
        said.append(f"{is_wrapped(data)} {delegation.covers(PREFIX)} {delegation.leads_through(PREFIX)}")
    raws = [data]
    if len(data) <= MAX_VALUE_BYTES:
        raws.append(record_of(data).raw)
    for raw in raws:
        try:
            said.append(_admit(raw))
        except (RecordError, DecodeError) as error:
            status_of(error)
            refused.append(error)
    if not said:
        raise refused[0]
    return f"{' '.join(said)} {' '.join(type(error).__name__ for error in refused)}"


def _admit(raw: bytes) -> str:
    closed = ClosedSwarm(OWNER.public_key, SWARM_ID)
    record = RecordTrust(RecordStore(), closed=closed).admit(KEY, raw, source="s", count_nearer=0, now=NOW)
    delegation, payload = unwrap(record.value)
    if delegation not in GIVEN.values() or record.public_key != ALICE.public_key:
        raise AssertionError("a record without the owner's delegation was stored")
    said = "stored"
    for prefix in ("ffn.", PREFIX, "ffn.3.7.", "bert.", "ffn.30."):
        try:
            opened = closed.open(record, prefix, NOW)
        except RecordError:
            continue
        said += _opened(opened, prefix, delegation, payload)
    return said


def _opened(record: Record, prefix: str, delegation: Delegation, payload: bytes) -> str:
    scope = delegation.scope
    if not (prefix.startswith(scope) or scope.startswith(prefix)) or record.value != payload:
        raise AssertionError(f"a delegation for {scope} reaches {prefix}")
    return f" {prefix} {len(children_of([record]))}"


def load_delegation(data: bytes) -> str:
    """A member's own file: what it shows from then on is what the owner gave it."""
    _FILE.write_bytes(data)
    own = OwnDelegation(str(_FILE), ClosedSwarm(OWNER.public_key, SWARM_ID), ALICE.public_key)
    try:
        own.load()
    except DelegationError:
        try:
            parse_delegation(data.decode("latin-1"))
        except DecodeError:
            pass
        raise
    delegation = own.current(NOW)
    if delegation not in GIVEN.values():
        raise AssertionError("a delegation that the owner did not give")
    return delegation.scope or "everything"


# --------------------------------------------------------------------------------------------- sealed datagrams

SWARM_KEY: Final = SwarmKey(bytes(range(32)))


def sealed_by(salt: bytes, counter: int, datagram: bytes, *, secret: SwarmKey = SWARM_KEY) -> bytes:
    """What a sender whose process has this salt seals as its datagram of that number."""
    sealer = Sealer(secret, HEADER)
    sealer._salt, sealer._counter = salt, counter
    sealer._aead = AESGCM(sealer._session_key(salt))
    return sealer.seal(datagram)


PING: Final = d.encode_datagram(HEADER, d.Ping(b"12345678", b"", bytes(16)))
LONG: Final = HEADER + bytes(range(256)) * 3
_COUNTERS: Final = (0, 1, 2, 100, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2**40, 2 ** (8 * COUNTER_BYTES) - 1)
SEALED: Final = {
    (sender, counter): sealed_by(bytes([sender]) * SALT_BYTES, counter, PING if counter % 2 else LONG)
    for sender in (1, 2)
    for counter in _COUNTERS
}
_MADE: Final = {sealed: name for name, sealed in SEALED.items()}


def open_sealed(data: bytes) -> str:
    """Datagrams at a member: each that a member sealed opens once, as long as it is not too late; no other does."""
    receiver = Sealer(SWARM_KEY, HEADER)
    seen: set[tuple[int, int]] = set()
    highest = {1: -1, 2: -1}
    opened = late = 0
    datagrams = split_datagrams(data)[:64]
    for _, datagram in datagrams:
        expected = None
        if datagram in _MADE:
            sender, counter = _MADE[datagram]
            if (sender, counter) not in seen and counter > highest[sender] - WINDOW:
                expected = PING if counter % 2 else LONG
                seen.add((sender, counter))
                highest[sender] = max(highest[sender], counter)
            else:
                late += 1
        if receiver.open(datagram) != expected:
            raise AssertionError(f"{'a' if expected else 'no'} datagram should have come out")
        opened += expected is not None
    return f"{opened} {late} {len(datagrams)}"


# -------------------------------------------------------------------------------------------------------- seeds


def value_seeds() -> dict[str, bytes]:
    bundle = encode_bundle(Bundle(ENDPOINT, "ab" * 8, (3, 7)))
    values = {name: wrap(delegation, bundle) for name, delegation in GIVEN.items()}
    largest = wrap(GIVEN["deep"], bytes(room_beside(GIVEN["deep"])))
    return {
        **{f"value-{name}": value for name, value in values.items()},
        "value-empty": wrap(GIVEN["everything"], b""),
        "value-largest": largest,
        "record": record_of(values["family"]).raw,
    }


def file_seeds() -> dict[str, bytes]:
    return {
        name: format_delegation(delegation, ALICE.public_key, SWARM_ID, "some day").encode()
        for name, delegation in GIVEN.items()
        if delegation.expires_at > NOW
    }


def sealed_seeds() -> dict[str, bytes]:
    far = 2**40
    orders = {
        "one": [(1, 0)],
        "in-order": [(1, 0), (1, 1), (1, 2)],
        "out-of-order": [(1, 100), (1, 0), (1, 2), (1, 1)],
        "window": [(1, WINDOW), (1, 1), (1, 0), (1, WINDOW + 1), (1, 1), (1, 2)],
        "far-ahead": [(1, 1), (1, far), (1, 2), (1, 2 ** (8 * COUNTER_BYTES) - 1), (1, far)],
        "two-senders": [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2 * WINDOW), (1, 2)],
        "replayed": [(1, 0), (1, 0), (2, WINDOW), (2, WINDOW), (1, 0)],
    }
    return {name: join_datagrams([(0, SEALED[each]) for each in order]) for name, order in orders.items()}


TARGETS: Final = (
    Target(
        "delegations", admit_member, (DecodeError, RecordError), MAX_RECORD_BYTES, value_seeds,
        mutate="msgpack", max_input_bytes=2 * KIB,
    ),
    Target(
        "delegation_files", load_delegation, (DelegationError,), MAX_FILE_BYTES, file_seeds, mutate="text",
        max_input_bytes=2 * MAX_FILE_BYTES,
    ),
    Target(
        "sealed_datagrams", open_sealed, (), MIB, sealed_seeds, mutate="datagrams",
        max_input_bytes=16 * d.MAX_DATAGRAM_BYTES,
    ),
)  # fmt: skip
