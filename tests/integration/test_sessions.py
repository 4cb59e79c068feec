"""Who may call, over real sockets: the handshake of transport and server, lists, swarm keys, limits, admins."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import pytest
import torch
from door_kit import ADMIN_TOKEN, ALICE, BOB, NODE, SWARM, Clock, X, call, call_once, client, guard
from swarm_kit import WAIT_S, make_backend, open_world

import p2pmoe
from p2pmoe.client.directory import StaticDirectory
from p2pmoe.config import NodeConfig
from p2pmoe.errors import (
    AccessDeniedError,
    AuthenticationError,
    BootstrapError,
    OverloadedError,
    PeerUnreachableError,
)
from p2pmoe.experts.directory import Provider
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.protocol.sessions import SessionNonce, make_session_request
from p2pmoe.types import Endpoint


class Raw:
    """Plain HTTP, one document at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.url = endpoint.url

    async def __call__(
        self, path: str, document: Any = None, *, method: str = "POST", **headers: str
    ) -> tuple[int, Any, Any]:
        body = None if document is None else json.dumps(document)
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(WAIT_S)) as session,
            session.request(method, self.url + path, data=body, headers=headers) as response,
        ):
            text = await response.text()
            kind = response.headers.get("Content-Type", "")
            return response.status, json.loads(text) if "json" in kind else text, response.headers

    async def log_in(self, request: Any) -> tuple[int, Any]:
        status, document, _ = await self("/p2pmoe/v1/session", msgspec.to_builtins(request))
        return status, document

    async def nonce(self) -> SessionNonce:
        status, document, _ = await self("/p2pmoe/v1/session/nonce")
        assert status == 200
        return msgspec.convert(document, SessionNonce)


# ------------------------------------------------------------------------------------------- handshake


@pytest.mark.parametrize("config", [{}, {"mode": "identified"}, {"allow": (ALICE.peer_id,)}])
async def test_a_client_opens_one_session_and_calls(config: dict[str, Any]) -> None:
    with guard(**config) as node:
        async with client(ALICE) as transport:
            results = await asyncio.gather(*(call_once(transport, node.endpoint) for _ in range(8)))
            assert all(torch.allclose(each, results[0]) for each in results)
            assert list(node.handlers._quota._accounts) == [ALICE.peer_id]
            assert len(node.access._sessions._spent) == 1, "eight calls at once shook hands once"
            await call_once(transport, node.endpoint)
            assert len(node.access._sessions._spent) == 1


async def test_a_session_that_ended_or_was_forgotten_is_opened_again() -> None:
    with guard(mode="identified") as node:
        async with client(ALICE) as transport:
            await call_once(transport, node.endpoint)
            node.clock.now += 601
            await call_once(transport, node.endpoint)
            node.access._sessions._secret = bytes(32)  # as after a restart
            node.access._known.clear()
            assert (await call_once(transport, node.endpoint, rows=200_000)).shape == (200_000, 4)


async def test_sessions_are_renewed_before_they_end() -> None:
    with guard(mode="identified") as node:
        async with client(ALICE) as transport:
            transport._sessions._clock = clock = Clock()
            await call_once(transport, node.endpoint)
            clock.now += 0.81 * 600
            await call_once(transport, node.endpoint)
            assert len(node.access._sessions._spent) == 2


async def test_a_replayed_nonce_is_refused() -> None:
    with guard() as node:
        raw = Raw(node.endpoint)
        request = make_session_request(ALICE, NODE.public_key, await raw.nonce(), None)
        assert (await raw.log_in(request))[0] == 200
        status, document = await raw.log_in(request)
        assert status == 401
        assert "used before" in document["error"]


async def test_forged_signatures_and_those_for_another_node_are_refused() -> None:
    with guard() as node:
        raw = Raw(node.endpoint)
        for signer, node_key in ((ALICE, BOB.public_key), (BOB, NODE.public_key)):
            request = make_session_request(signer, node_key, await raw.nonce(), None)
            request = msgspec.structs.replace(request, public_key=ALICE.public_key.hex())
            status, document = await raw.log_in(request)
            assert (status, document["code"]) == (401, 401)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[" * 2000, b'{"public_key": "zz"}', b"\xff\xfe", b'"' + b"x" * 5000, b"null"]
)
async def test_a_malformed_request_is_one_clear_error(body: bytes) -> None:
    with guard() as node:
        async with (
            aiohttp.ClientSession() as session,
            session.post(node.endpoint.url + "/p2pmoe/v1/session", data=body) as response,
        ):
            assert response.status in (400, 413)
            assert (await response.json())["error"]
        async with client(ALICE) as transport:
            await call_once(transport, node.endpoint)


