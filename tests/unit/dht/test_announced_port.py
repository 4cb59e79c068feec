"""A node behind a port mapping: peers enter it at the mapping's outer end, and reach it there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest
from dht_swarm import HEADER, identity_of, settle, until
from test_initial_peers import free_port

from p2pmoe.config import DHTConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import DecodeError
from p2pmoe.protocol.datagrams import (
    Contact,
    Find,
    Ping,
    Pong,
    contact_of,
    decode_datagram,
    encode_datagram,
    sender_at,
)

ID = b"12345678"
ALICE = identity_of("alice").node_id


@contextlib.contextmanager
def mapping(inner_port: int) -> Iterator[tuple[str, int]]:
    """A port that leads to another one, as a container's does; each caller outside has a port of its own inside."""
    loop = asyncio.get_running_loop()
    inside: dict[tuple, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        outer = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        outer.bind(("127.0.0.1", 0))
        outer.setblocking(False)

        def inwards() -> None:
            data, caller = outer.recvfrom(2000)
            if caller not in inside:
                sock = inside[caller] = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sock.bind(("127.0.0.1", 0))
                sock.setblocking(False)
                loop.add_reader(sock, lambda: outer.sendto(sock.recv(2000), caller))
                stack.callback(loop.remove_reader, sock)
            inside[caller].sendto(data, ("127.0.0.1", inner_port))

        loop.add_reader(outer, inwards)
        stack.callback(loop.remove_reader, outer)
        yield outer.getsockname()


async def test_peers_enter_a_node_at_the_port_that_it_announces_and_reach_it_there():
    port = free_port()
    with mapping(port) as outside:
        async with contextlib.AsyncExitStack() as stack:

            async def start(name: str, **config) -> DHTNode:
                return await stack.enter_async_context(DHTNode(identity_of(name), DHTConfig(**config)))

            bob = await start("bob")
            alice = await start(
                "alice",
                port=port,
                announce_host="127.0.0.1",
                announce_port=outside[1],
                initial_peers=(bob.dht_address,),
            )
            assert alice.dht_address == f"127.0.0.1:{outside[1]}"
            await until(lambda: bob.peer_count == 1)
            carol = await start("carol", initial_peers=(alice.dht_address,))
            await until(lambda: carol.peer_count == 2)
            for node in (bob, carol):
                assert node.server.table.get(ALICE).address == outside
            assert await alice.put("ffn.", [b"x"]) >= 3, "some inner ports count as well"
            for node in (bob, carol):
                assert [record.value for record in await node.get("ffn.")] == [b"x"]
            assert alice.server.storage.records, "and what others keep there came through the mapping"
            # Our own announced address is ourselves: as an initial peer, and where peers say that we are.
            again = await start("dave", port=free_port(), announce_host="127.0.0.1", announce_port=outside[1])
            assert again.membership.initial.may_be_us(outside)


async def test_the_port_in_a_request_is_pinged_at_the_senders_own_address_only(make_peer, make_stranger):
    bob = await make_peer("bob")
    mallory = make_stranger("mallory")
    behind = make_stranger("alice", answer=lambda message, _: Pong(message.id, ALICE, b"", b"", 0))
    sender = sender_at(ALICE, behind.address[1])
    mallory.send(Ping(ID, sender, bytes(16)), bob.address)
    await until(lambda: len(bob.table) == 1)
    await settle(bob)
    assert bob.table.get(ALICE).address == behind.address
    assert contact_of(Ping(ID, sender), ("192.0.2.1", 9)) == Contact(ALICE, "192.0.2.1", behind.address[1])
    assert contact_of(Ping(ID, ALICE), ("192.0.2.1", 9)) == Contact(ALICE, "192.0.2.1", 9)
    assert contact_of(Ping(ID, b""), ("192.0.2.1", 9)) is None


async def test_who_announces_a_port_is_not_told_of_itself(make_peer, make_stranger):
    bob = await make_peer("bob")
    behind = make_stranger("alice", answer=lambda message, _: Pong(message.id, ALICE, b"", b"", 0))
    await bob.protocol.call_ping(behind.address)
    asker = make_stranger("mallory")
    token = await asker.token_from(bob)
    assert (await asker.ask(Find(ID, sender_at(ALICE, 4242), token, ALICE, 5), bob.address)).v4 == b""
    assert (await asker.ask(Find(ID, b"", token, ALICE, 5), bob.address)).v4[:20] == ALICE


def test_the_bytes_are_frozen():
    datagram = encode_datagram(HEADER, Ping(ID, sender_at(bytes(range(20)), 0x1234)))
    assert datagram.hex() == (
        HEADER.hex() + "94" + "00" + "c408" + ID.hex() + "c416" + bytes(range(20)).hex() + "1234" + "c400"
    )
    assert decode_datagram(HEADER, datagram) == Ping(ID, bytes(range(20)) + b"\x12\x34")


@pytest.mark.parametrize(
    "message",
    [
        Ping(ID, bytes(22)),
        Ping(ID, bytes(21)),
        Pong(ID, bytes(20) + b"\x12\x34", b"", b"", 0),
    ],
)
def test_a_sender_with_port_0_or_a_port_in_a_reply_is_malformed(message):
    with pytest.raises(DecodeError, match="a sender has 0 or 20 bytes"):
        decode_datagram(HEADER, encode_datagram(HEADER, message))
