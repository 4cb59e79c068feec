"""The calling side over HTTP against a server that may say anything: typed errors, no memory but what was asked for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import torch
from frame_kit import BAD_HEADERS, call_bytes, raw_frame
from swarm_kit import WAIT_S, make_backend, open_world

from p2pmoe import BatchTensorProto
from p2pmoe.client.calls import Call, CallGroup, make_call
from p2pmoe.client.exchange import Dispatcher
from p2pmoe.config import LimitsConfig
from p2pmoe.errors import (
    CallError,
    ClosedError,
    DeadlineError,
    DecodeError,
    DrainingError,
    OverloadedError,
    P2PMoEError,
    PeerUnreachableError,
    TooLargeError,
    WireVersionError,
)
from p2pmoe.protocol.frames import EncodedFrame, FrameLimits, describe_tensors, encode_frame
from p2pmoe.protocol.messages import ResponseHeader
from p2pmoe.rpc.deadline import Deadline
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.types import Endpoint

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
X = torch.ones(1, 4)
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"


def result(call_id: str, *tensors: torch.Tensor, **header: Any) -> bytes:
    headers, memories = describe_tensors(tensors)
    frame = encode_frame(ResponseHeader(id=call_id, outputs=headers, **header), memories)
    return b"".join(frame.buffers)


def whole(body: bytes, head: bytes = OK) -> bytes:
    return head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[Endpoint]]]:
    """A server that answers every request with these bytes and closes the connection."""
    servers: list[asyncio.Server] = []
    handlers: set[asyncio.Task[Any]] = set()

    async def make(answer: bytes, *, hang: bool = False) -> Endpoint:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            handlers.add(task)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
                await reader.readexactly(int(length or b"0"))
                writer.write(answer)
                await writer.drain()
                if hang:
                    await asyncio.Event().wait()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

        servers.append(await asyncio.start_server(handle, "127.0.0.1", 0))
        return Endpoint("127.0.0.1", servers[-1].sockets[0].getsockname()[1])

    yield make
    for server in servers:
        server.close()
    for task in handlers:
        task.cancel()
    if handlers:
        await asyncio.wait(handlers, timeout=WAIT_S)


class Way(HttpTransport):
    """A transport whose exchanges all go the same way: over the event loop, or by a thread that blocks."""

    blocks = False


@pytest.fixture(params=["loop", "thread"])
async def transport(request: pytest.FixtureRequest) -> AsyncIterator[Way]:
    transport = Way(FrameLimits(2048, 4096, 4, 4))
    transport.blocks = request.param == "thread"
    transport._open()
    yield transport
    await transport.close()


async def exchange(transport: Way, endpoint: Endpoint, inspect: Any = lambda header: True) -> list[Any]:
    data = call_bytes(X, id="a")
    frames = [EncodedFrame((data,), len(data))]

    def block() -> list[Any] | None:
        replies = transport.try_exchange(endpoint, frames, inspect, Deadline(time.monotonic() + WAIT_S))
        return None if replies is None else list(replies)

    async with asyncio.timeout(WAIT_S):
        if transport.blocks and (received := await asyncio.to_thread(block)) is not None:
            return received
        async with contextlib.aclosing(transport.exchange(endpoint, frames, inspect)) as replies:
            return [frame async for frame in replies]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00" * 100,
        b"HTTP/1.1 200",
        OK,
        OK + b"Content-Length: 100\r\n\r\nshort",
        OK + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        OK + b"Content-Length: -5\r\n\r\n",
        whole(b"")[:-2],
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    ],
)
async def test_a_broken_http_answer_is_an_unreachable_peer(serve: Any, transport: Way, answer: bytes) -> None:
    with pytest.raises((PeerUnreachableError, DecodeError)):
        await exchange(transport, await serve(answer))


@pytest.mark.parametrize("bad", BAD_HEADERS)
async def test_frames_that_are_none_are_decode_errors(serve: Any, transport: Way, bad: str) -> None:
    body = BAD_HEADERS[bad].replace(b'"inputs"', b'"outputs"')
    endpoint = await serve(whole(body))
    if bad == "negative timeout":  # no key of a result
        await exchange(transport, endpoint)
        return
    with pytest.raises(DecodeError):
        await exchange(transport, endpoint)


@pytest.mark.parametrize("body", [b"\xff" * 50, b"\x00" * 50, result("a", X)[:-1], b"\x01"])
async def test_a_spoilt_stream_is_a_decode_error(serve: Any, transport: Way, body: bytes) -> None:
    with pytest.raises(DecodeError):
        await exchange(transport, await serve(whole(body)))


async def test_what_was_not_asked_for_is_never_allocated(
    serve: Any, transport: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = await serve(whole(result("other", torch.ones(8, 8)) * 3))
    monkeypatch.setattr(torch, "empty", None)
    assert await exchange(transport, endpoint, inspect=lambda header: False) == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("413 Too Large", TooLargeError),
        ("426 Upgrade Required", WireVersionError),
        ("429 Too Many", OverloadedError),
        ("503 Unavailable", DrainingError),
        ("404 Not Found", CallError),
        ("302 Found", CallError),
        ("500 Oops", CallError),
    ],
)
@pytest.mark.parametrize("body", [b'{"error": "because"}', b"<html>", b"[" * 2000, b'{"error": 3}', b""])
async def test_a_refusal_is_its_own_error(
    serve: Any, transport: Way, status: str, kind: type[CallError], body: bytes
) -> None:
    head = f"HTTP/1.1 {status}\r\nRetry-After: 7\r\nLocation: http://127.0.0.1:1/\r\n".encode()
    endpoint = await serve(whole(body, head))
    with pytest.raises(kind) as caught:
        await exchange(transport, endpoint)
    assert caught.value.retry_after_s == 7.0
    if b"because" in body:
        assert str(caught.value) == "because"


@pytest.mark.parametrize("value", ["²", "-1", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", ""])
async def test_a_time_to_wait_that_is_none_is_ignored(serve: Any, transport: Way, value: str) -> None:
    head = f"HTTP/1.1 429 Too Many\r\nRetry-After: {value}\r\n".encode()
    with pytest.raises(OverloadedError) as caught:
        await exchange(transport, await serve(whole(b"{}", head)))
    assert caught.value.retry_after_s is None


async def test_an_endless_document_is_given_up(serve: Any, transport: Way) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    endpoint = await serve(whole(b'"' + b"x" * (5 * 1024 * 1024) + b'"', head))
    with pytest.raises(DecodeError):
        await transport.get_json(endpoint, "/p2pmoe/v1/experts")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 5000])
async def test_a_document_that_is_none_is_a_decode_error(serve: Any, transport: Way, body: bytes) -> None:
    endpoint = await serve(whole(body, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"))
    with pytest.raises(DecodeError):
        await transport.get_json(endpoint, "/p2pmoe/v1/experts")


async def test_a_connection_that_was_closed_meanwhile_is_opened_again(serve: Any, transport: Way) -> None:
    """The peer closes a connection that it was expected to keep: the call is sent once more, on a new one."""
    endpoint = await serve(whole(result("a", X)))
    for _ in range(5):
        (frame,) = await exchange(transport, endpoint)
        assert frame.header.id == "a"


@pytest.mark.parametrize(
    "endpoint", [Endpoint("127.0.0.1", 1), Endpoint("no.such.host.invalid", 80, "https", bytes(32))]
)
async def test_nobody_there(transport: Way, endpoint: Endpoint) -> None:
    with pytest.raises(PeerUnreachableError, match="is the node up"):
        await exchange(transport, endpoint)
    with pytest.raises(PeerUnreachableError):
        await transport.get_json(endpoint, "/p2pmoe/v1/experts")


async def test_a_body_over_the_servers_limit_is_too_large_not_unreachable() -> None:
    """The server answers while the body is still being sent; the reason must not be lost."""
    limits = LimitsConfig(max_exchange_bytes=1024 * 1024)
    with open_world({"alice": [make_backend("ffn.0")]}, carrier="http", limits=limits) as world:
        expert = world.swarm.expert("ffn.0")
        for _ in range(3):
            with pytest.raises(TooLargeError):
                await asyncio.to_thread(expert, torch.ones(1_000_000, 4))
        assert expert(torch.ones(1, 4)).shape == (1, 4)


# ---------------------------------------------------------------------------------------------- dispatcher


def make(endpoint: Endpoint, call_id: str = "a", *, output: int = 4) -> Call:
    protos = (BatchTensorProto(4),)
    expected = (BatchTensorProto(output),)
    return make_call(endpoint, "ffn.0", "forward", [X], protos, expected, timeout_s=5.0, call_id=call_id)


async def dispatch(transport: Way, *calls: Call, timeout_s: float = WAIT_S) -> list[Any]:
    dispatcher = Dispatcher(transport, asyncio.get_running_loop())
    group = CallGroup(calls)
    if transport.blocks:
        await asyncio.to_thread(dispatcher.call, group, timeout_s)
        assert not dispatcher._started, "the thread left it to the loop"
    else:
        dispatcher.submit(group)
        await group.wait_async(timeout_s)
        dispatcher.abandon(group)
    await dispatcher.close()
    return group.results(timeout_s)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", PeerUnreachableError),
        (result("b", X), PeerUnreachableError),
        (result("a", torch.ones(1, 5)), DecodeError),
        (result("a", torch.ones(2, 4)), DecodeError),
        (result("a", X.double()), DecodeError),
        (result("a", X, X), DecodeError),
        (result("a"), DecodeError),
        (result("a", X, code=500), DecodeError),
        (result("a", code=429, message="full"), OverloadedError),
        (result("a", code=7), CallError),
        (result("", code=413, message="too many calls"), TooLargeError),
        (raw_frame({"id": "a", "code": "x"}), DecodeError),
        (result("b", X) + result("a", X) + result("a", X.double()), None),
        (result("", code=400) + result("a", X), None),
    ],
)
async def test_only_the_answer_that_was_asked_for_counts(
    serve: Any, transport: Way, body: bytes, error: type[P2PMoEError] | None
) -> None:
    (outcome,) = await dispatch(transport, make(await serve(whole(body))))
    if error is None:
        assert torch.equal(outcome[0], X)
    else:
        assert isinstance(outcome, error)


async def test_a_silent_server_is_a_deadline_error(serve: Any, transport: Way) -> None:
    endpoint = await serve(OK + b"Transfer-Encoding: chunked\r\n\r\n", hang=True)
    (outcome,) = await dispatch(transport, make(endpoint), timeout_s=0.1)
    assert isinstance(outcome, DeadlineError)


async def test_results_before_the_break_count(serve: Any, transport: Way) -> None:
    endpoint = await serve(OK + b"Content-Length: 1000\r\n\r\n" + result("a", X))
    first, second = await dispatch(transport, make(endpoint, "a"), make(endpoint, "b"))
    assert torch.equal(first[0], X)
    assert isinstance(second, PeerUnreachableError)


async def test_a_closed_dispatcher_says_so(transport: Way) -> None:
    dispatcher = Dispatcher(transport, asyncio.get_running_loop())
    await dispatcher.close()
    for send in (dispatcher.submit, lambda group: dispatcher.call(group, WAIT_S)):
        with pytest.raises(ClosedError):
            send(CallGroup([make(Endpoint("127.0.0.1", 1))]))
