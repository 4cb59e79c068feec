"""Connections to strangers: what the pinned key lets through, and what it does not, against real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from swarm_kit import WAIT_S, World, make_backend, open_world, serve_http, trusting_context, until

import p2pmoe
from p2pmoe.client.directory import StaticDirectory
from p2pmoe.errors import InsecureEndpointError, P2PMoEError, PeerIdentityError, PeerUnreachableError
from p2pmoe.experts.directory import Provider
from p2pmoe.identity import Identity
from p2pmoe.identity.certificate import CertificateSource, install_certificate, make_certificate
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.rpc.http.documents import HttpDocuments
from p2pmoe.rpc.http.tls import server_context
from p2pmoe.types import Endpoint, PeerId

ALICE, BOB, MALLORY = (Identity.from_seed(name.ljust(32, b"\0")) for name in (b"alice", b"bob", b"mallory"))
DAY_S = 86_400.0
LIVE = "/v2/health/live"


class Recorder:
    """A TLS server that keeps every byte a caller sends it once the handshake is over."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self.received = b""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=WAIT_S)

    def endpoint(self, public_key: bytes | None) -> Endpoint:
        assert self._server is not None
        return Endpoint("127.0.0.1", self._server.sockets[0].getsockname()[1], "https", public_key)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while chunk := await reader.read(65536):
                self.received += chunk
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()


