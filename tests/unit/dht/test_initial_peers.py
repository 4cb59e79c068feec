"""The peers that a node was told of: all addresses of a name, ourselves among them, why one is silent."""

from __future__ import annotations

import socket

import pytest
from dht_swarm import identity_of, until

from p2pmoe.config import DHTConfig
from p2pmoe.dht import addresses
from p2pmoe.dht.addresses import has_ipv6, reached_at
from p2pmoe.dht.initial_peers import InitialPeers
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import BootstrapError, ConfigError
from p2pmoe.rpc.resolver import Resolver
from p2pmoe.types import format_host_port

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
NAMES = {
    "six.example": ["::1"],
    "dead-first.example": ["127.0.0.9", "::1", "127.0.0.1"],
    "world.example": ["203.0.113.7"],
    "us.example": ["127.0.0.1"],
}


def names(known=NAMES) -> Resolver:
    def getaddrinfo(name, *_, **__):
        if name not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET6 if ":" in host else socket.AF_INET, 2, 17, "", (host, 0)) for host in known[name]]

    return Resolver(getaddrinfo)


@pytest.fixture
async def make_node():
    nodes: list[DHTNode] = []

    async def make(name: str, *, start: bool = True, client_mode: bool = False, **config) -> DHTNode:
        config = {"join_timeout_s": 0.6} | config
        node = DHTNode(identity_of(name), DHTConfig(**config), client_mode=client_mode, resolver=names())
        nodes.append(node)
        if start:
            await node.astart()
        return node

    yield make
    for node in nodes:
        await node.aclose()


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        return sock.getsockname()[1]


# --- names ------------------------------------------------------------------------------------------------------


@needs_ipv6
@pytest.mark.parametrize("client_mode", [False, True])
async def test_a_name_with_ipv6_addresses_only(make_node, client_mode):
    alice = await make_node("alice", host="::1")
    bob = await make_node("bob", host="::", initial_peers=(f"six.example:{alice.address[1]}",), client_mode=client_mode)
    assert bob.peer_count == 1
    carol = await make_node("carol", initial_peers=(f"Six.Example.:{alice.address[1]}",), client_mode=True)
    assert carol.peer_count >= 1, "a client binds what reaches its peers"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", pytest.param("::", marks=needs_ipv6)])
async def test_of_a_name_with_several_addresses_all_are_asked(make_node, host):
    alice = await make_node("alice", host="127.0.0.1")
    bob = await make_node("bob", host=host, initial_peers=(f"dead-first.example:{alice.address[1]}",))
    assert [contact.address for contact in bob.server.table] == [alice.address]


@pytest.mark.parametrize("form", ["[::ffff:127.0.0.1]", "127.1", "0x7f.1", "LOCALHOST.", " [::FFFF:7f00:1]"])
async def test_every_spelling_of_an_address(make_node, form):
    alice = await make_node("alice")
    bob = await make_node("bob", initial_peers=(f"{form}:0{alice.address[1]} ",))
    assert [contact.address for contact in bob.server.table] == [("127.0.0.1", alice.address[1])]


@needs_ipv6
async def test_two_colons_serve_both_versions_and_know_an_ipv4_peer_by_its_ipv4_address(make_node):
    alice = await make_node("alice", host="::")
    port = alice.address[1]
    bob = await make_node("bob", initial_peers=(f"127.0.0.1:{port}",))
    carol = await make_node("carol", host="::1", initial_peers=(f"[::1]:{port}",))
    await until(lambda: alice.peer_count == 2)
    assert {contact.address for contact in alice.server.table} == {
        ("127.0.0.1", bob.address[1]),
        ("::1", carol.address[1]),
    }


@needs_ipv6
async def test_a_link_local_peer_keeps_its_scope(make_node):
    found = [each[4] for each in socket.getaddrinfo(socket.gethostname(), None) if each[4][0].startswith("fe80")]
    interfaces = {f"fe80::%{number}": number for number, _ in socket.if_nameindex()}
    initial = InitialPeers([f"[fe80::1%{next(iter(interfaces.values()))}]:7"], swarm_id="test")
    initial.bind(("::", 1), frozenset({4, 6}))
    (peer,) = initial.texts
    assert await initial.look_up(peer) == [(f"fe80::1%{next(iter(interfaces.values()))}", 7)], found


