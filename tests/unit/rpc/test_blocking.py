"""Exchanges of a thread that blocks, with a peer that follows a script: what is kept, when it ends, who is left."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from frame_kit import call_bytes
from swarm_kit import WAIT_S, Gate, make_backend, open_world, same_bits, serve_http

from p2pmoe.errors import InsecureEndpointError, OverloadedError, PeerIdentityError, PeerUnreachableError
from p2pmoe.identity import Identity
from p2pmoe.protocol.frames import EncodedFrame, describe_tensors, encode_frame
from p2pmoe.protocol.messages import ResponseHeader
from p2pmoe.rpc.deadline import Deadline
from p2pmoe.rpc.http import blocking, link
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.types import Endpoint

X = torch.ones(1, 4)
Answer = Callable[[socket.socket, int], None]
"""What a peer does on a connection once it has read the request of this number, counted over all connections."""


def result(call_id: str, *tensors: torch.Tensor) -> bytes:
    headers, memories = describe_tensors(tensors)
    return b"".join(encode_frame(ResponseHeader(id=call_id, outputs=headers), memories).buffers)


def whole(body: bytes, status: str = "200 OK", *lines: str) -> bytes:
    head = [f"HTTP/1.1 {status}", *lines, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(head).encode() + body


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


class ScriptedPeer:
    """Listens; answers each request by the script. Counts connections and requests."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("127.0.0.1", self._socket.getsockname()[1])
        self.connections = self.requests = 0
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                connection.settimeout(WAIT_S)
                self.connections += 1
                self._open.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,), daemon=True))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError), connection:
            while True:
                while b"\r\n\r\n" not in data:
                    data += self._more(connection)
                head, _, data = data.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                while len(data) < length:
                    data += self._more(connection)
                data = data[length:]
                self.requests += 1
                self._answer(connection, self.requests)

    @staticmethod
    def _more(connection: socket.socket) -> bytes:
        received = connection.recv(65536)
        if not received:
            raise OSError("closed")
        return received

    def close(self) -> None:
        for each in (self._socket, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(WAIT_S)


@pytest.fixture
def peer() -> Iterator[Callable[[bytes | Answer], ScriptedPeer]]:
    peers: list[ScriptedPeer] = []

    def make(answer: bytes | Answer) -> ScriptedPeer:
        peers.append(ScriptedPeer(answer if callable(answer) else lambda there, _: there.sendall(answer)))
        return peers[-1]

    yield make
    for each in peers:
        each.close()


@pytest.fixture
async def transport() -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(connect_timeout_s=1.0)
    transport._open()
    yield transport
    await transport.close()


async def block(
    transport: HttpTransport, endpoint: Endpoint, *, timeout_s: float = WAIT_S, x: torch.Tensor = X
) -> list[Any] | None:
    data = call_bytes(x, id="a")

    def exchange() -> list[Any] | None:
        deadline = Deadline(time.monotonic() + timeout_s)
        replies = transport.try_exchange(endpoint, [EncodedFrame((data,), len(data))], lambda header: True, deadline)
        return None if replies is None else [(frame.header.id, *frame.tensors) for frame in replies]

    return await asyncio.wait_for(asyncio.to_thread(exchange), WAIT_S)


async def test_one_connection_serves_one_exchange_after_the_other(transport: HttpTransport, peer: Any) -> None:
    there = peer(whole(result("a", X)))
    for _ in range(5):
        received = await block(transport, there.endpoint)
        assert received is not None
        ((call_id, y),) = received
        assert call_id == "a" and same_bits(y, X)
    assert (there.connections, there.requests) == (1, 5)
    assert transport.exchanges == 5
    assert transport.bytes_sent == 5 * len(call_bytes(X, id="a"))
    assert transport.bytes_received == 5 * len(result("a", X))


@pytest.mark.parametrize("pieces", [1, 2, 7])
async def test_a_chunked_answer_is_read_and_the_connection_kept(
    transport: HttpTransport, peer: Any, pieces: int
) -> None:
    body = result("a", X) + result("b", X * 2)
    size = -(-len(body) // pieces)
    there = peer(chunked(*(body[start : start + size] for start in range(0, len(body), size))))
    for _ in range(2):
        received = await block(transport, there.endpoint)
        assert received is not None and [each[0] for each in received] == ["a", "b"]
        assert same_bits(received[1][1], X * 2)
    assert there.connections == 1


async def test_an_answer_that_ends_with_its_connection(transport: HttpTransport, peer: Any) -> None:
    def answer(there: socket.socket, number: int) -> None:
        there.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + result("a", X))
        there.shutdown(socket.SHUT_RDWR)

    there = peer(answer)
    for _ in range(2):
        assert len(await block(transport, there.endpoint) or ()) == 1
    assert there.connections == 2


async def test_a_large_tensor_arrives_bit_for_bit(transport: HttpTransport, peer: Any) -> None:
    x = torch.randn(700, 301)
    there = peer(whole(result("a", x, x[:3]) + result("b", x)))
    received = await block(transport, there.endpoint, x=x)
    assert received is not None
    (_, first, second), (_, third) = received
    assert same_bits(first, x) and same_bits(second, x[:3]) and same_bits(third, x)


async def test_a_connection_closed_while_idle_is_replaced(transport: HttpTransport, peer: Any) -> None:
    def answer(there: socket.socket, number: int) -> None:
        there.sendall(whole(result("a", X)))
        there.shutdown(socket.SHUT_RDWR)

    there = peer(answer)
    for _ in range(5):
        assert len(await block(transport, there.endpoint) or ()) == 1


async def test_a_peer_that_never_answers_is_asked_on_one_connection_only(transport: HttpTransport, peer: Any) -> None:
    there = peer(lambda there, number: there.shutdown(socket.SHUT_RDWR))
    with pytest.raises(PeerUnreachableError):
        await block(transport, there.endpoint)
    assert (there.connections, there.requests) == (1, 1)


async def test_bytes_that_nobody_asked_for_answer_nothing(
    transport: HttpTransport, peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second answer on an idle connection must not be taken for that of the next request."""
    monkeypatch.setattr(link, "_QUIET_S", 0.0)

    def answer(there: socket.socket, number: int) -> None:
        there.sendall(whole(result("a", X * number)))
        sent.wait(WAIT_S)
        there.sendall(whole(result("a", X * 99)))
        late.set()

    sent, late = threading.Event(), threading.Event()
    there = peer(answer)
    first = await block(transport, there.endpoint)
    sent.set()
    assert await asyncio.to_thread(late.wait, WAIT_S)
    second = await block(transport, there.endpoint)
    assert first is not None and second is not None
    assert same_bits(first[0][1], X) and same_bits(second[0][1], X * 2)
    assert there.connections == 2


@pytest.mark.parametrize(
    "begin", [b"", b"HTTP/1.1 200 OK\r\nX: ", whole(result("a", X))[:-40], chunked(result("a", X))[:40]]
)
async def test_a_trickle_ends_at_the_deadline(transport: HttpTransport, peer: Any, begin: bytes) -> None:
    """A byte now and then must not keep the caller waiting, wherever in the answer."""
    over = threading.Event()

    def answer(there: socket.socket, number: int) -> None:
        there.sendall(begin)
        while not over.wait(0.02):
            there.sendall(b"y")

    there = peer(answer)
    started = time.monotonic()
    try:
        with pytest.raises((TimeoutError, PeerUnreachableError)):
            await block(transport, there.endpoint, timeout_s=0.3)
        assert time.monotonic() - started < 2.0
    finally:
        over.set()


async def test_a_peer_that_does_not_read_ends_at_the_deadline(transport: HttpTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await block(transport, Endpoint(*listening.getsockname()), timeout_s=0.3, x=torch.ones(4, 4 * 1024 * 1024))
        assert time.monotonic() - started < 2.0


async def test_a_refusal_is_its_own_error_and_its_connection_is_closed(transport: HttpTransport, peer: Any) -> None:
    there = peer(whole(b'{"error": "because"}', "429 Too Many", "Retry-After: 7"))
    for _ in range(2):
        with pytest.raises(OverloadedError, match="because") as caught:
            await block(transport, there.endpoint)
        assert caught.value.retry_after_s == 7.0
    assert there.connections == 2


async def test_close_wakes_a_waiting_thread(transport: HttpTransport, peer: Any) -> None:
    asked = threading.Event()
    there = peer(lambda there, number: asked.set())
    waiting = asyncio.create_task(block(transport, there.endpoint))
    assert await asyncio.to_thread(asked.wait, WAIT_S)
    await transport.close()
    with pytest.raises(PeerUnreachableError):
        await waiting
    assert await block(transport, there.endpoint) is None


async def test_idle_connections_are_closed_after_a_while(
    transport: HttpTransport, peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = peer(whole(result("a", X)))
    await block(transport, there.endpoint)
    assert transport._blocking.sweep() == 1
    monkeypatch.setattr(blocking, "IDLE_S", 0.0)
    assert transport._blocking.sweep() == 0
    await block(transport, there.endpoint)
    assert there.connections == 2


async def test_what_has_no_deadline_or_no_session_is_left_to_the_loop(peer: Any) -> None:
    there = peer(whole(result("a", X)))
    named = Endpoint("localhost", there.endpoint.port)
    unknown = there.endpoint.with_public_key(bytes(32))
    transport = HttpTransport(identity=Identity.generate())
    assert await block(transport, there.endpoint) is None  # its loop is not known yet
    transport._open()
    assert await block(transport, named) is None
    assert await block(transport, unknown) is None
    assert there.connections == 0
    assert await block(transport, there.endpoint) is not None
    await transport.close()


@pytest.mark.parametrize("authorization", ["Bearer old", None])
async def test_a_session_that_the_node_forgot_or_wants_now_is_left_to_the_loop(
    peer: Any, authorization: str | None
) -> None:
    there = peer(whole(b'{"error": "who are you"}', "401 Unauthorized"))
    endpoint = there.endpoint.with_public_key(bytes(32))
    transport = HttpTransport(identity=Identity.generate())
    transport._open()
    from p2pmoe.rpc.http.client_sessions import _Session

    transport._sessions._sessions[endpoint] = _Session(authorization, time.monotonic() + 100)
    assert await block(transport, endpoint) is None
    assert there.requests == 1
    await transport.close()


@pytest.mark.parametrize(
    "endpoint", [Endpoint("192.0.2.1", 80), Endpoint("127.0.0.1", 80, "https"), Endpoint("127.0.0.1", 80, "ftp")]
)
async def test_an_endpoint_that_is_not_safe_is_not_called(transport: HttpTransport, endpoint: Endpoint) -> None:
    with pytest.raises(InsecureEndpointError):
        await block(transport, endpoint)


async def test_another_peers_certificate_is_refused(transport: HttpTransport) -> None:
    """The handshake itself fails: the node sees no request."""

    class Nobody:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("a request arrived")

    with serve_http(Nobody(), identity=Identity.generate()) as (endpoint, _), pytest.raises(PeerIdentityError):
        await block(transport, endpoint.with_public_key(Identity.generate().public_key))


async def test_a_peer_without_tls_is_unreachable(transport: HttpTransport, peer: Any) -> None:
    def answer(there: socket.socket, number: int) -> None:
        raise AssertionError("a request arrived")

    there = peer(answer)
    endpoint = Endpoint("127.0.0.1", there.endpoint.port, "https", bytes(32))
    with pytest.raises((PeerUnreachableError, TimeoutError)):
        await block(transport, endpoint, timeout_s=0.5)


@pytest.mark.parametrize("carrier", ["http", "https"])
def test_a_lone_caller_takes_this_way_and_a_crowd_does_not(carrier: str) -> None:
    gate = Gate()
    with open_world({"alice": [make_backend("ffn.0", gate)]}, carrier=carrier) as world:
        expert, x = world.swarm.expert("ffn.0"), torch.ones(1, 4)
        lone = world.swarm.dispatcher._lone
        assert lone is not None
        expert(x)
        expert(x).sum().backward()
        assert lone.exchanges == lone.calls == world.swarm.dispatcher.exchanges == 3
        gate.armed = True
        threads = [threading.Thread(target=expert, args=(x,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + WAIT_S
        while world.swarm.dispatcher.unanswered < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert world.swarm.dispatcher.unanswered == 8
        assert 1 <= lone.running <= 4
        gate.go.set()
        for thread in threads:
            thread.join(WAIT_S)
        assert world.swarm.dispatcher.unanswered == 0
        assert world.swarm.dispatcher.calls == 11
