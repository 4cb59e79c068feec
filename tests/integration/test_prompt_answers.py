"""Single calls that a node answers without the HTTP library's task: in order, bounded, and given up like all others."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch
from frame_kit import call_bytes, codes, raw_frame, result_frames
from swarm_kit import WAIT_S, Failing, Gate, World, make_backend, open_world, same_bits, trusting_context, until

from p2pmoe.config import HttpConfig, LimitsConfig
from p2pmoe.errors import AuthenticationError
from p2pmoe.identity import Identity
from p2pmoe.metrics import NodeMetrics
from p2pmoe.protocol.frames import PREFIX, Frame
from p2pmoe.rpc.http import connection as connection_module
from p2pmoe.rpc.http.prompt_answer import PromptAnswer
from p2pmoe.rpc.http.server import HttpServer
from p2pmoe.types import Caller

X = torch.ones(2, 4)
LIMITS = LimitsConfig(max_header_bytes=2048, max_body_bytes=4096, max_exchange_bytes=16384, http_head_timeout_s=0.5)
KEEPALIVE_S = 0.4


class Doorkeeper:
    """Knows one token."""

    def identify(self, authorization: str | None, address: str) -> Caller:
        if authorization not in (None, "Bearer right"):
            raise AuthenticationError("who are you?")
        return Caller(address)

    def is_admin(self, authorization: str | None) -> bool:
        return False


class Node:
    def __init__(self, server: HttpServer, world: World, *, secure: bool) -> None:
        self.server, self.world, self.secure = server, world, secure
        self.prompt: list[bytes] = []
        self.gate: Any = world.backend("gate.0").expert

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Line]:
        context = None
        if self.secure:
            context = trusting_context()
        async with asyncio.timeout(WAIT_S):
            line = Line(*await asyncio.open_connection("127.0.0.1", self.server.port, ssl=context))
            try:
                await line.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")  # the library's task waits by now
                assert await line.reader.readuntil(b'{"live":true}')
                yield line
            finally:
                line.writer.transport.abort()
                await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def computing(self) -> AsyncIterator[Line]:
        """A connection whose call "slow" is on the device until `gate.go` is set."""
        self.gate.armed = True
        async with self.connect() as line:
            await line.write(post(call("slow", "gate.0")))
            await until(self.gate.begun.is_set)
            yield line


class Line:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[str, list[Frame[Any]]]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].split()[0])
        body = await self.reader.readexactly(length)
        return head, result_frames(body) if "octet-stream" in head else []

    async def codes(self) -> dict[str, int]:
        _, frames = await self.answer()
        return codes(frames)


def call(call_id: str, uid: str = "ffn.0", x: torch.Tensor = X) -> bytes:
    return call_bytes(x, id=call_id, model_name=uid)


def post(body: bytes, *fields: str, version: str = "1.1", path: str = "/p2pmoe/v1/exchange") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.fixture(params=["http", "https"])
async def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    """At the end nothing runs or waits, and nothing is held of the memory for calls."""
    backends = [make_backend("ffn.0"), make_backend("gate.0", Gate()), make_backend("bad.0", Failing())]
    secure = request.param == "https"
    with open_world({"alice": backends}) as world:
        server = HttpServer(
            world.alice.handlers,
            HttpConfig(tls=secure, keepalive_timeout_s=KEEPALIVE_S),
            LIMITS,
            identity=Identity.generate() if secure else None,
            server_name="test",
            render_metrics=NodeMetrics().render,
            doorkeeper=Doorkeeper(),  # type: ignore[arg-type]
        )
        await server.start()
        node = Node(server, world, secure=secure)
        begin = PromptAnswer.begin

        def noted(self: PromptAnswer, body: bytes) -> None:
            node.prompt.append(body)
            begin(self, body)

        monkeypatch.setattr(PromptAnswer, "begin", noted)
        try:
            yield node
            node.gate.go.set()
            await until(lambda: not server._answers.running)
            await until(lambda: world.alice.runtime.tasks_waiting == world.alice.runtime.tasks_running == 0)
            assert server._budget.held == 0
        finally:
            await server.close()


async def test_a_single_call_is_answered_promptly_and_the_connection_kept(node: Node) -> None:
    expected = node.world.backend("ffn.0").expert(X).detach()
    async with node.connect() as line:
        for name in ("a", "b", "c"):
            await line.write(post(call(name), "P2PMoE-Wire-Version: 1", "Authorization: Bearer right"))
            head, frames = await line.answer()
            assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n")
            assert "\r\nDate: " in head
            assert [frame.header.id for frame in frames] == [name]
            assert same_bits(frames[0].tensors[0], expected)
    assert len(node.prompt) == 3


async def test_the_first_request_of_a_connection_may_be_one(node: Node) -> None:
    async with node.connect() as line:
        await line.write(post(call("a")))
        assert await line.codes() == {"a": 200}
    assert len(node.prompt) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (call("nobody", "ffn.9"), {"nobody": 404}),
        (call("wrong", x=torch.ones(2, 5)), {"wrong": 400}),
        (call("fails", "bad.0", -X), {"fails": 500}),
        (raw_frame(b"{", b""), {"": 400}),
        (raw_frame({"id": "x", "model_name": "ffn.0", "inputs": 1}, b"abc"), {"": 400}),
    ],
)
async def test_a_call_that_is_refused_leaves_the_connection_usable(
    node: Node, body: bytes, expected: dict[str, int]
) -> None:
    async with node.connect() as line:
        for _ in range(2):
            await line.write(post(body))
            assert await line.codes() == expected
        await line.write(post(call("good")))
        assert await line.codes() == {"good": 200}
    assert len(node.prompt) == 3


async def test_a_stream_that_cannot_be_read_further_ends_the_connection(node: Node) -> None:
    async with node.connect() as line:
        await line.write(post(PREFIX.pack(4000, 0) + bytes(4000)))
        head, frames = await line.answer()
        assert "Connection: close" in head
        assert frames[0].header.code == 413
        assert await line.reader.read() == b""
    assert len(node.prompt) == 1


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(call("a") + call("b")), 200),
        (post(call("a") + b"x"), 200),
        (post(call("a")[:-1]), 200),
        (post(b""), 200),
        (post(call("a"), version="1.0"), 200),
        (post(call("a"), "Connection: close"), 200),
        (post(call("a"), "Content-Encoding: identity"), 200),
        (post(call("a"), "Content-Encoding: gzip"), 400),
        (post(call("a"), "P2PMoE-Wire-Version: 2"), 426),
        (post(call("a"), "Authorization: Bearer wrong"), 401),
        (post(call("a"), path="/p2pmoe/v1/exchange?"), 200),
        (post(call("a"), path="/p2pmoe/v2/exchange"), 426),
        (post(call("a"), path="/p2pmoe/v1/other"), 404),
        (post(call("a").ljust(16385)), 413),
        (b"PUT" + post(call("a"))[4:], 405),
    ],
)
async def test_everything_else_goes_the_long_way(node: Node, request_: bytes, status: int) -> None:
    async with node.connect() as line:
        await line.write(request_)
        head = (await line.reader.readuntil(b"\r\n")).decode()
        assert int(head.split()[1]) == status
    assert node.prompt == []


async def test_a_call_that_arrives_in_pieces(node: Node) -> None:
    data = post(call("a"))
    async with node.connect() as line:
        for cut in (5, 60, len(data) - 30):
            await line.write(data[:cut])
            await asyncio.sleep(0.02)
            await line.write(data[cut:])
            assert await line.codes() == {"a": 200}


async def test_pipelined_requests_are_answered_in_order(node: Node) -> None:
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    async with node.connect() as line:
        for _ in range(3):
            await line.write(post(call("a")) + post(call("b")) + live + post(call("c")))
            assert await line.codes() == {"a": 200}
            assert await line.codes() == {"b": 200}
            assert (await line.answer())[0].startswith("HTTP/1.1 200")
            assert await line.codes() == {"c": 200}


async def test_requests_wait_behind_a_call_that_is_being_computed(node: Node) -> None:
    async with node.computing() as line:
        await line.write(post(call("second"))[:30])
        await asyncio.sleep(0.05)
        await line.write(post(call("second"))[30:] + post(call("third")))
        await until(lambda: node.world.backend("ffn.0").forward_pool.oldest() is None)
        node.gate.go.set()
        assert await line.codes() == {"slow": 200}
        assert await line.codes() == {"second": 200}
        assert await line.codes() == {"third": 200}


async def test_one_request_that_waited_is_answered_promptly_too(node: Node) -> None:
    async with node.computing() as line:
        await line.write(post(call("second")))
        await asyncio.sleep(0.05)
        assert len(node.prompt) == 1
        node.gate.go.set()
        assert await line.codes() == {"slow": 200}
        assert await line.codes() == {"second": 200}
    assert len(node.prompt) == 2


async def test_an_idle_connection_ends_but_never_one_whose_call_is_being_computed(node: Node) -> None:
    async with node.computing() as line:
        await asyncio.sleep(3 * KEEPALIVE_S)
        node.gate.go.set()
        assert await line.codes() == {"slow": 200}
        await line.write(post(call("again")))
        assert await line.codes() == {"again": 200}
        assert await line.reader.read() == b"", "idle for too long"


async def test_a_caller_who_leaves_takes_the_queued_call_along(node: Node) -> None:
    async with node.computing() as blocker:
        async with node.connect() as line:
            await line.write(post(call("queued")))
            await until(lambda: node.world.alice.runtime.tasks_waiting == 1)
        await until(lambda: node.world.backend("ffn.0").forward_pool.oldest() is None)
        await until(lambda: len(node.server._answers.running) == 1)
        node.gate.go.set()
        assert await blocker.codes() == {"slow": 200}


async def test_draining_waits_for_the_answer(node: Node) -> None:
    async with node.computing() as line:
        assert "1 requests" in repr(node.server)
        draining = asyncio.create_task(node.server.drain(WAIT_S))
        await asyncio.sleep(0.05)
        assert not draining.done()
        node.gate.go.set()
        await draining
        assert await line.codes() == {"slow": 200}


async def test_closing_the_server_ends_a_call_that_never_ends(node: Node) -> None:
    async with node.computing() as line:
        await node.server.drain(0.05)
        await node.server.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert await line.reader.read() == b""


async def test_the_head_of_the_next_request_has_its_deadline(node: Node) -> None:
    async with node.connect() as line:
        await line.write(post(call("a")))
        assert await line.codes() == {"a": 200}
        for letter in post(call("b"))[:8]:  # longer than the deadline, never idle
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await line.write(bytes([letter]))
            await asyncio.sleep(0.1)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert await line.reader.read() == b""


async def test_a_caller_who_takes_no_answers_is_not_served_more_of_them(node: Node) -> None:
    """Prompt answers are written without waiting; what a caller does not take must not pile up."""
    rows = torch.ones(200, 4)
    async with node.connect() as line:
        line.writer.transport.pause_reading()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):
                while True:
                    await line.write(post(call("more", x=rows)))
        held = [each._link.get_write_buffer_size() for each in node.server._watch._connections if each._link]
        assert max(held) < 4 << 20


async def test_another_version_of_the_http_library_takes_the_long_way(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_KNOWN_LIBRARY", False)
    async with node.connect() as line:
        await line.write(post(call("a")))
        assert await line.codes() == {"a": 200}
    assert node.prompt == []
