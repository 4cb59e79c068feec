"""Records: golden bytes, and nothing but typed errors for whatever else."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import BadSignatureError, DecodeError, EncodeError
from p2pmoe.identity import Identity
from p2pmoe.protocol.records import (
    MAX_RECORD_BYTES,
    MAX_VALUE_BYTES,
    decode_record,
    key_of,
    sign_record,
    signed_bytes,
)

ALICE = Identity.from_seed(b"alice".ljust(32, b"\0"))
BOB = Identity.from_seed(b"bob".ljust(32, b"\0"))
KEY = key_of("p2pmoe", "ffn.3.")
RECORD = sign_record(ALICE, KEY, b"hello", part=2, sequence=1_700_000_000_000_000, expires_at_ms=1_700_000_060_000)


def test_key_is_frozen():
    assert KEY.hex() == "e5f3f760238bd1580a61d274d3e42d06228effd5"
    assert key_of("other", "ffn.3.") != KEY != key_of("p2pmoe", "ffn.")


def test_wire_bytes_are_frozen():
    assert RECORD.raw.hex() == (
        "970102c40568656c6c6fcf00060a24181e4000cf0000018bcfe65260c42038088e4c2ae82f5c45c6808a61a6490d3c61"
        "2ce1da235714466fc748fbc4cbbbc440cbb1a346a0147cc36fa558e893e47fa9a30f9494d3c0052e60a3330b63a1835d"
        "3ed85545f9714c041e733dd3b3ee8bce8893e6e9326e4d5619cc7d36b7b4720e"
    )
    assert signed_bytes(KEY, RECORD).hex() == (
        "7032706d6f652d7265636f72642d310001e5f3f760238bd1580a61d274d3e42d06228effd50200060a24181e40000000"
        "018bcfe6526038088e4c2ae82f5c45c6808a61a6490d3c612ce1da235714466fc748fbc4cbbb0000000568656c6c6f"
    )


def test_a_record_survives_the_wire():
    decoded = decode_record(RECORD.raw)
    assert decoded == RECORD
    assert decoded.slot == (ALICE.public_key, 2)
    assert decoded.expires_at == 1_700_000_060.0
    decoded.check_signature(KEY)


def test_a_record_cannot_be_moved_to_another_key():
    with pytest.raises(BadSignatureError):
        decode_record(RECORD.raw).check_signature(key_of("p2pmoe", "ffn.4."))
    with pytest.raises(BadSignatureError):
        RECORD.check_signature(b"short")


@pytest.mark.parametrize(
    ("place", "value"), [(1, 3), (2, b"hullo"), (3, 1), (4, 2), (5, BOB.public_key), (6, bytes(64))]
)
def test_every_field_is_signed(place, value):
    fields = msgspec.msgpack.decode(RECORD.raw)
    fields[place] = value
    with pytest.raises(BadSignatureError):
        decode_record(msgspec.msgpack.encode(fields)).check_signature(KEY)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 2),
        (1, 8),
        (1, -1),
        (2, "text"),
        (2, bytes(MAX_VALUE_BYTES + 1)),
        (3, 2**63),
        (3, 1.5),
        (3, None),
        (4, -1),
        (5, bytes(31)),
        (6, bytes(65)),
    ],
)
def test_wrong_types_and_sizes_are_decode_errors(place, value):
    fields = msgspec.msgpack.decode(RECORD.raw)
    fields[place] = value
    with pytest.raises(DecodeError):
        decode_record(msgspec.msgpack.encode(fields))


def test_there_is_one_spelling():
    assert RECORD.raw[:2] == b"\x97\x01"
    long_version = b"\x97\xcc\x01" + RECORD.raw[2:]
    for raw in (long_version, RECORD.raw + b"\0", b"\xdc\x00\x07" + RECORD.raw[1:], RECORD.raw[:-1]):
        with pytest.raises(DecodeError):
            decode_record(raw)


def test_what_is_too_long_is_refused_unread():
    with pytest.raises(DecodeError, match="at most"):
        decode_record(bytes(MAX_RECORD_BYTES + 1))


def test_the_largest_record_fits():
    record = sign_record(ALICE, KEY, bytes(MAX_VALUE_BYTES), part=7, sequence=2**63 - 1, expires_at_ms=2**63 - 1)
    assert len(record.raw) <= MAX_RECORD_BYTES
    decode_record(record.raw).check_signature(KEY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": bytes(MAX_VALUE_BYTES + 1)},
        {"part": 8},
        {"part": -1},
        {"sequence": 2**63},
        {"sequence": -1},
        {"expires_at_ms": -1},
        {"key": b"short"},
    ],
)
def test_our_own_mistakes_are_encode_errors(wrong):
    arguments = {"key": KEY, "value": b"", "sequence": 1, "expires_at_ms": 1} | wrong
    with pytest.raises(EncodeError):
        sign_record(ALICE, arguments.pop("key"), arguments.pop("value"), **arguments)


@given(st.binary(max_size=1200))
def test_any_bytes_are_a_record_or_a_decode_error(raw):
    try:
        decode_record(raw)
    except DecodeError:
        pass


@given(st.data())
def test_any_damage_is_a_decode_error_or_a_bad_signature(data):
    raw = bytearray(RECORD.raw)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    if bytes(raw) == RECORD.raw:
        return
    with pytest.raises((DecodeError, BadSignatureError)):
        decode_record(bytes(raw)).check_signature(KEY)


@given(
    st.binary(max_size=MAX_VALUE_BYTES),
    st.integers(0, 7),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
)
def test_every_record_of_ours_is_read_back(value, part, sequence, expires_at_ms):
    record = sign_record(BOB, KEY, value, part=part, sequence=sequence, expires_at_ms=expires_at_ms)
    decoded = decode_record(record.raw)
    assert decoded == record
    decoded.check_signature(KEY)
