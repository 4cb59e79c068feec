"""Bundles: golden bytes, sizes, and nothing but DecodeError for strangers' values."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import DecodeError, EncodeError
from p2pmoe.experts.bundles import (
    MAX_CHILDREN,
    Bundle,
    decode_bundle,
    encode_bundle,
    pack_bundles,
    tombstone,
)
from p2pmoe.experts.uid import MAX_COORDINATE
from p2pmoe.protocol.records import MAX_VALUE_BYTES
from p2pmoe.types import Endpoint

ALICE = bytes(range(32))
HERE = Endpoint("192.0.2.7", 8080)
DIGEST = "ab" * 32
numbers = st.sets(st.integers(0, MAX_COORDINATE) | st.integers(0, 3000), max_size=200)


def unpacked(values):
    return [
        (child, bundle.schema_digest)
        for value in values
        for bundle in [decode_bundle(value, ALICE)]
        for child in bundle.children
    ]


@pytest.mark.parametrize(
    ("children", "frozen"),
    [
        ((3, 4, 900), "980100a93139322e302e322e37cd1f90c402abcd0003c4040000ff06"),
        ((1, 2, 3, 4, 5, 6, 7, 8, 9), "980100a93139322e302e322e37cd1f90c402abcd0101c402ff01"),
        ((), "980100a93139322e302e322e37cd1f90c402abcd0000c400"),
    ],
)
def test_wire_bytes_are_frozen(children, frozen):
    bundle = Bundle(HERE, "abcd", children)
    assert encode_bundle(bundle).hex() == frozen
    assert decode_bundle(bytes.fromhex(frozen), ALICE) == Bundle(HERE.with_public_key(ALICE), "abcd", children)


@given(numbers)
def test_every_set_of_children_is_read_back(children):
    pairs = [(child, DIGEST) for child in children]
    values = pack_bundles(HERE, pairs)
    assert all(len(value) <= MAX_VALUE_BYTES for value in values)
    assert sorted(unpacked(values)) == sorted(pairs)


def test_a_whole_row_of_a_grid_takes_one_small_value():
    (value,) = pack_bundles(HERE, [(child, DIGEST) for child in range(256)])
    assert len(value) < 100


def test_schemas_and_prefixes_are_apart():
    pairs = [(1, DIGEST), (2, "cd" * 32), (3, DIGEST), (1, "")]
    values = pack_bundles(HERE, pairs)
    assert len(values) == 3
    assert sorted(unpacked(values)) == sorted(pairs)


def test_many_children_are_split():
    values = pack_bundles(HERE, [(child, DIGEST) for child in range(1000)])
    assert [len(decode_bundle(value, ALICE).children) for value in values] == [400, 400, 200]


def test_too_many_children_or_schemas_are_an_encode_error_that_says_what_to_do():
    with pytest.raises(EncodeError, match="8 are allowed"):
        pack_bundles(HERE, [(child, DIGEST) for child in range(8 * MAX_CHILDREN + 1)])
    with pytest.raises(EncodeError, match="fewer schemas"):
        pack_bundles(HERE, [(child, f"{child:02x}") for child in range(9)])


def test_a_tombstone_lists_nothing():
    assert decode_bundle(tombstone(HERE), ALICE).is_tombstone


@pytest.mark.parametrize(
    "endpoint",
    [
        Endpoint("host name", 1),
        Endpoint("x" * 256, 1),
        Endpoint("a/../b", 1),
        Endpoint("192.0.2.7", 70000),
        Endpoint("192.0.2.7", 1, "gopher"),
        Endpoint("", 1),
    ],
)
def test_endpoints_that_cannot_be_called_are_not_announced(endpoint):
    with pytest.raises((EncodeError, DecodeError)):
        decode_bundle(encode_bundle(Bundle(endpoint, DIGEST, (1,))), ALICE)


@pytest.mark.parametrize("digest", ["zz", "abc", "ab" * 33])
def test_digests_are_hex_of_at_most_32_bytes(digest):
    with pytest.raises(EncodeError):
        encode_bundle(Bundle(HERE, digest, (1,)))


def wire(**changes):
    fields = {"v": 1, "scheme": 0, "host": "h", "port": 1, "digest": b"", "form": 0, "base": 0, "children": b"\0"}
    return msgspec.msgpack.encode(list((fields | changes).values()))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"junk",
        wire(v=2),
        wire(scheme=2),
        wire(host="a b"),
        wire(host="a\n"),
        wire(host=b"h"),
        wire(host="", children=b"\0"),
        wire(port=0),
        wire(port=65536),
        wire(digest=bytes(33)),
        wire(form=2),
        wire(base=-1),
        wire(base=MAX_COORDINATE, children=b"\0\0"),
        wire(children=b"\x80"),
        wire(children=b"\xff\xff\xff\xff\xff\x01"),
        wire(children=bytes(401)),
        wire(form=1, children=b"\xff" * 51),
        wire(form=1, base=MAX_COORDINATE, children=b"\x02"),
        wire(children=bytes(901)),
        wire(children="text"),
        wire() + b"\0",
    ],
)
def test_wrong_values_are_decode_errors(value):
    with pytest.raises(DecodeError):
        decode_bundle(value, ALICE)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_bundle_or_a_decode_error(value):
    try:
        decode_bundle(value, ALICE)
    except DecodeError:
        pass


@given(st.integers(0, 1), st.integers(0, MAX_COORDINATE), st.binary(max_size=900))
def test_any_children_are_bounded_and_ascending(form, base, children):
    try:
        bundle = decode_bundle(wire(form=form, base=base, children=children), ALICE)
    except DecodeError:
        return
    assert len(bundle.children) <= MAX_CHILDREN
    assert list(bundle.children) == sorted(set(bundle.children))
    assert all(0 <= child <= MAX_COORDINATE for child in bundle.children)