def context_of(identity: Identity, certificate: Any = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    install_certificate(context, identity, certificate or make_certificate(identity, time.time()))
    return context


@pytest.fixture
async def transport() -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(connect_timeout_s=WAIT_S)
    yield transport
    await transport.close()


@pytest.fixture
def world() -> Iterator[World]:
    with open_world({"alice": [make_backend("ffn.0")]}, carrier="https") as world:
        yield world


async def refused(transport: HttpTransport, endpoint: Endpoint, kind: type[P2PMoEError] = PeerIdentityError) -> str:
    """The message with which both ways to a peer refuse it."""
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(kind) as document:
            await transport.get_json(endpoint, LIVE)
        with pytest.raises(kind) as exchange:
            await anext(transport.exchange(endpoint, [], lambda header: True))
    assert type(document.value) is type(exchange.value)
    return str(exchange.value)


async def test_the_holder_of_the_key_is_called(world: World, transport: HttpTransport) -> None:
    endpoint = world.alice.endpoint
    assert endpoint.url.startswith("https://")
    assert await transport.get_json(endpoint, LIVE) == {"live": True}
    async with HttpDocuments() as documents:
        assert await documents.get_json(endpoint, LIVE) == {"live": True}
    x = torch.randn(3, 4)
    assert torch.equal(world.swarm.expert("ffn.0")(x), world.backend("ffn.0").forward(x)[0])


async def test_a_man_in_the_middle_gets_nothing(world: World, transport: HttpTransport) -> None:
    """Mallory ends TLS with a key of her own and would pass everything on to alice."""
    async with Recorder(context_of(MALLORY)) as mallory:
        message = await refused(transport, mallory.endpoint(world.alice.endpoint.public_key))
        assert MALLORY.peer_id in message
        assert "stands in between" in message
        assert mallory.received == b""


async def test_a_relay_without_a_key_changes_nothing_and_reads_nothing(world: World, transport: HttpTransport) -> None:
    """Mallory passes alice's own bytes on: the pin holds end to end, and what she sees is no plain text."""
    seen = b""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                seen += chunk
                writer.write(chunk)
        writer.transport.abort()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection(world.alice.endpoint.host, world.alice.endpoint.port)
        await asyncio.gather(pump(reader, onward[1]), pump(onward[0], writer))

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        document = await transport.get_json(replace(world.alice.endpoint, port=port), "/p2pmoe/v1/experts/ffn.0")
        assert document["schema_digest"] == world.backend("ffn.0").schema_digest
        await transport.close()
    assert len(seen) > 500
    assert b"ffn.0" not in seen
    assert b"HTTP" not in seen


async def test_a_stale_record_after_a_key_change(transport: HttpTransport) -> None:
    """The record in the DHT still names the old key; the node at that address has made itself a new one."""
    with serve_http(None, identity=BOB) as (endpoint, _):
        message = await refused(transport, endpoint.with_public_key(ALICE.public_key))
        assert ALICE.peer_id in message
        assert BOB.peer_id in message
        assert "older than the peer's present key" in message
        assert await transport.get_json(endpoint, LIVE) == {"live": True}


@pytest.mark.parametrize(("made_days_ago", "fine"), [(-0.99, True), (-1.1, False), (29.9, True), (30.1, False)])
async def test_certificates_outside_their_validity(transport: HttpTransport, made_days_ago: float, fine: bool) -> None:
    certificate = make_certificate(ALICE, time.time() - made_days_ago * DAY_S)
    async with Recorder(context_of(ALICE, certificate)) as alice:
        endpoint = alice.endpoint(ALICE.public_key)
        if not fine:
            assert "check the clocks" in await refused(transport, endpoint)
            assert alice.received == b""
            return
        call = asyncio.create_task(transport.get_json(endpoint, LIVE))
        async with asyncio.timeout(WAIT_S):
            await until(lambda: alice.received)
        call.cancel()


async def test_a_certificate_of_another_node(transport: HttpTransport) -> None:
    """Mallory copies alice's certificate. Without alice's private key TLS itself does not get that far, so she can only
    put alice's name on her own key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(p2pmoe.errors.IdentityError, match="cannot be loaded"):
        install_certificate(context, MALLORY, make_certificate(ALICE, time.time()))
    async with Recorder(context_of(BOB)) as bob:
        assert BOB.peer_id in await refused(transport, bob.endpoint(ALICE.public_key))
        assert bob.received == b""


async def test_two_peers_behind_one_address_share_no_connection(transport: HttpTransport) -> None:
    """A warm connection to bob must not serve a call that is meant for alice."""
    with serve_http(None, identity=BOB) as (endpoint, _):
        assert await transport.get_json(endpoint, LIVE) == {"live": True}
        await refused(transport, endpoint.with_public_key(ALICE.public_key))
        assert await transport.get_json(endpoint, LIVE) == {"live": True}


@pytest.mark.parametrize(
    "endpoint",
    [
        Endpoint("192.0.2.1", 80, "http", ALICE.public_key),
        Endpoint("example.invalid", 80, "http"),
        Endpoint("127.0.0.1", 1, "https"),
        Endpoint("127.0.0.1", 1, "ftp", ALICE.public_key),
    ],
)
async def test_records_that_would_lower_the_guard_are_refused(transport: HttpTransport, endpoint: Endpoint) -> None:
    assert "is not called" in await refused(transport, endpoint, InsecureEndpointError)
    async with HttpDocuments() as documents:
        with pytest.raises(InsecureEndpointError):
            await documents.get_json(endpoint, LIVE)


def test_another_provider_is_tried_when_the_key_is_wrong() -> None:
    hosts = {name: [make_backend("ffn.0")] for name in ("alice", "bob")}
    with open_world(hosts, carrier="https") as world:
        wrong = world.alice.endpoint.with_public_key(MALLORY.public_key)
        digest = world.backend("ffn.0").schema_digest
        providers = [
            Provider(PeerId("alice"), wrong, digest, float("inf"), 1),
            Provider(PeerId("bob"), world.bob.endpoint, digest, float("inf"), 1),
        ]
        with p2pmoe.Swarm(directory=StaticDirectory({"ffn.0": providers}), timeout_s=WAIT_S) as swarm:
            x = torch.randn(2, 4)
            assert torch.equal(swarm.expert("ffn.0")(x), world.bob.backends["ffn.0"].forward(x)[0])


async def test_a_peer_that_speaks_no_tls_is_unreachable(transport: HttpTransport) -> None:
    with serve_http(None) as (plain, _):
        wrong = Endpoint(plain.host, plain.port, "https", ALICE.public_key)
        with pytest.raises(PeerUnreachableError, match="TLS"):
            await transport.get_json(wrong, LIVE)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
def test_openssl_sees_tls_1_3_and_nothing_older(world: World) -> None:
    where = f"127.0.0.1:{world.alice.endpoint.port}"

    def connect(*options: str) -> subprocess.CompletedProcess[str]:
        command = ["openssl", "s_client", "-connect", where, *options]
        return subprocess.run(command, input="", capture_output=True, text=True, timeout=WAIT_S, check=False)

    shown = connect("-alpn", "http/1.1")
    assert "TLSv1.3" in shown.stdout
    assert "Ed25519" in shown.stdout.replace("ED25519", "Ed25519")
    assert "ALPN protocol: http/1.1" in shown.stdout
    for older in ("-tls1_2", "-tls1_1"):
        refused = connect(older)
        assert refused.returncode != 0
        assert "Cipher is (NONE)" in refused.stdout


def test_older_versions_are_refused_from_python_too(world: World) -> None:
    context = trusting_context()
    address = (world.alice.endpoint.host, world.alice.endpoint.port)
    with socket.create_connection(address, timeout=WAIT_S) as raw, context.wrap_socket(raw) as connection:
        assert connection.version() == "TLSv1.3"
        assert not connection.session_reused
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(address, timeout=WAIT_S) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw)


def test_plain_http_to_a_tls_port_is_harmless(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    address = (world.alice.endpoint.host, world.alice.endpoint.port)
    for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 100, b"\x16\x03\x01\xff\xff" + b"\xff" * 70_000):
        with socket.create_connection(address, timeout=WAIT_S) as raw:
            with contextlib.suppress(OSError):
                raw.sendall(data)
            answer = b""
            with contextlib.suppress(OSError):
                while chunk := raw.recv(4096):
                    answer += chunk
        assert b"HTTP" not in answer
    assert torch.is_tensor(world.swarm.expert("ffn.0")(torch.ones(1, 4)))
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []


async def test_a_renewed_certificate_serves_new_connections(tmp_path: Path, transport: HttpTransport) -> None:
    now = time.time() - 20 * DAY_S
    source = CertificateSource(ALICE, server_context(), clock=lambda: now)
    async with Recorder(source.context) as alice:
        before = await leaf_of(alice.endpoint(None))
        assert not source.renew_if_due()
        now = time.time()
        assert source.renew_if_due()
        after = await leaf_of(alice.endpoint(None))
    assert before != after
    assert not source.renew_if_due()


async def leaf_of(endpoint: Endpoint) -> bytes:
    context = trusting_context()
    async with asyncio.timeout(WAIT_S):
        _, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context)
        leaf = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
    assert isinstance(leaf, bytes)
    return leaf
