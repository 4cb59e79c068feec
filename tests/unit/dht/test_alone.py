"""Nodes that start while nobody else is there, what they say, and how they find the others later."""

from __future__ import annotations

import asyncio

import pytest
from dht_swarm import identity_of, until
from test_initial_peers import free_port

from p2pmoe.config import DHTConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import BootstrapError

LOGGER = "p2pmoe.dht.membership"


@pytest.fixture
async def make_node():
    nodes: list[DHTNode] = []

    async def make(name: str, *, client_mode: bool = False, **config) -> DHTNode:
        node = DHTNode(identity_of(name), DHTConfig(**{"join_timeout_s": 0.3} | config), client_mode=client_mode)
        nodes.append(node)
        await node.astart()
        return node

    yield make
    for node in nodes:
        await node.aclose()


def said(caplog) -> list[tuple[str, str]]:
    return [(each.levelname, each.getMessage()) for each in caplog.records if each.name == LOGGER]


async def test_a_node_that_may_be_alone_starts_says_so_once_and_finds_its_peer_later(make_node, caplog):
    caplog.set_level("INFO")
    port = free_port()
    bob = await make_node("bob", initial_peers=(f"127.0.0.1:{port}",), allow_alone=True)
    assert await bob.put("ffn.", [b"bob's"]) == 1, "it keeps its own records"
    assert [record.value for record in await bob.get("ffn.")] == [b"bob's"]
    ((level, line),) = said(caplog)
    assert level == "WARNING"
    assert line.startswith("alone for now, looking for peers in the background: nobody listens at UDP port")

    alice = await make_node("alice", port=port)
    await until(lambda: bob.peer_count == 1 and alice.peer_count == 1, 8)
    await until(lambda: said(caplog)[-1] == ("INFO", f"no longer alone: 127.0.0.1:{port} answers"))
    assert [record.value for record in await alice.get("ffn.")] == [b"bob's"]
    assert await bob.put("ffn.", [b"bob's, again"]) == 2


async def test_without_leave_nobody_is_alone(make_node):
    with pytest.raises(BootstrapError, match="allow_alone"):
        await make_node("bob", initial_peers=(f"127.0.0.1:{free_port()}",))


async def test_a_client_waits_for_peers_only_when_it_was_told_to(make_node):
    port = free_port()
    peers = (f"127.0.0.1:{port}",)
    with pytest.raises(BootstrapError):
        await make_node("carol", initial_peers=peers, client_mode=True)
    carol = await make_node("carol", initial_peers=peers, client_mode=True, allow_alone=True)
    with pytest.raises(BootstrapError):
        await carol.get("ffn.")
    alice = await make_node("alice", port=port)
    await alice.put("ffn.", [b"x"])
    await until(lambda: carol.peer_count == 1, 8)
    assert [record.value for record in await carol.get("ffn.")] == [b"x"]


async def test_a_swarm_is_restarted_one_node_at_a_time(make_node, tmp_path):
    """Each has state of an earlier run, and nobody is told that it may be alone."""
    ports = {name: free_port() for name in ("alice", "bob", "carol")}

    async def start(name: str) -> DHTNode:
        first = () if name == "alice" else (f"127.0.0.1:{ports['alice']}",)
        state = str(tmp_path / f"{name}.json")
        return await make_node(name, port=ports[name], initial_peers=first, state_path=state)

    nodes = {name: await start(name) for name in ports}
    await until(lambda: all(node.peer_count == 2 for node in nodes.values()))
    for node in nodes.values():
        await node.call(node.membership.maintain)
        await node.aclose()
    # The one that nobody else was told of comes first, the founder last.
    carol = await start("carol")
    assert await carol.put("ffn.", [b"carol's"]) == 1
    bob = await start("bob")
    alice = await start("alice")
    await until(lambda: all(node.peer_count == 2 for node in (alice, bob, carol)), 8)
    for node in (alice, bob, carol):
        assert [record.value for record in await node.get("ffn.")] == [b"carol's"]


async def test_two_halves_that_started_alone_find_each_other_and_their_records_merge(make_node):
    ports = [free_port() for _ in range(2)]
    peers = tuple(f"127.0.0.1:{port}" for port in ports)
    alice, bob = await asyncio.gather(
        *(
            make_node(name, port=port, initial_peers=peers, allow_alone=True, join_timeout_s=0.01)
            for name, port in zip(("alice", "bob"), ports, strict=True)
        )
    )
    await alice.put("ffn.", [b"alice's"])
    await bob.put("ffn.", [b"bob's"])
    await until(lambda: alice.peer_count == bob.peer_count == 1, 8)
    for node in (alice, bob):
        assert {record.value for record in await node.get("ffn.")} == {b"alice's", b"bob's"}


async def test_a_founder_whose_visitors_come_and_go_never_complains(make_node, caplog):
    caplog.set_level("INFO")
    alice = await make_node("alice")
    bob = await make_node("bob", initial_peers=(alice.dht_address,))
    await until(lambda: alice.peer_count == 1)
    await alice.call(alice.membership.maintain)
    await bob.aclose()
    alice.server.table.remove_contact(alice.server.table.get(bob.identity.node_id))
    for _ in range(3):
        await alice.call(alice.membership.maintain)
    assert alice.peer_count == 0
    assert said(caplog) == [
        ("INFO", "no initial peers: this node founds swarm 'p2pmoe', others join through it"),
    ]
    assert await alice.put("ffn.", [b"x"]) == 1


async def test_who_loses_everybody_says_so_once_not_in_every_round(make_node, caplog):
    alice = await make_node("alice")
    bob = await make_node("bob", initial_peers=(alice.dht_address,))
    await alice.aclose()
    for _ in range(3):
        if (late := bob.server.table.get(alice.identity.node_id)) is not None:  # her last datagram brings her back
            bob.server.table.remove_contact(late)
        await bob.call(bob.membership.maintain)
    assert [level for level, _ in said(caplog)] == ["WARNING"]
    with pytest.raises(BootstrapError):
        await bob.put("ffn.", [b"x"])