@pytest.mark.parametrize("peer", ["0.0.0.0:1", "[::]:1", "224.0.0.1:1", "255.255.255.255:1", "[ff02::1]:1", "0:1"])
def test_an_address_of_many_machines_or_none_is_no_peer(peer):
    with pytest.raises(ConfigError, match="is no address of one machine"):
        DHTNode(identity_of("alice"), DHTConfig(initial_peers=(peer,)))


# --- ourselves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["127.0.0.1", "localhost", "us.example", "[::ffff:127.0.0.1]"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", pytest.param("::", marks=needs_ipv6)])
async def test_our_own_address_as_the_only_initial_peer_makes_us_the_founder(make_node, caplog, host, form):
    caplog.set_level("INFO")
    port = free_port()
    alice = await make_node("alice", host=host, port=port, initial_peers=(f"{form}:{port}",))
    assert await alice.put("ffn.", [b"x"]) == 1
    assert not alice.membership.wants_peers
    assert [(each.levelname, each.message) for each in caplog.records if each.name == "p2pmoe.dht.membership"] == [
        ("INFO", "no initial peers but ourselves: this node founds swarm 'p2pmoe', others join through it")
    ]


async def test_one_list_for_all_nodes_whoever_starts_first(make_node):
    ports = [free_port() for _ in range(3)]
    peers = tuple(f"127.0.0.1:{port}" for port in ports)
    alice = await make_node("alice", port=ports[1], initial_peers=peers)
    assert alice.peer_count == 0
    bob = await make_node("bob", port=ports[2], initial_peers=peers)
    carol = await make_node("carol", port=ports[0], initial_peers=peers)
    await until(lambda: alice.peer_count == bob.peer_count == carol.peer_count == 2)


async def test_what_we_are_announced_as_is_ourselves(make_node):
    port = free_port()
    alice = await make_node(
        "alice", port=port, announce_host="Node.Example.", announce_port=4242, initial_peers=("node.example:4242",)
    )
    assert not alice.membership.initial.others or alice.membership.may_be_alone
    bob = await make_node(
        "bob", port=free_port(), announce_host="203.0.113.7", announce_port=4242, initial_peers=("203.0.113.7:4242",)
    )
    assert not bob.membership.wants_peers


async def test_a_client_with_a_nodes_key_reaches_that_node(make_node):
    alice = await make_node("alice")
    client = await make_node("alice", initial_peers=(alice.dht_address,), client_mode=True)
    await alice.put("ffn.", [b"x"])
    assert [record.value for record in await client.get("ffn.")] == [b"x"]


# --- why nobody answers -----------------------------------------------------------------------------------------


async def test_four_faults_four_messages_each_with_its_remedy(make_node):
    closed = free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        alice = await make_node("alice", swarm_id="theirs")
        cases = {
            "no.such.host.invalid:31337": (
                "the name 'no.such.host.invalid' does not resolve: Name or service not known: check its spelling and "
                "this machine's DNS, or give an IP address"
            ),
            f"127.0.0.1:{closed}": (
                f"nobody listens at UDP port {closed} of 127.0.0.1: is the node running, and is this the port of its "
                f"DHT (--dht-port), not that of the calls?"
            ),
            "203.0.113.7:31337": (
                "203.0.113.7:31337 is on another machine, and our DHT listens on 127.0.0.1, which is this machine "
                "alone: pass --host 0.0.0.0, or set dht.host"
            ),
            alice.dht_address: "--swarm-id",
            f"127.0.0.1:{silent.getsockname()[1]}": "a firewall, or a node of another swarm (ours is 'p2pmoe'",
        }
        messages = []
        for peer, said in cases.items():
            bob = await make_node("bob", start=False, initial_peers=(peer,), join_timeout_s=0.3)
            with pytest.raises(BootstrapError) as caught:
                await bob.astart()
            message = str(caught.value)
            messages.append(message.replace(peer, "PEER"))
            assert message.startswith(f"no peer of the DHT answers (initial peers: {peer}): ")
            assert said in message
            assert message.endswith(
                "; else pass another with --initial-peers HOST:PORT, or start without: --allow-alone "
                "(dht.allow_alone = true)"
            )
            assert ("private swarm" in message) == ("another swarm (ours" in said or said == "--swarm-id")
        assert len(set(messages)) == len(cases) - 1, "a node of another swarm is as silent as a firewall"


