"""One key on two nodes: told on joining and while running, proved by the other, and never a restart's false alarm."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from dht_swarm import HEADER, identity_of, until
from test_initial_peers import free_port, needs_ipv6

from p2pmoe.config import DHTConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.dht.same_key import find_same_key
from p2pmoe.errors import BootstrapError, IdentityError
from p2pmoe.identity import verify
from p2pmoe.protocol.datagrams import Contact as Place
from p2pmoe.protocol.datagrams import Find, Found, Ping, Pong, Proof, Prove, pack_contacts, proof_text

ID = b"12345678"


@pytest.fixture
async def make_node():
    nodes: list[DHTNode] = []

    async def make(name: str, **config) -> DHTNode:
        node = DHTNode(identity_of(name), DHTConfig(**{"join_timeout_s": 0.5} | config))
        nodes.append(node)
        await node.astart()
        return node

    yield make
    for node in nodes:
        await node.aclose()


def kill(node: DHTNode) -> None:
    """As SIGKILL does: nobody is told."""
    node.close()


async def test_a_newcomer_with_the_key_of_a_node_does_not_start_and_says_where_that_is(make_node):
    carol = await make_node("carol")
    alice = await make_node("alice", initial_peers=(carol.dht_address,))
    await until(lambda: carol.peer_count == 1)
    for peer in (carol, alice):
        with pytest.raises(IdentityError) as caught:
            await make_node("alice", initial_peers=(peer.dht_address,))
        assert str(caught.value) == (
            f"this node's key ({alice.peer_id}) is in use by a node at {alice.dht_address}, and two nodes cannot share "
            f"one: stop that node, or make a key for this one with `p2pmoe id new FILE` and pass --identity FILE "
            f"(identity_path)"
        )
    assert carol.peer_count == 1
    assert await alice.put("ffn.", [b"x"]) == 2


async def test_a_restart_on_another_port_right_after_a_kill_starts_at_once(make_node):
    carol = await make_node("carol")
    alice = await make_node("alice", initial_peers=(carol.dht_address,))
    await alice.put("ffn.", [b"old"])
    await until(lambda: carol.peer_count == 1)
    kill(alice)
    begun = time.monotonic()
    again = await make_node("alice", initial_peers=(carol.dht_address,))
    assert time.monotonic() - begun < 2.5
    assert again.address != alice.address
    assert await again.put("ffn.", [b"new"]) == 2
    assert [record.value for record in await carol.get("ffn.")] == [b"new"]


async def test_another_node_at_the_old_address_is_no_second_holder_of_the_key(make_node):
    carol = await make_node("carol")
    alice = await make_node("alice", initial_peers=(carol.dht_address,))
    await until(lambda: carol.peer_count == 1)
    port = alice.address[1]
    kill(alice)
    await make_node("bob", port=port)
    again = await make_node("alice", initial_peers=(carol.dht_address,))
    assert again.peer_count >= 1


async def test_a_client_may_use_a_nodes_key(make_node):
    alice = await make_node("alice")
    client = DHTNode(identity_of("alice"), DHTConfig(initial_peers=(alice.dht_address,)), client_mode=True)
    async with client:
        assert client.peer_count == 1


async def test_it_is_told_once_while_running_on_both_sides(make_node, caplog):
    """Both started alone, on two sides of a partition that has healed."""
    carol = await make_node("carol")
    ports = [free_port(), free_port()]
    one = await make_node("alice", port=ports[0])
    other = await make_node("alice", port=ports[1])
    for node in (one, other):
        await node.call(lambda node=node: node.server.bootstrap([carol.address]))
    await until(lambda: carol.peer_count == 1)
    listed = carol.server.table.get(one.identity.node_id).address[1]
    first, second = (one, other) if listed == ports[0] else (other, one)
    for _ in range(3):
        second.membership._looked_at = first.membership._looked_at = -1e9
        await second.call(second.membership._look_for_the_same_key)
        await first.call(first.membership._look_for_the_same_key)
    lines = [each.getMessage() for each in caplog.records if "uses this node's key" in each.getMessage()]
    assert lines == [
        f"a second node, at 127.0.0.1:{listed}, uses this node's key, and the records of one overwrite the other's: "
        f"stop it, or make it a key of its own with `p2pmoe id new FILE`"
    ]


@needs_ipv6
async def test_a_node_at_two_addresses_of_its_own_is_one_node(make_node):
    carol = await make_node("carol", host="::")
    port = free_port("::")
    alice = await make_node("alice", host="::", port=port, initial_peers=(f"127.0.0.1:{carol.address[1]}",))
    dave = await make_node("dave", host="::1", initial_peers=(f"[::1]:{port}",))
    assert await find(alice, [("::1", port), ("127.0.0.1", port), ("127.0.0.9", port)]) is None
    assert dave.peer_count >= 1


async def test_an_address_that_only_a_datagram_shows_to_be_ours(make_node):
    """Behind a mapping that we know nothing of: what we send there comes back to us."""
    alice = await make_node("alice")
    loop = asyncio.get_running_loop()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mapped,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inner,
    ):
        for sock in (mapped, inner):
            sock.bind(("127.0.0.1", 0))
            sock.setblocking(False)
        back: list[tuple] = []

        def outside() -> None:
            data, source = mapped.recvfrom(2000)
            back.append(source)
            inner.sendto(data, alice.address)

        def inside() -> None:
            mapped.sendto(inner.recv(2000), back[-1])

        loop.add_reader(mapped, outside)
        loop.add_reader(inner, inside)
        try:
            begun = time.monotonic()
            assert await find(alice, [mapped.getsockname()]) is None
            assert time.monotonic() - begun < 0.5, "nobody waits for an answer of ourselves"
            assert alice.membership.initial.is_own(mapped.getsockname())
            # And as an initial peer: ourselves, not a second holder of the key.
            bob_port = free_port()
            initial = f"127.0.0.1:{mapped.getsockname()[1]}"
            kill(alice)
            alice = await make_node("alice", port=alice.address[1], initial_peers=(initial,))
            assert not alice.membership.wants_peers
            assert bob_port
        finally:
            loop.remove_reader(mapped)
            loop.remove_reader(inner)


async def find(node: DHTNode, suspects):
    return await node.call(
        lambda: find_same_key(node.server, node.identity.public_key, suspects, is_own=node.membership.initial.may_be_us)
    )


# --- liars ------------------------------------------------------------------------------------------------------


async def test_who_only_says_that_it_has_our_key_stops_nobody(make_peer, make_stranger):
    alice = await make_peer("alice")

    def claim(message, address):
        if isinstance(message, Ping):
            return Pong(message.id, alice.node.id, b"", b"", 0)
        if isinstance(message, Prove):
            return Proof(message.id, alice.node.id, b"", bytes(64))
        return None

    mallory = make_stranger(answer=claim)
    assert await alice.bootstrap([mallory.address]) == 0
    assert len(alice.table) == 0
    found = await find_same_key(alice, alice.identity.public_key, [mallory.address], is_own=lambda _: False)
    assert found is None


async def test_our_own_answer_passed_on_by_a_liar_proves_nothing(make_peer, make_stranger):
    """Mallory names herself in our place, and has us answer the question that we ask her."""
    alice = await make_peer("alice", sign=identity_of("alice").sign)
    relayed = []

    def relay(message, address):
        if isinstance(message, Ping):
            return Pong(message.id, mallory.identity.node_id, b"", b"", 0)
        if isinstance(message, Find):
            v4, v6 = pack_contacts([Place(alice.node.id, *mallory.address)])
            return Found(message.id, mallory.identity.node_id, b"", v4, v6, b"", 0, [])
        if isinstance(message, Prove):
            relayed.append(message)
            mallory.send(message, alice.address)
        return None

    mallory = make_stranger(answer=relay)
    assert await alice.bootstrap([mallory.address]) == 1
    found = await find_same_key(alice, alice.identity.public_key, [], is_own=lambda _: False)
    assert found is None
    assert len(relayed) == 1


async def test_a_proof_is_of_this_swarm_and_question_and_small(make_peer, make_stranger):
    bob = await make_peer("bob", sign=identity_of("bob").sign)
    mallory = make_stranger()
    reply = await mallory.ask(Prove(ID, b"", bytes(40)), bob.address)
    assert (type(reply), reply.id, reply.sender) == (Proof, ID, bob.node.id)
    verify(bob.identity.public_key, proof_text(HEADER, ID), reply.signature)
    assert proof_text(HEADER, ID) == b"p2pmoe-node-proof-1\0" + HEADER + ID
    # A question of less than a third of the answer gets no signature.
    assert (await mallory.ask(Prove(ID, b"", bytes(2)), bob.address)).signature == b""
    silent = await make_peer("carol")
    assert (await mallory.ask(Prove(ID, b"", bytes(40)), silent.address)).signature == b""


async def test_proofs_are_charged_like_signatures_that_are_wrong(make_peer, make_stranger):
    bob = await make_peer("bob", sign=identity_of("bob").sign, source_bytes_per_s=10_000)
    mallory = make_stranger()
    for _ in range(20):
        mallory.send(Prove(ID, b"", bytes(40)), bob.address)
    await until(lambda: bob.protocol.counters.datagrams_in == 20)
    assert bob.protocol.counters.datagrams_out <= 5


async def test_a_twin_at_the_only_initial_peer_is_no_founder_by_mistake(make_node):
    alice = await make_node("alice")
    with pytest.raises((IdentityError, BootstrapError)) as caught:
        await make_node("alice", initial_peers=(alice.dht_address,), allow_alone=True)
    assert isinstance(caught.value, IdentityError)
