"""Staying in the swarm: partitions that heal, clocks that are wrong, ports that change hands, our own address."""

from __future__ import annotations

import asyncio
import time

import pytest
from dht_swarm import Peer, identity_of, open_peer, until

from p2pmoe.config import DHTConfig
from p2pmoe.dht.bad_line import BadLine
from p2pmoe.dht.membership import MAX_REMEMBERED, Membership
from p2pmoe.dht.node import DHTNode
from p2pmoe.dht.observations import reachable_host
from p2pmoe.protocol.datagrams import Contact
from p2pmoe.protocol.records import key_of

KEY = key_of("test", "ffn.")


def member(peer: Peer, *initial_peers: str) -> Membership:
    return Membership(peer, DHTConfig(initial_peers=initial_peers), on_round=lambda: None)


def contact_of(peer: Peer) -> Contact:
    return Contact(peer.node.id, *peer.address)


# --- partitions -------------------------------------------------------------------------------------------------


async def test_two_halves_that_forgot_one_another_become_one_swarm_again(make_swarm):
    line = BadLine(seed=5)
    peers = await make_swarm(12, before_join=lambda peer: line.fit(peer.protocol, peer.address))
    members = [member(peer) for peer in peers]
    for each, peer in zip(members, peers, strict=True):
        each.remember(other.address for other in peers if other is not peer)
    left, right = peers[:6], peers[6:]
    line.split([peer.address for peer in left], [peer.address for peer in right])
    for peer in peers:
        peer.protocol.book.typical.sample(0.001)
    for _ in range(3):
        pings = [one.protocol.call_ping(contact_of(other)) for one in peers for other in peers if one is not other]
        await asyncio.gather(*pings)
    assert all(len(peer.table) == 5 for peer in peers), "each half has forgotten the other"

    await left[0].set(KEY, [left[0].record(KEY, b"left")])
    await right[0].set(KEY, [right[0].record(KEY, b"right")])
    assert [record.value for record in await left[3].get(KEY)] == [b"left"]
    assert [record.value for record in await right[3].get(KEY)] == [b"right"]

    line.heal()
    # A round or two: each node tries a few of those it lost, at random.
    async with asyncio.timeout(10):
        while any(len(peer.table) < 11 for peer in peers):
            await asyncio.gather(*(each.find_the_lost() for each in members))
    for peer in peers:
        assert {record.value for record in await peer.get(KEY)} == {b"left", b"right"}


async def test_whoever_was_lost_and_is_still_gone_is_only_pinged(make_swarm, make_stranger):
    alice, bob, *_ = await make_swarm(3)
    silent = make_stranger("silent", answer=lambda *_: None)
    alice.protocol.book.typical.sample(0.001)
    each = member(alice)
    each.remember([silent.address])
    lookups = alice.lookups
    assert not await each.find_the_lost()
    assert alice.lookups == lookups
    assert silent.address in each.peers, "it may come back"
    assert each.peers[0] in {bob.address, *(contact.address for contact in alice.table)}


async def test_what_is_remembered_is_bounded(make_peer):
    each = member(await make_peer("alice"))
    assert not each.wants_peers
    each.remember(("10.0.0.1", port) for port in range(1, 1000))
    assert len(each.peers) == MAX_REMEMBERED
    assert each.peers[0] == ("10.0.0.1", 999)
    assert each.wants_peers
    assert "256 remembered" in repr(each)


async def test_a_new_node_on_an_old_port_takes_the_place_of_the_old_one(make_peer):
    alice, bob = await make_peer("alice"), await open_peer("bob")
    await alice.bootstrap([bob.address])
    port = bob.address[1]
    await bob.close()
    eve = DHTNode(identity_of("eve"), DHTConfig(port=port, swarm_id="test"))
    try:
        await eve.astart()
        assert await alice.protocol.call_ping(contact_of(bob)) is None
        assert await alice.protocol.call_ping(("127.0.0.1", port)) is not None
        assert [contact.id for contact in alice.table] == [eve.identity.node_id]
    finally:
        await eve.aclose()