async def test_the_token_of_another_node_is_refused_and_no_log_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with guard() as first, guard() as second:
        raw = Raw(first.endpoint)
        request = make_session_request(ALICE, NODE.public_key, await raw.nonce(), None)
        token = (await raw.log_in(request))[1]["token"]
        for headers in ({"Authorization": f"Bearer {token}"}, {"Authorization": "Basic YTpi"}):
            status, document, answered = await Raw(second.endpoint)("/v2/models/ffn.0/infer", {}, **headers)
            assert status == 401
            assert token not in document["error"]
            assert answered["WWW-Authenticate"].startswith("Bearer")
        assert token not in caplog.text
        assert request.signature not in caplog.text


async def test_a_node_in_the_middle_cannot_use_what_it_is_told() -> None:
    """Mallory announces the real node's address under her own key: the client signs for her, the node refuses."""
    with guard(mode="identified") as node:
        async with client(ALICE) as transport:
            with pytest.raises(AuthenticationError, match="signature"):
                await call_once(transport, replace(node.endpoint, public_key=BOB.public_key))


# ------------------------------------------------------------------------------------------- who may


async def test_the_denied_and_those_who_are_not_allowed_get_403() -> None:
    with guard(allow=(ALICE.peer_id, BOB.peer_id), deny=(BOB.peer_id,)) as node:
        for who in (BOB, Identity.generate()):
            async with client(who) as transport:
                with pytest.raises(AccessDeniedError, match=who.peer_id):
                    await call_once(transport, node.endpoint)
        async with client() as anonymous:
            with pytest.raises(AuthenticationError, match="known callers only"):
                await call_once(anonymous, node.endpoint)
        async with client(ALICE) as transport:
            await call_once(transport, node.endpoint)


async def test_only_holders_of_the_swarm_key_call() -> None:
    with guard(swarm_key=SWARM) as node:
        for key in (None, SwarmKey.generate()):
            async with client(ALICE, key) as transport:
                with pytest.raises(AccessDeniedError, match="swarm"):
                    await call_once(transport, node.endpoint)
        async with client(ALICE, SWARM) as transport:
            await call_once(transport, node.endpoint)


async def test_a_refusal_is_believed_for_a_while() -> None:
    with guard(deny=(ALICE.peer_id,)) as node:
        async with client(ALICE) as transport:
            transport._sessions._clock = clock = Clock()
            for _ in range(3):
                with pytest.raises(AccessDeniedError):
                    await call_once(transport, node.endpoint)
            posted = node.access._addresses["127.0.0.1"].bucket._level
            assert posted == 49.0, "one handshake, not three"
            clock.now += 6
            with pytest.raises(AccessDeniedError):
                await call_once(transport, node.endpoint)
            assert node.access._addresses["127.0.0.1"].bucket._level == 48.0


