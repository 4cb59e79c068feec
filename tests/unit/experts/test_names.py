"""The names in front of uids: their bytes, who may use them, and that they are found over real DHT nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_closed_swarm_directory import make_directory  # noqa: F401 - a fixture
from test_directory import FFN, HERE, NOP, clock, directories, nodes  # noqa: F401 - fixtures

from p2pmoe.errors import DecodeError
from p2pmoe.experts.names import MAX_NAMES, NAMES_REFRESH_S, ROOT, decode_names, names_of, pack_names
from p2pmoe.identity import Identity
from p2pmoe.protocol.records import MAX_PARTS, MAX_VALUE_BYTES, Record, key_of, sign_record

ALICE, BOB = (Identity.from_seed(name.ljust(32, b"\0")) for name in (b"alice", b"bob"))
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", fullmatch=True)


def record(identity: Identity, value: bytes) -> Record:
    key = key_of("p2pmoe", ROOT)
    return sign_record(identity, key, value, part=0, sequence=1, expires_at_ms=1000)


def test_the_bytes_are_frozen() -> None:
    assert pack_names(["ffn", "attention", "ffn"]) == [b"\x92\x01\x92\xa9attention\xa3ffn"]
    assert pack_names([]) == [b"\x92\x01\x90"]
    assert key_of("p2pmoe", ROOT).hex() == "df0722f3f526b7b90e3e5c52480ec4139240851a"


@given(st.sets(names, max_size=200))
def test_any_names_come_back_in_parts_that_fit(wanted: set[str]) -> None:
    parts = pack_names(wanted)
    assert 1 <= len(parts) <= MAX_PARTS
    assert all(len(part) <= MAX_VALUE_BYTES for part in parts)
    found = [name for part in parts for name in decode_names(part)]
    assert found == sorted(wanted)[: len(found)]
    assert len(found) == len(wanted) or len(parts) == MAX_PARTS


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xc1",
        b"\x92\x02\x90",
        b"\x91\x01",
        b"\x93\x01\x90\x00",
        b"\x92\x01\x91\xa3f.n",
        b"\x92\x01\x91\xa4ffn\n",
        b"\x92\x01\x91\xa0",
        b"\x92\x01\x91\x07",
        b"\x92\x01\x91\xa2\xff\xff",
        b"\x92\x01\xdd\xff\xff\xff\xff",
        b"\x92\x01\xdc" + (MAX_NAMES + 1).to_bytes(2, "big") + b"\xa1a" * (MAX_NAMES + 1),
    ],
)
def test_what_is_no_list_of_names_is_refused_and_left_out(value: bytes) -> None:
    with pytest.raises(DecodeError, match="not a list of names"):
        decode_names(value)
    assert names_of([record(ALICE, value), record(BOB, pack_names(["ffn"])[0])]) == {"ffn": (BOB.peer_id,)}


async def test_a_swarm_says_which_names_it_has(directories, clock) -> None:  # noqa: F811
    alice, bob, carol = directories
    assert await carol.find_names() == {}
    await alice.declare({"ffn.0.0": FFN}, HERE)
    await bob.declare({"ffn.0.1": FFN, "attention.3": NOP}, HERE)
    both = tuple(sorted([alice.dht.peer_id, bob.dht.peer_id]))
    assert await carol.find_names() == {"attention": (bob.dht.peer_id,), "ffn": both}
    await bob.withdraw(["attention.3"])
    assert await carol.find_names() == {"ffn": both}
    await alice.withdraw(["ffn.0.0"])
    await bob.withdraw(["ffn.0.1"])
    assert await carol.find_names() == {}


async def test_names_are_written_when_they_change_or_grow_old(directories, clock, monkeypatch) -> None:  # noqa: F811
    alice = directories[0]
    written: list[str] = []
    put_many = alice.dht.put_many

    async def count(values, ttl_s):
        written.extend(values)
        return await put_many(values, ttl_s)

    monkeypatch.setattr(alice.dht, "put_many", count)
    for ahead_s, uids, writes in [
        (0.0, ["ffn.0"], 1),
        (20.0, ["ffn.0"], 1),
        (40.0, ["ffn.0", "ffn.1"], 1),
        (40.0, ["ffn.0", "gate.0"], 2),
        (40.0 + NAMES_REFRESH_S + 1, ["ffn.0", "gate.0"], 3),
    ]:
        clock.ahead_s = ahead_s
        await alice.declare(dict.fromkeys(uids, FFN), HERE)
        assert written.count(ROOT) == writes, (ahead_s, uids)


async def test_a_member_of_a_closed_swarm_names_only_what_its_scope_is_about(make_directory) -> None:  # noqa: F811
    alice = make_directory("alice")
    bob = make_directory("bob", scope="ffn.3.")
    carol = make_directory("carol", scope=None, client_mode=True)
    await alice.declare({"gate.0": FFN}, HERE)
    await bob.declare({"ffn.3.1": FFN}, HERE)
    assert await carol.find_names() == {"ffn": (bob.dht.peer_id,), "gate": (alice.dht.peer_id,)}
    bob._names = set()
    await bob.dht.put_many({ROOT: {0: pack_names(["ffn", "gate", "ff"])[0]}}, 60.0)
    assert await carol.find_names() == {"ffn": (bob.dht.peer_id,), "gate": (alice.dht.peer_id,)}