# --- clocks -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def skewed(make_peer):
    """Ten nodes with good clocks, and one that is that many seconds ahead."""

    async def make(skew_s: float) -> tuple[list[Peer], Peer]:
        peers = [await make_peer("peer-0")]
        for number in range(1, 10):
            peers.append(await make_peer(f"peer-{number}", bootstrap=peers[0]))
        return peers, await make_peer("skewed", clock=lambda: time.time() + skew_s, bootstrap=peers[0])

    return make


@pytest.mark.parametrize(
    ("skew_s", "ttl_s", "taken"), [(60, 120, False), (25, 120, True), (-60, 120, True), (-60, 55, False)]
)
async def test_what_a_signer_with_a_wrong_clock_gets_stored(skewed, skew_s, ttl_s, taken):
    """Ahead: refused beyond 30 s, or its records would outrank all later ones. Behind: its records live shorter."""
    peers, wrong = await skewed(skew_s)
    await wrong.set(KEY, [wrong.record(KEY, ttl_s=ttl_s)])
    found = await peers[3].get(KEY)
    assert bool(found) == taken
    assert all(record.expires_at - time.time() == pytest.approx(ttl_s + skew_s, abs=5) for record in found)


@pytest.mark.parametrize(
    ("skew_s", "ttl_s", "reads"), [(60, 120, True), (60, 55, False), (-25, 120, True), (-60, 120, False)]
)
async def test_what_a_reader_with_a_wrong_clock_reads(skewed, skew_s, ttl_s, reads):
    peers, wrong = await skewed(skew_s)
    await peers[0].set(KEY, [peers[0].record(KEY, ttl_s=ttl_s)])
    assert bool(await wrong.get(KEY)) == reads


async def test_a_wrong_clock_does_no_harm_to_others(skewed):
    for skew_s in (60, -60):
        peers, wrong = await skewed(skew_s)
        record = peers[0].record(KEY, ttl_s=300)
        await peers[0].set(KEY, [record])
        await wrong.get(KEY)
        await wrong.maintain()
        assert [found.raw for found in await peers[5].get(KEY)] == [record.raw]


# --- our own address --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "announced", "seen", "expected"),
    [
        ("0.0.0.0", "192.168.1.2", "9.9.9.9", "9.9.9.9"),
        ("0.0.0.0", "192.168.1.2", "10.0.0.7", "10.0.0.7"),
        ("0.0.0.0", "9.9.9.9", "10.0.0.7", "9.9.9.9"),
        ("0.0.0.0", "192.168.1.2", "127.0.0.1", "192.168.1.2"),
        ("0.0.0.0", "192.168.1.2", None, "192.168.1.2"),
        ("0.0.0.0", "192.168.1.2", "2606:4700::1", "192.168.1.2"),
        ("::", "fd00::2", "2606:4700::1", "2606:4700::1"),
        ("192.168.1.2", "192.168.1.2", "9.9.9.9", "9.9.9.9"),
        ("192.168.1.2", "192.168.1.2", "10.0.0.7", "192.168.1.2"),
        ("127.0.0.1", "127.0.0.1", "9.9.9.9", "127.0.0.1"),
        ("8.8.8.8", "8.8.8.8", "9.9.9.9", "8.8.8.8"),
        ("box.example.org", "box.example.org", "9.9.9.9", "box.example.org"),
    ],
)
def test_which_address_is_announced(bound, announced, seen, expected):
    assert reachable_host(bound, announced, seen) == expected


async def test_a_node_knows_its_address_as_soon_as_it_has_joined(make_swarm):
    peers = await make_swarm(4)
    await until(lambda: all(len(peer.table) == 3 for peer in peers))
    config = DHTConfig(swarm_id="test", initial_peers=(f"127.0.0.1:{peers[0].address[1]}",))
    async with DHTNode(identity_of("newcomer"), config) as node:
        assert node.observations.host == "127.0.0.1"
        assert node.stats().observed_host == "127.0.0.1"
