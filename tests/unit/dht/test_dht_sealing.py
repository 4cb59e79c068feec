"""Private swarms: outsiders get no answer, learn nothing and cost little; members notice no difference."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import time

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from dht_swarm import HEADER, SWARM_ID, identity_of, settle, until
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.config import DHTConfig
from p2pmoe.dht.bad_line import BadLine
from p2pmoe.dht.node import DHTNode
from p2pmoe.dht.sealing import MAX_SESSIONS, WINDOW, Sealer
from p2pmoe.dht.tokens import MAX_SOURCES, SourceBudgets
from p2pmoe.errors import BootstrapError
from p2pmoe.identity import SwarmKey
from p2pmoe.protocol.datagrams import (
    MAX_DATAGRAM_BYTES,
    SEAL_BYTES,
    SEALED,
    Find,
    Found,
    Page,
    Paged,
    Ping,
    Store,
    Stored,
    encode_datagram,
    header_of,
)
from p2pmoe.protocol.records import MAX_VALUE_BYTES, key_of, sign_record

KEY = key_of(SWARM_ID, "ffn.")
SECRET = SwarmKey(bytes(range(32)))
PING = encode_datagram(HEADER, Ping(b"12345678", b"", bytes(16)))


def sealer(secret=SECRET, header=HEADER):
    return Sealer(secret, header)


# --- the bytes --------------------------------------------------------------------------------------------------


def test_the_bytes_are_frozen(monkeypatch):
    monkeypatch.setattr("p2pmoe.dht.sealing.secrets.token_bytes", lambda count: bytes(range(count)))
    alice = Sealer(SECRET, header_of("p2pmoe"))
    datagram = encode_datagram(header_of("p2pmoe"), Ping(b"12345678", b"", bytes(4)))
    alice.seal(datagram)
    assert alice.seal(datagram).hex() == GOLDEN
    assert Sealer(SECRET, header_of("p2pmoe")).open(bytes.fromhex(GOLDEN)) == datagram


GOLDEN = "000102030405060708090a0b00000000000195ff33c9dcfc49e9f799d12a49d3f4813dbac47a9c5fd714701911fa3e07aec2611c99a0"


def test_the_format_in_other_words():
    """As docs/dht.md has it, from the primitives."""
    sealed = bytes.fromhex(GOLDEN)
    salt, counter = sealed[:12], sealed[12:18]
    swarm = HKDF(SHA256(), 32, salt=None, info=b"p2pmoe-swarm-key-1\0dht-datagram-1").derive(bytes(range(32)))
    session = hashlib.blake2b(salt, key=swarm, digest_size=32).digest()
    header = b"\x01" + hashlib.sha256(b"p2pmoe-swarm-1\0p2pmoe").digest()[:4]
    message = AESGCM(session).decrypt(bytes(6) + counter, sealed[18:], header)
    assert msgspec.msgpack.decode(message) == [0, b"12345678", b"", bytes(4)]


@given(st.binary(max_size=1100))
def test_what_is_sealed_is_opened_by_a_holder_of_the_key(message):
    alice, bob = sealer(), sealer()
    sealed = alice.seal(HEADER + message)
    assert len(sealed) == len(HEADER + message) + alice.overhead_bytes
    assert bob.open(sealed) == (HEADER + message if message else None), "there is no empty message"


def test_nothing_is_sealed_twice_alike_and_nothing_shows():
    alice = sealer()
    sealed = [alice.seal(PING) for _ in range(100)]
    assert len(set(sealed)) == 100
    assert not any(HEADER in each or b"12345678" in each for each in sealed)
    assert sealer().seal(PING)[:12] != alice.seal(PING)[:12], "a restart begins another session"


@pytest.mark.parametrize(
    "other", [sealer(SwarmKey(bytes(32))), sealer(header=header_of("other"))], ids=["another-key", "another-swarm"]
)
def test_a_stranger_opens_nothing(other):
    assert other.open(sealer().seal(PING)) is None


@given(st.data())
def test_any_damage_does_not_open(data):
    alice, bob = sealer(), sealer()
    damaged = bytearray(alice.seal(PING))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    assert bob.open(bytes(damaged)) is None
    assert len(bob._sessions) == 0


@given(st.binary(max_size=1300))
def test_any_bytes_do_not_open(datagram):
    assert sealer().open(datagram) is None


def test_what_was_seen_does_not_open_again():
    alice, bob = sealer(), sealer()
    sealed = [alice.seal(PING) for _ in range(50)]
    random.Random(1).shuffle(sealed)
    assert all(bob.open(each) for each in sealed), "the order does not matter"
    assert not any(bob.open(each) for each in sealed)


@given(st.lists(st.integers(0, 3 * WINDOW), max_size=40))
def test_each_counter_opens_once_and_old_ones_never(counters):
    alice, bob = sealer(), sealer()
    seen: set[int] = set()
    for counter in counters:
        alice._counter = counter
        fresh = counter not in seen and (not seen or counter > max(seen) - WINDOW)
        assert (bob.open(alice.seal(PING)) is not None) == fresh
        seen.add(counter)


def test_a_peer_cannot_make_the_window_grow():
    alice, bob = sealer(), sealer()
    for counter in (0, 2**48 - 1):
        alice._counter = counter
        assert bob.open(alice.seal(PING))
    assert next(iter(bob._sessions.values())).seen.bit_length() <= WINDOW


def test_a_counter_that_has_run_out_begins_a_new_session():
    alice, bob = sealer(), sealer()
    alice._counter = 2**48 - 1
    salts = {alice.seal(PING)[:12] for _ in range(3)}
    assert len(salts) == 2
    assert bob.open(alice.seal(PING)) == PING


def test_sessions_are_bounded_and_strangers_drive_nobody_out():
    alice, bob = sealer(), sealer()
    assert bob.open(alice.seal(PING))
    for _ in range(100):
        bob.open(sealer(SwarmKey.generate()).seal(PING))
    assert len(bob._sessions) == 1
    for number in range(MAX_SESSIONS):
        bob._sessions[number.to_bytes(12, "big")] = bob._sessions[alice._salt]
    bob.open(sealer().seal(PING))
    assert len(bob._sessions) <= MAX_SESSIONS + 1


def test_the_secret_is_not_shown():
    assert "Sealer" in repr(sealer())
    assert SECRET.derive(b"dht-datagram-1").hex() not in repr(sealer())


def test_the_overhead_is_what_the_sizes_leave_room_for():
    assert sealer().overhead_bytes <= SEAL_BYTES


def test_budgets_of_sources_that_only_ever_fail_are_bounded():
    budgets = SourceBudgets(1.0, 1000.0)
    for number in range(MAX_SOURCES + 100):
        budgets.charge(str(number), 10, 0.0)
    assert len(budgets._used) == MAX_SOURCES


# --- on the network ---------------------------------------------------------------------------------------------


async def test_members_find_store_and_read_in_datagrams_of_at_most_1200_bytes(make_swarm):
    sizes: list[int] = []

    def watch(peer):
        send = peer.protocol.transmit
        peer.protocol.transmit = lambda datagram, address: (sizes.append(len(datagram)), send(datagram, address))

    peers = await make_swarm(24, swarm_key=SECRET, before_join=watch)
    now = time.time()
    for number in range(40):  # of every size, the largest included
        signer = identity_of(f"signer-{number}")
        value = bytes(MAX_VALUE_BYTES - 23 * number)
        record = sign_record(
            signer, KEY, value, part=7, sequence=2**40 + number, expires_at_ms=int(now * 1000) + 60_000
        )
        assert await peers[number % 24].set(KEY, [record])
    full = [
        sign_record(identity_of("full"), KEY, bytes(310), part=part, sequence=1, expires_at_ms=int(now * 1000) + 60_000)
        for part in range(8)
    ]
    await peers[0].set(KEY, full)
    for peer in peers[:4]:
        assert len(await peer.get(KEY)) == 48
    assert max(sizes) <= MAX_DATAGRAM_BYTES
    assert max(sizes) > MAX_DATAGRAM_BYTES - 100, "the room is used"
    assert all(peer.protocol.counters.unopened == 0 for peer in peers)


async def test_an_outsider_gets_no_answer_at_all(make_peer, make_stranger):
    alice = await make_peer("alice", swarm_key=SECRET)
    bob = await make_peer("bob", swarm_key=SECRET, bootstrap=alice)
    await bob.set(KEY, [bob.record(KEY)])
    recorded: list[bytes] = []
    send = bob.protocol.transmit
    bob.protocol.transmit = lambda datagram, address: (recorded.append(datagram), send(datagram, address))
    await bob.get(KEY)
    mallory = make_stranger()
    plain = [
        Ping(b"12345678", b"m" * 20, bytes(16)),
        Find(b"12345678", b"m" * 20, b"", KEY, 8, bytes(330)),
        Page(b"12345678", b"", b"", KEY, 0),
        Store(b"12345678", b"", b"", KEY, [bob.record(KEY).raw]),
    ]
    wrong = Sealer(SwarmKey.generate(), HEADER)
    attempts = [
        *(encode_datagram(HEADER, message) for message in plain),
        *(wrong.seal(encode_datagram(HEADER, message)) for message in plain),
        Sealer(SECRET, header_of("other")).seal(PING),
        *recorded,  # replayed
        b"",
        bytes(65_000),
    ]
    assert recorded
    before = alice.protocol.counters.datagrams_out
    for attempt in attempts:
        mallory.send(attempt, alice.address)
    await until(lambda: alice.protocol.counters.unopened == len(attempts))
    assert alice.protocol.counters.datagrams_out == before
    assert mallory.heard == []
    assert {contact.address for contact in alice.table} == {bob.address}
    assert [record.value for record in await alice.get(KEY)] == [b"value"]


async def test_what_does_not_open_counts_against_its_sender(make_peer, make_stranger):
    alice, mallory = await make_peer("alice", swarm_key=SECRET), make_stranger()
    alice.budgets._rate = 0
    alice.protocol.datagram_received(bytes(1000), mallory.address)
    ((level, _),) = alice.budgets._used.values()
    assert level == 1000


async def test_damage_repetition_and_loss_on_the_line(make_swarm):
    line = BadLine(seed=3, loss=0.1, duplicate=0.2, corrupt=0.1)
    peers = await make_swarm(8, swarm_key=SECRET)
    for peer in peers:
        line.fit(peer.protocol, peer.address)
    for number, peer in enumerate(peers):
        await peer.set(key_of(SWARM_ID, f"p{number}."), [peer.record(key_of(SWARM_ID, f"p{number}."))])
    for number in range(len(peers)):
        assert len(await peers[-1 - number].get(key_of(SWARM_ID, f"p{number}."))) == 1
    assert sum(peer.protocol.counters.unopened for peer in peers) > 0
    assert sum(peer.protocol.counters.malformed for peer in peers) == 0, "damage is seen before anything is parsed"


async def test_a_node_that_comes_back_on_its_port_is_heard(make_peer):
    alice = await make_peer("alice", swarm_key=SECRET)
    bob = await make_peer("bob", swarm_key=SECRET, bootstrap=alice)
    again = await make_peer("bob", swarm_key=SECRET, bootstrap=alice)
    await settle(alice)
    assert await again.get(KEY) == []
    assert bob.protocol.counters.unopened == 0


@pytest.mark.parametrize("swarm_key", [None, SwarmKey(bytes(32))], ids=["no-key", "another-key"])
async def test_who_has_not_the_key_does_not_get_in_and_is_told_why(swarm_key):
    async with DHTNode(identity_of("alice"), swarm_key=SECRET) as alice:
        config = DHTConfig(initial_peers=(alice.dht_address,), join_timeout_s=0.4)
        with pytest.raises(BootstrapError, match="private swarm answers only those who have its key"):
            await DHTNode(identity_of("eve"), config, client_mode=True, swarm_key=swarm_key).astart()
        assert alice.peer_count == 0
        assert alice.stats().unopened > 0
        async with DHTNode(identity_of("bob"), config, client_mode=True, swarm_key=SECRET) as bob:
            assert await bob.put("ffn.", [b"inside"]) == 1


async def test_a_node_of_another_private_swarm_at_the_address_is_named():
    """Our own key is the wrong one, and a peer of the others pings us: say so."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        host, port = other.getsockname()
        config = DHTConfig(initial_peers=(f"{host}:{port}",), join_timeout_s=0.5)
        node = DHTNode(identity_of("bob"), config, swarm_key=SECRET)
        joining = asyncio.create_task(node.astart())
        try:
            _, address = await asyncio.get_running_loop().run_in_executor(None, other.recvfrom, 2000)
            other.sendto(Sealer(SwarmKey(bytes(32)), header_of("p2pmoe")).seal(PING), address)
            with pytest.raises(BootstrapError, match="1 datagrams came that ours does not open"):
                await joining
        finally:
            joining.cancel()
            await asyncio.gather(joining, return_exceptions=True)
            node.close()


def test_the_largest_messages_fit_when_they_are_sealed():
    page = [bytes(540), bytes(SEALED.page - 540 - 6)]
    biggest = [
        Found(ID, ID_20, ID, b"", bytes(8 * 38), ID, 65_535, [bytes(SEALED.first_page - 3)]),
        Paged(ID, ID_20, ID, ID, 65_535, page),
        Store(ID, ID_20, ID, KEY, page),
        Stored(ID, ID_20, ID, bytes(16)),
    ]
    sizes = [len(sealer().seal(encode_datagram(HEADER, message))) for message in biggest]
    assert max(sizes) <= MAX_DATAGRAM_BYTES


ID, ID_20 = b"12345678", b"m" * 20