async def test_a_peer_that_no_datagram_of_ours_can_reach_is_not_waited_for(make_node):
    bob = await make_node("bob", start=False, initial_peers=("203.0.113.7:31337",), join_timeout_s=30)
    with pytest.raises(BootstrapError, match="this machine alone"):
        await bob.astart()


@needs_ipv6
async def test_a_socket_without_the_peers_version_of_ip(make_node):
    bob = await make_node("bob", start=False, initial_peers=("six.example:7",), join_timeout_s=0.2)
    with pytest.raises(BootstrapError, match=r"six\.example:7 has IPv6 addresses only.*--host ::"):
        await bob.astart()


async def test_every_silent_peer_has_its_own_reason(make_node):
    closed = free_port()
    peers = (f"127.0.0.1:{closed}", "no.such.host.invalid:1")
    bob = await make_node("bob", start=False, initial_peers=peers, client_mode=True, join_timeout_s=0.2)
    with pytest.raises(BootstrapError, match=rf"nobody listens at UDP port {closed}.*does not resolve") as caught:
        await bob.astart()
    assert "allow-alone" not in str(caught.value), "a client has nothing to offer by itself"


# --- the join line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::", marks=needs_ipv6)])
async def test_the_join_line_names_an_address_that_others_can_reach(make_node, host):
    alice = await make_node("alice", host=host)
    assert alice.dht_address == format_host_port(reached_at(host), alice.address[1])
    assert not alice.dht_address.startswith(("0.0.0.0", "[::]"))
    bob = await make_node("bob", host=host, initial_peers=(alice.dht_address,))
    assert bob.peer_count == 1


async def test_the_join_line_names_what_is_announced(make_node, caplog):
    alice = await make_node("alice", host="0.0.0.0", announce_host="2001:DB8::7", announce_port=4242)
    assert alice.dht_address == "[2001:db8::7]:4242"
    assert f"the port mapping has to lead to port {alice.address[1]}" in caplog.text


@pytest.mark.parametrize(
    ("host", "outward", "reached"),
    [
        ("192.0.2.7", {}, "192.0.2.7"),
        ("[::ffff:127.0.0.1]", {}, "127.0.0.1"),
        ("0.0.0.0", {4: "192.168.1.2", 6: "2606:4700::1"}, "192.168.1.2"),
        ("::", {4: "192.168.1.2", 6: "fd00::2"}, "192.168.1.2"),
        ("::", {4: "192.168.1.2", 6: "2606:4700::1"}, "2606:4700::1"),
        ("::", {6: "fd00::2"}, "fd00::2"),
        ("0.0.0.0", {}, "127.0.0.1"),
    ],
)
def test_at_which_address_a_machine_is_reached(monkeypatch, host, outward, reached):
    monkeypatch.setattr(addresses, "_outward", outward.get)
    assert reached_at(host) == reached


async def test_a_machine_that_has_loopback_alone_says_so(monkeypatch, make_node, caplog):
    monkeypatch.setattr(addresses, "_outward", lambda _: None)
    alice = await make_node("alice", host="0.0.0.0")
    assert alice.dht_address == f"127.0.0.1:{alice.address[1]}"
    assert [each.getMessage() for each in caplog.records if "loopback alone" in each.getMessage()] == [
        "the DHT listens on all interfaces, but this machine has loopback alone: nobody else reaches it until it has a "
        "network (or announce_host says where it is reached)"
    ]
