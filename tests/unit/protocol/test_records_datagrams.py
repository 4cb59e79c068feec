"""Datagrams: golden bytes for every RPC, and nothing but DecodeError for strangers' bytes."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import DecodeError, EncodeError
from p2pmoe.protocol import datagrams as d

HEADER = d.header_of("p2pmoe")
ID, ALICE, KEY, TOKEN = b"\x01" * 8, b"\xaa" * 20, b"\x0f" * 20, b"\x07" * 8

GOLDEN = {
    "ping": d.Ping(ID, ALICE, bytes(4)),
    "find": d.Find(ID, b"", TOKEN, KEY, 12),
    "page": d.Page(ID, ALICE, TOKEN, KEY, 3),
    "store": d.Store(ID, ALICE, TOKEN, KEY, [b"record"]),
    "pong": d.Pong(ID, ALICE, TOKEN, d.pack_address("192.0.2.1", 31337), 1_700_000_000_000),
    "found": d.Found(ID, ALICE, TOKEN, *d.pack_contacts([d.Contact(KEY, "192.0.2.1", 1)]), b"\x05" * 8, 2, [b"record"]),
    "paged": d.Paged(ID, ALICE, TOKEN, b"\x05" * 8, 2, [b"record"]),
    "stored": d.Stored(ID, ALICE, TOKEN, bytes([d.Status.STORED, d.Status.STALE])),
}

FROZEN = {
    "ping": ("01855a7ef19400c4080101010101010101c414aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac40400000000"),
    "find": (
        "01855a7ef19701c4080101010101010101c400c4080707070707070707c4140f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0cc400"
    ),
    "page": (
        "01855a7ef19602c4080101010101010101c414aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac40807070707070707"
        "07c4140f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f03"
    ),
    "store": (
        "01855a7ef19603c4080101010101010101c414aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac40807070707070707"
        "07c4140f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f91c4067265636f7264"
    ),
    "pong": (
        "01855a7ef19610c4080101010101010101c414aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac40807070707070707"
        "07c406c00002017a69cf0000018bcfe56800"
    ),
    "found": (
        "01855a7ef19911c4080101010101010101c414aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac40807070707070707"
        "07c41a0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0fc00002010001c400c40805050505050505050291c406726563"
        "6f7264"
    ),
    "paged": (
        "01855a7ef19712c4080101010101010101c414aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac40807070707070707"
        "07c40805050505050505050291c4067265636f7264"
    ),
    "stored": (
        "01855a7ef19513c4080101010101010101c414aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac4080707070707070707c4020004"
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_wire_bytes_are_frozen(name):
    datagram = d.encode_datagram(HEADER, GOLDEN[name])
    assert datagram.hex() == FROZEN[name]
    assert d.decode_datagram(HEADER, datagram) == GOLDEN[name]


def test_another_swarm_or_version_is_refused():
    datagram = d.encode_datagram(HEADER, GOLDEN["ping"])
    for header in (d.header_of("other"), b"\x02" + HEADER[1:]):
        with pytest.raises(DecodeError):
            d.decode_datagram(header, datagram)


def test_too_long_is_refused_in_both_directions():
    with pytest.raises(EncodeError):
        d.encode_datagram(HEADER, d.Store(ID, ALICE, TOKEN, KEY, [bytes(700), bytes(700)]))
    with pytest.raises(DecodeError, match="over"):
        d.decode_datagram(HEADER, HEADER + bytes(d.MAX_DATAGRAM_BYTES))


def _wrong():
    good = msgspec.msgpack.decode(msgspec.msgpack.encode(GOLDEN["store"]))
    yield msgspec.msgpack.encode([])
    yield msgspec.msgpack.encode([99, *good[1:]])
    yield msgspec.msgpack.encode(["rpc_store", *good[1:]])
    yield msgspec.msgpack.encode({"kind": 0})
    yield msgspec.msgpack.encode([*good, 1])
    yield msgspec.msgpack.encode(good[:-1])
    yield msgspec.msgpack.encode(good) + b"\0"
    for place, value in [(1, b""), (1, bytes(9)), (2, bytes(19)), (2, None), (3, bytes(9)), (4, "x" * 20), (5, [1])]:
        wrong = list(good)
        wrong[place] = value
        yield msgspec.msgpack.encode(wrong)
    yield msgspec.msgpack.encode([*good[:-1], [b""] * 17])


@pytest.mark.parametrize("body", list(_wrong()))
def test_wrong_messages_are_decode_errors(body):
    with pytest.raises(DecodeError):
        d.decode_datagram(HEADER, HEADER + body)


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\x96\x03\xc4\x08" + ID + b"\xc4\x00\xc4\x00\xc4\x14" + KEY + b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 1000,
    ],
)
def test_a_lying_length_allocates_nothing(body):
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            d.decode_datagram(HEADER, HEADER + body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@given(st.binary(max_size=1300))
def test_any_bytes_are_a_message_or_a_decode_error(body):
    for datagram in (body, HEADER + body):
        try:
            d.decode_datagram(HEADER, datagram)
        except DecodeError:
            pass


@given(st.sampled_from(sorted(GOLDEN)), st.data())
def test_any_damage_is_a_message_or_a_decode_error(name, data):
    datagram = bytearray(d.encode_datagram(HEADER, GOLDEN[name]))
    for _ in range(data.draw(st.integers(1, 5))):
        datagram[data.draw(st.integers(0, len(datagram) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = d.decode_datagram(HEADER, bytes(datagram))
        if isinstance(message, d.Found):
            d.unpack_contacts(message.v4, message.v6)
    except DecodeError:
        pass


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("0.0.0.0", 1),
        ("0.1.2.3", 1),
        ("224.0.0.1", 1),
        ("255.255.255.255", 1),
        ("192.0.2.1", 0),
        ("::", 1),
        ("ff02::1", 1),
        ("::ffff:192.0.2.1", 1),
    ],
)
def test_contacts_that_nothing_should_be_sent_to_are_left_out(host, port):
    bad, good = d.Contact(ALICE, host, port), d.Contact(KEY, "192.0.2.7", 9)
    assert d.unpack_contacts(*d.pack_contacts([bad, good])) == [good]


@pytest.mark.parametrize("host", ["zz", "", "example.org", "1.2.3", "1.2.3.4.5", "::g"])
def test_a_contact_is_an_ip_literal(host):
    with pytest.raises(EncodeError):
        d.pack_address(host, 1)


def test_a_port_has_16_bits():
    for port in (99999, -1):
        with pytest.raises(EncodeError):
            d.pack_address("192.0.2.1", port)


@pytest.mark.parametrize(
    ("v4", "v6"), [(bytes(25), b""), (b"", bytes(39)), (bytes(26 * 32), bytes(38)), (bytes(26 * 33), b"")]
)
def test_contacts_of_a_wrong_length_or_number(v4, v6):
    with pytest.raises(DecodeError):
        d.unpack_contacts(v4, v6)


def test_contacts_survive_the_wire():
    contacts = [d.Contact(ALICE, "192.0.2.1", 65535), d.Contact(KEY, "2001:db8::7", 1)]
    v4, v6 = d.pack_contacts(contacts)
    assert (len(v4), len(v6)) == (26, 38)
    assert d.unpack_contacts(v4, v6) == contacts
    assert d.unpack_address(b"short") is None


@pytest.mark.parametrize(
    ("host", "scope"),
    [("127.0.0.1", 0), ("::1", 0), ("192.168.1.4", 1), ("fe80::1", 1), ("10.0.0.1", 1), ("8.8.8.8", 2), ("2600::1", 2)],
)
def test_scopes(host, scope):
    assert d.scope_of(host) == scope


def test_the_fullest_found_fits_a_datagram():
    contacts = [d.Contact(ALICE, "2001:db8::7", 65535)] * 8
    records = [bytes(d.MAX_FIRST_PAGE_BYTES - d.RECORD_OVERHEAD_BYTES)]
    fullest = d.Found(ID, ALICE, TOKEN, *d.pack_contacts(contacts), b"\x05" * 8, 65535, records)
    assert len(d.encode_datagram(HEADER, fullest)) <= d.MAX_DATAGRAM_BYTES
    many = [bytes(d.MAX_PAGE_BYTES // 16 - d.RECORD_OVERHEAD_BYTES)] * 16
    for records in ([bytes(1024), bytes(d.MAX_PAGE_BYTES - 1024 - 2 * d.RECORD_OVERHEAD_BYTES)], many):
        for message in (d.Paged(ID, ALICE, TOKEN, ID, 65535, records), d.Store(ID, ALICE, TOKEN, KEY, records)):
            assert len(d.encode_datagram(HEADER, message)) <= d.MAX_DATAGRAM_BYTES