@pytest.mark.parametrize("closed", [False, True])
async def test_a_client_of_the_public_protocol_is_served_where_the_door_is_open(closed: bool) -> None:
    with guard(mode="identified" if closed else "open") as node:
        raw = Raw(node.endpoint)
        tensor = {"name": "0", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
        status, document, _ = await raw("/v2/models/ffn.0/infer", {"inputs": [tensor]})
        assert status == (401 if closed else 200), document
        for path in ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/ffn.0", "/p2pmoe/v1/experts/ffn.0"):
            assert (await raw(path, method="GET"))[0] == 200, path


async def test_a_node_without_sessions_and_one_without_a_known_key_are_called_without() -> None:
    with open_world({"alice": [make_backend("ffn.0")]}, carrier="http") as world:
        endpoint = world.alice.endpoint
        async with client(ALICE) as transport:
            for each in (replace(endpoint, public_key=NODE.public_key), endpoint):
                await call_once(transport, each)
                await call_once(transport, each)


async def test_a_silent_node_does_not_hold_the_handshake_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = Endpoint("127.0.0.1", silent.getsockname()[1], "http", NODE.public_key)
        async with client(ALICE) as transport:
            transport._sessions._timeout_s = 0.2
            started = time.monotonic()
            with pytest.raises(PeerUnreachableError, match="session"):
                await call_once(transport, endpoint)
            assert time.monotonic() - started < WAIT_S / 2


# ------------------------------------------------------------------------------------------- limits


async def test_rates_are_counted_for_each_caller_and_refused_with_a_time() -> None:
    with guard(limits={"caller_calls_per_s": 4.0, "caller_burst_s": 1.0}) as node:
        async with client(ALICE) as alice, client(BOB) as bob, client() as anonymous:
            results = await call(alice, node.endpoint, count=6)
            refused = [each for each in results if isinstance(each, OverloadedError)]
            assert len(refused) == 2
            assert 0 < refused[0].retry_after_s <= 1
            for other in (bob, anonymous):
                await call_once(other, node.endpoint)
            node.clock.now += 1.0
            await call_once(alice, node.endpoint)


async def test_a_large_call_is_refused_by_its_header() -> None:
    limits = {"caller_bytes_per_s": 1000.0, "caller_burst_s": 1.0}
    with guard(limits=limits) as node:
        async with client(ALICE) as alice:
            await call_once(alice, node.endpoint, rows=62)
            with pytest.raises(OverloadedError, match="tensor bytes"):
                await call_once(alice, node.endpoint, rows=1)
            node.clock.now += 1.0
            await call_once(alice, node.endpoint, rows=1)


async def test_the_public_protocol_is_answered_429_with_retry_after() -> None:
    with guard(limits={"caller_calls_per_s": 0.1, "caller_burst_s": 1.0}) as node:
        raw = Raw(node.endpoint)
        tensor = {"name": "0", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
        assert (await raw("/v2/models/ffn.0/infer", {"inputs": [tensor]}))[0] == 200
        status, document, headers = await raw("/v2/models/ffn.0/infer", {"inputs": [tensor]})
        assert (status, headers["Retry-After"]) == (429, "10"), document


# ------------------------------------------------------------------------------------------- admins


def own_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if address.startswith("127.") else address


async def test_metrics_are_for_this_machine_and_for_admins() -> None:
    outside = own_address()
    with guard(host="0.0.0.0") as node:
        inside = Raw(Endpoint("127.0.0.1", node.endpoint.port))
        assert (await inside("/metrics", method="GET"))[0] == 200
        assert (await inside("/metrics", method="GET", Host=f"localhost:{node.endpoint.port}"))[0] == 200
        if outside is None:
            pytest.skip("this machine has no address but loopback")
        raw = Raw(Endpoint(outside, node.endpoint.port))
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Forwarded-For": "127.0.0.1"}):
            status, document, _ = await raw("/metrics", method="GET", **headers)
            assert status == 401
            assert "token_path" in document["error"]
        assert (await raw("/metrics", method="GET", Authorization=f"Bearer {ADMIN_TOKEN.decode()}"))[0] == 200
        assert (await raw("/v2/health/ready", method="GET"))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "203.0.113.9"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Host": "node.example.org"},
        {"Host": "evil.example:80"},
        {"Host": "localhost.example.org"},
    ],
)
async def test_a_proxy_or_a_foreign_name_on_loopback_is_not_local(headers: dict[str, str]) -> None:
    with guard() as node:
        raw = Raw(node.endpoint)
        assert (await raw("/metrics", method="GET", **headers))[0] == 401
        headers |= {"Authorization": f"Bearer {ADMIN_TOKEN.decode()}"}
        assert (await raw("/metrics", method="GET", **headers))[0] == 200


@pytest.mark.parametrize(
    "path", ["/metrics", "/v2", "/v2/health/live", "/p2pmoe/v1/experts", "/nowhere", "/v2/models/x"]
)
async def test_documents_carry_strict_headers(path: str) -> None:
    with guard() as node:
        headers = (await Raw(node.endpoint)(path, method="GET"))[2]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"


# ------------------------------------------------------------------------------------------- the whole


def provider(node: p2pmoe.Node) -> Provider:
    return Provider(
        node.peer_id, node.endpoint, node.backends[0].schema_digest, expires_at=time.time() + 60, sequence=1
    )


def test_a_node_and_a_swarm_shake_hands_and_a_stranger_is_told_why(tmp_path: Any) -> None:
    path = tmp_path / "swarm.key"
    SWARM.save(path)
    config = NodeConfig.from_tree({"access": {"swarm_key_path": str(path), "deny": [BOB.peer_id]}})
    with p2pmoe.background_node(config, [make_backend("ffn.0")]) as node:

        def train(**options: Any) -> None:
            with p2pmoe.Swarm([node.dht_address], timeout_s=WAIT_S, **options) as swarm:
                swarm.expert("ffn.0", forward_timeout_s=WAIT_S)(X)

        train(identity=ALICE, swarm_key=SWARM)
        with pytest.raises(AccessDeniedError):
            train(identity=BOB, swarm_key=SWARM)
        with pytest.raises(BootstrapError, match="private swarm"):  # without the key not even the DHT answers
            train(identity=ALICE)
        with (
            p2pmoe.Swarm(  # one who knows the way all the same
                directory=StaticDirectory({"ffn.0": [provider(node)]}), identity=ALICE, timeout_s=WAIT_S
            ) as swarm,
            pytest.raises(AccessDeniedError),
        ):
            swarm.expert("ffn.0", forward_timeout_s=WAIT_S)(X)
