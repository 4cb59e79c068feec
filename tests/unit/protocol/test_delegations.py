"""Delegations: golden bytes, what the owner's signature covers, and typed errors for whatever else."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import BadSignatureError, DecodeError, EncodeError
from p2pmoe.identity import Identity
from p2pmoe.protocol.delegations import (
    Delegation,
    child_towards,
    delegate,
    format_delegation,
    is_wrapped,
    parse_delegation,
    room_beside,
    signed_bytes,
    unwrap,
    wrap,
)
from p2pmoe.protocol.records import MAX_VALUE_BYTES, decode_record, key_of, sign_record

OWNER = Identity.from_seed(b"owner".ljust(32, b"\0"))
ALICE = Identity.from_seed(b"alice".ljust(32, b"\0"))
BOB = Identity.from_seed(b"bob".ljust(32, b"\0"))
GIVEN = delegate(OWNER, "p2pmoe", ALICE.public_key, expires_at_ms=1_700_000_000_000, scope="ffn.3.")

scopes = st.from_regex(r"\A([A-Za-z_][A-Za-z0-9_-]{0,20}\.((0|[1-9][0-9]{0,4})\.){0,3})?\Z", fullmatch=True)


def test_wire_bytes_are_frozen():
    assert wrap(GIVEN, b"hello").hex() == (
        "929401a666666e2e332ecf0000018bcfe56800c440f9049c93930d7265fd86c32e25b0acaf5ea381f3953e301570bd5a"
        "167709ceeb927748711e2ad5992bcc8f557d6318d893301889cea8ae3bacd4be89b4ed9808c40568656c6c6f"
    )
    assert signed_bytes("p2pmoe", ALICE.public_key, "ffn.3.", 1_700_000_000_000).hex() == (
        "7032706d6f652d64656c65676174696f6e2d3100000000067032706d6f6538088e4c2ae82f5c45c6808a61a6490d3c61"
        "2ce1da235714466fc748fbc4cbbb0000000666666e2e332e0000018bcfe56800"
    )


def test_the_file_is_frozen():
    text = format_delegation(GIVEN, ALICE.public_key, "p2pmoe", "2023-11-14T22:13:20+00:00")
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        "lAGmZmZuLjMuzwAAAYvP5WgAxED5BJyTkw1yZf2Gwy4lsKyvXqOB85U+MBVwvVoWdwnO65J3SHEe",
        "KtWZK8yPVX1jGNiTMBiJzqiuO6zUvom07ZgI",
    ]
    assert ALICE.peer_id in text
    assert parse_delegation(text) == GIVEN
    assert parse_delegation(text.replace("\n", "\r\n")) == GIVEN


def test_a_swarm_id_cannot_break_the_files_comments():
    text = format_delegation(GIVEN, ALICE.public_key, "two\nlines", "")
    assert parse_delegation(text) == GIVEN


@pytest.mark.parametrize(
    ("owner", "swarm_id", "member", "change"),
    [
        (BOB, "p2pmoe", ALICE, {}),
        (OWNER, "other", ALICE, {}),
        (OWNER, "p2pmoe", BOB, {}),
        (OWNER, "p2pmoe", ALICE, {"scope": ""}),
        (OWNER, "p2pmoe", ALICE, {"scope": "ffn."}),
        (OWNER, "p2pmoe", ALICE, {"expires_at_ms": GIVEN.expires_at_ms + 1}),
        (OWNER, "p2pmoe", ALICE, {"signature": bytes(64)}),
    ],
)
def test_every_field_is_signed(owner, swarm_id, member, change):
    GIVEN.check_signature(OWNER.public_key, "p2pmoe", ALICE.public_key)
    fields = {"scope": GIVEN.scope, "expires_at_ms": GIVEN.expires_at_ms, "signature": GIVEN.signature} | change
    with pytest.raises(BadSignatureError):
        Delegation(**fields).check_signature(owner.public_key, swarm_id, member.public_key)


def test_the_fields_cannot_be_shifted_into_one_another():
    """Lengths stand before what has none: no two delegations sign the same bytes."""
    key = ALICE.public_key
    assert signed_bytes("a", key, "", 1) != signed_bytes("", b"a" + key[:31], "", 1)
    assert signed_bytes("ab", key, "c.", 1) != signed_bytes("a", key, "bc.", 1)


@pytest.mark.parametrize("scope", ["ffn", "ffn.3", "3.", "..", "ffn.03.", "ffn.0.0.0.0.", "ffn.*", "ffn. ", "a." * 65])
def test_a_scope_is_a_uid_prefix(scope):
    with pytest.raises(EncodeError, match="no uid prefix"):
        delegate(OWNER, "p2pmoe", ALICE.public_key, expires_at_ms=1, scope=scope)


@pytest.mark.parametrize("wrong", [{"member": bytes(31)}, {"expires_at_ms": -1}, {"expires_at_ms": 2**63}])
def test_our_own_mistakes_are_encode_errors(wrong):
    arguments = {"member": ALICE.public_key, "expires_at_ms": 1} | wrong
    with pytest.raises(EncodeError):
        delegate(OWNER, "p2pmoe", **arguments)


@pytest.mark.parametrize(
    ("scope", "name", "covers", "leads_through"),
    [
        ("", "ffn.", True, False),
        ("ffn.3.", "ffn.3.", True, False),
        ("ffn.3.", "ffn.3.17", True, False),
        ("ffn.3.", "ffn.3.7.", True, False),
        ("ffn.3.", "ffn.", False, True),
        ("ffn.3.", "ffn.33.", False, False),
        ("ffn.3.", "ffn.4.", False, False),
        ("ffn.", "ffnn.", False, False),
    ],
)
def test_what_a_scope_reaches(scope, name, covers, leads_through):
    delegation = Delegation(scope, 1, bytes(64))
    assert (delegation.covers(name), delegation.leads_through(name)) == (covers, leads_through)


def test_the_one_child_above_a_scope():
    assert child_towards("ffn.3.", "ffn.") == 3
    assert child_towards("ffn.3.17.", "ffn.") == 3
    assert child_towards("ffn.3.17.", "ffn.3.") == 17
    assert child_towards("ffn.3.", "ffn.3.") is None
    assert child_towards("ffn.3.", "nop.") is None
    assert child_towards("", "ffn.") is None


@given(scopes, st.integers(0, 2**63 - 1), st.binary(max_size=600))
def test_what_is_wrapped_is_unwrapped(scope, expires_at_ms, payload):
    delegation = delegate(OWNER, "s", BOB.public_key, expires_at_ms=expires_at_ms, scope=scope)
    value = wrap(delegation, payload)
    assert unwrap(value) == (delegation, payload)
    assert is_wrapped(value)
    assert parse_delegation(format_delegation(delegation, BOB.public_key, "s", "")) == delegation


@given(scopes, st.integers(0, 2**63 - 1))
def test_the_room_beside_a_delegation_is_used_and_no_more(scope, expires_at_ms):
    delegation = Delegation(scope, expires_at_ms, bytes(64))
    room = room_beside(delegation)
    assert len(wrap(delegation, bytes(room))) <= MAX_VALUE_BYTES
    with pytest.raises(EncodeError):
        wrap(delegation, bytes(room + 2))
    record = sign_record(ALICE, key_of("s", "ffn."), wrap(delegation, bytes(room)), sequence=1, expires_at_ms=1)
    assert decode_record(record.raw).value == wrap(delegation, bytes(room))


@given(st.binary(max_size=1000))
def test_any_bytes_are_a_delegation_or_a_decode_error(value):
    try:
        unwrap(value)
    except DecodeError:
        pass


@given(st.text(max_size=300))
def test_any_text_is_a_delegation_or_a_decode_error(text):
    try:
        parse_delegation(text)
    except DecodeError:
        pass


@given(st.integers(0, len(wrap(GIVEN, b"hello")) - 1))
def test_a_truncated_value_is_a_decode_error(length):
    with pytest.raises(DecodeError):
        unwrap(wrap(GIVEN, b"hello")[:length])


@pytest.mark.parametrize(
    "wire",
    [
        [[2, "", 1, bytes(64)], b""],
        [[1, "ffn", 1, bytes(64)], b""],
        [[1, "", -1, bytes(64)], b""],
        [[1, "", 2**63, bytes(64)], b""],
        [[1, "", 1, bytes(63)], b""],
        [[1, "", 1, bytes(64)], "text"],
        [[1, "", 1, bytes(64)]],
        [[1, "", 1, bytes(64)], b"", 0],
        [b"", b""],
    ],
)
def test_wrong_types_and_sizes_are_decode_errors(wire):
    with pytest.raises(DecodeError):
        unwrap(msgspec.msgpack.encode(wire))


def test_an_expert_bundle_is_not_taken_for_a_delegation():
    assert not is_wrapped(msgspec.msgpack.encode([1, 0, "127.0.0.1", 80, b"", 0, 0, b""]))
