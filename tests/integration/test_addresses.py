"""Whole nodes and how they are called: by name, over both versions of IP, through port mappings, with one key twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_processes import Command, run_command
from swarm_kit import WAIT_S, make_backend, serve_http

import p2pmoe
from p2pmoe.config import DHTConfig, HttpConfig, NodeConfig
from p2pmoe.dht.addresses import has_ipv6, reached_at
from p2pmoe.errors import IdentityError, NameLookupError
from p2pmoe.identity import Identity
from p2pmoe.metrics import NodeMetrics
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.rpc.http.documents import HttpDocuments
from p2pmoe.rpc.resolver import Resolver
from p2pmoe.server.handlers import ExpertHandlers
from p2pmoe.server.runtime import Runtime
from p2pmoe.types import Endpoint

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def names(*hosts: str) -> Resolver:
    """A name server for which every name has these addresses."""

    def getaddrinfo(*_, **__):
        if not hosts:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET6 if ":" in host else socket.AF_INET, 1, 6, "", (host, 0)) for host in hosts]

    return Resolver(getaddrinfo)


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def handlers() -> Iterator[ExpertHandlers]:
    backend = make_backend("ffn.0")
    runtime = Runtime(list(backend.get_pools()))
    runtime.start()
    yield ExpertHandlers([backend], [runtime], metrics=NodeMetrics(), peer_id="alice")
    runtime.close()


@pytest.mark.parametrize(
    "hosts", [("127.0.0.9", "127.0.0.1"), ("203.0.113.7", "127.0.0.1"), ("2001:db8::7", "127.0.0.9", "127.0.0.1")]
)
async def test_of_a_peer_announced_by_name_the_address_that_answers_is_called(handlers, hosts):
    """Refused, silent, or without a way to it: the next one is tried."""
    with serve_http(handlers, identity=Identity.generate()) as (served, _):
        endpoint = Endpoint("Alice.Example.", served.port, "https", served.public_key)
        transport = HttpTransport(resolver=names(*hosts))
        try:
            async with asyncio.timeout(WAIT_S):
                assert await transport.get_json(endpoint, "/v2/health/live") == {"live": True}
        finally:
            await transport.close()


@needs_ipv6
async def test_a_peer_whose_name_has_ipv6_addresses_only(handlers):
    with serve_http(handlers, config=HttpConfig(host="::"), identity=Identity.generate()) as (served, _):
        async with HttpDocuments() as documents:
            for host in ("127.0.0.1", "::1", "[::ffff:127.0.0.1]", "127.1"):
                endpoint = Endpoint(host, served.port, "https", served.public_key)
                assert await documents.get_json(endpoint, "/v2/health/live") == {"live": True}
        transport = HttpTransport(resolver=names("::1"))
        try:
            endpoint = Endpoint("six.example", served.port, "https", served.public_key)
            assert await transport.get_json(endpoint, "/v2/health/live") == {"live": True}
        finally:
            await transport.close()


async def test_a_name_that_nobody_resolves_is_said_in_time():
    answer = threading.Event()

    def getaddrinfo(*_, **__):
        assert answer.wait(WAIT_S)
        return []

    endpoint = Endpoint("alice.example", 1, "https", bytes(31) + b"\x01")
    for resolver, said in (
        (names(), "the name 'alice.example' does not resolve: Name or service not known; is the node up"),
        (Resolver(getaddrinfo), "no answer of the name server within 3 s"),
    ):
        transport = HttpTransport(resolver=resolver)
        try:
            with pytest.raises(NameLookupError, match=said):
                await transport.get_json(endpoint, "/v2/health/live")
        finally:
            await transport.close()
    answer.set()


# --- whole nodes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::", marks=needs_ipv6)])
def test_a_node_on_all_interfaces_is_called_at_the_address_in_its_join_line(host):
    config = NodeConfig(http=HttpConfig(host=host), dht=DHTConfig(host=host))
    with (
        p2pmoe.background_node(config, [make_backend("ffn.0")]) as node,
        p2pmoe.Swarm([node.dht_address]) as swarm,
    ):
        assert node.endpoint.host == node.dht_address.rpartition(":")[0].strip("[]") == reached_at(host)
        assert swarm.expert("ffn.0")(torch.randn(2, 4)).shape == (2, 4)


@contextlib.contextmanager
def tcp_mapping(inner_port: int) -> Iterator[int]:
    """A TCP port that leads to another one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    tasks: set[asyncio.Task] = set()

    async def pump(reader, writer) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader, writer) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", inner_port)
        for each in (pump(reader, inner_writer), pump(inner_reader, writer)):
            tasks.add(asyncio.create_task(each))

    async def stop() -> None:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), loop).result(WAIT_S)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


def test_calls_come_through_the_announced_port():
    port = free_port()
    with tcp_mapping(port) as outside:
        config = NodeConfig(http=HttpConfig(port=port, announce_port=outside))
        with (
            p2pmoe.background_node(config, [make_backend("ffn.0")]) as node,
            p2pmoe.Swarm([node.dht_address]) as swarm,
        ):
            assert node.endpoint.port == outside
            (record,) = swarm.find_experts("ffn.*")
            assert (record.endpoint.host, record.endpoint.port) == ("127.0.0.1", outside)
            assert swarm.expert("ffn.0")(torch.randn(2, 4)).shape == (2, 4)


def test_a_second_node_with_the_same_key_file_does_not_start(tmp_path: Path):
    key = str(tmp_path / "identity.pem")
    with p2pmoe.background_node() as carol:
        config = NodeConfig(identity_path=key, dht=DHTConfig(initial_peers=(carol.dht_address,)))
        with p2pmoe.background_node(config, [make_backend("ffn.0")]) as alice:
            with (
                pytest.raises(IdentityError, match=f"in use by a node at {alice.dht_address}.*p2pmoe id new"),
                p2pmoe.background_node(config, [make_backend("ffn.1")]),
            ):
                pass
            with p2pmoe.Swarm([carol.dht_address]) as swarm:
                assert [record.uid for record in swarm.find_experts("ffn.*")] == ["ffn.0"]
        with p2pmoe.background_node(config, [make_backend("ffn.1")]) as again:
            assert again.peer_id == alice.peer_id


# --- the command line -------------------------------------------------------------------------------------------


def test_a_node_starts_alone_with_announced_ports_and_says_both():
    closed = f"127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
    flags = ("--announce-host", "203.0.113.7", "--announce-port", "40080", "--dht-announce-port", "41337")
    with Command(
        "node", "--initial-peers", closed, "--allow-alone", "--json", *flags, P2PMOE_DHT_JOIN_TIMEOUT_S="0.2"
    ) as node:
        described = json.loads(node.stdout.next())
        assert described["endpoint"] == "https://203.0.113.7:40080"
        assert described["dht_address"] == "203.0.113.7:41337"
        assert "--initial-peers 203.0.113.7:41337" in described["join"]
        node.interrupt()
        assert node.wait() == 0
    assert node.stderr.text.count("alone for now, looking for peers in the background: nobody listens at UDP port") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--announce-host", "0.0.0.0"), 3, "announce_host = '0.0.0.0' is no address of one machine"),
        (("--initial-peers", "203.0.113.7:31337"), 6, "which is this machine alone: pass --host 0.0.0.0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(arguments: tuple[str, ...], code: int, said: str):
    found, out, err = run_command("node", *arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
