"""Large bodies over real connections, plain and encrypted, cut and ended in every way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from frame_kit import call_bytes, codes, result_frames
from swarm_kit import WAIT_S, Failing, Gate, Peer, World, make_backend, open_world, same_bits, trusting_context, until

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import BadRequestError
from p2pmoe.protocol.frames import Frame
from p2pmoe.rpc.http import connection as connection_module
from p2pmoe.rpc.http.connection import Connection
from p2pmoe.rpc.http.direct_body import DirectBody

LIMITS = LimitsConfig(
    max_body_bytes=4 << 20,
    max_exchange_bytes=16 << 20,
    max_inflight_bytes=32 << 20,
    idle_read_timeout_s=0.4,
    linger_s=0.5,
)
X = torch.randn(50_000, 4, generator=torch.Generator().manual_seed(7))  # 800 kB
DIRECT: list[bool] = []
"""Whether each large body went past the parser."""
BODIES: list[DirectBody] = []


@pytest.fixture(params=["http", "https"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """At the end nothing is held, and an honest call works."""
    DIRECT.clear()
    BODIES.clear()
    receive_directly = Connection.receive_directly

    def counted(self: Connection, *args: Any) -> Any:
        body = receive_directly(self, *args)
        DIRECT.append(body is not None)
        if body is not None:
            BODIES.append(body)
        return body

    monkeypatch.setattr(Connection, "receive_directly", counted)
    backends = [make_backend("ffn.0"), make_backend("gate.0", Gate()), make_backend("bad.0", Failing())]
    with open_world({"alice": backends}, carrier=request.param, limits=LIMITS) as world:
        yield world
        gate: Any = world.backend("gate.0").expert
        gate.go.set()
        assert world.swarm.expert("ffn.0")(X).shape == X.shape
        assert world.alice.runtime.tasks_waiting == world.alice.runtime.tasks_running == 0


@contextlib.asynccontextmanager
async def connect(peer: Peer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    context = None
    if peer.endpoint.scheme == "https":
        context = trusting_context()
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection(
            peer.endpoint.host, peer.endpoint.port, ssl=context, limit=1 << 25
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


def call(call_id: str, x: torch.Tensor = X, uid: str = "ffn.0") -> bytes:
    return call_bytes(x, id=call_id, model_name=uid)


def post(body: bytes, length: int | None = None) -> bytes:
    head = f"POST /p2pmoe/v1/exchange HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, list[Frame[Any]]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    body = b""
    if "transfer-encoding: chunked" in head:
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    else:
        body = await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
    return int(head.split()[1]), result_frames(body)


def is_open(body: DirectBody) -> bool:
    return not body._used.done()


async def test_requests_that_follow_a_large_body_in_the_same_breath(world: World) -> None:
    expert = world.backend("ffn.0").expert
    async with connect(world.alice) as (reader, writer):
        health = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        for _ in range(2):
            writer.write(post(call("a")) + health + post(call("b")) + post(call("small", X[:1])) + post(call("c")))
            for name in ("a", None, "b", "small", "c"):
                if name is None:
                    assert b"200" in await reader.readuntil(b'{"live":true}')
                    continue
                status, frames = await answer(reader)
                assert (status, codes(frames)) == (200, {name: 200})
                assert same_bits(frames[0].tensors[0], expert(X[:1] if name == "small" else X).detach())
    assert DIRECT
    assert all(DIRECT)


async def test_every_size_of_piece(world: World) -> None:
    data = post(call("a") + call("b", X[:1]) + call("c"))
    for size in (1000, 16_384, 70_000, 1_000_000):
        async with connect(world.alice) as (reader, writer):
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])
                await writer.drain()
                await asyncio.sleep(0)
            status, frames = await answer(reader)
            assert (status, codes(frames)) == (200, {"a": 200, "b": 200, "c": 200})
    assert all(DIRECT)


async def test_results_leave_while_the_rest_still_arrives(world: World) -> None:
    gate: Any = world.backend("gate.0").expert
    gate.armed = True
    async with connect(world.alice) as (reader, writer):
        first, second = call("first", uid="bad.0"), call("second")
        writer.write(post(first + second[:200_000], len(first + second)))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"chunked" in head, "the first result is here, the second call is not"
        writer.write(second[200_000:])
        rest = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert b'"second"' in rest
    assert DIRECT == [True]


async def test_refused_calls_between_large_ones(world: World) -> None:
    wrong = call("wrong", torch.zeros(40_000, 5))
    async with connect(world.alice) as (reader, writer):
        writer.write(post(call("a") + call("nobody", uid="ffn.9") + wrong + call("b")))
        status, frames = await answer(reader)
    assert (status, codes(frames)) == (200, {"a": 200, "nobody": 404, "wrong": 400, "b": 200})


async def test_a_stream_that_breaks_in_the_middle_is_answered_and_the_connection_ends(world: World) -> None:
    async with connect(world.alice) as (reader, writer):
        writer.write(post(call("a") + b"\xff" * 900_000))
        _, frames = await answer(reader)
        assert codes(frames) == {"a": 200, "": 413}
        assert await reader.read() == b""


async def test_a_pause_in_the_middle(world: World) -> None:
    async with connect(world.alice) as (reader, writer):
        data = post(call("a") + call("never"))
        writer.write(data[:-100_000])
        _, frames = await answer(reader)
        assert codes(frames) == {"a": 200, "never": 400}
        with pytest.raises(BadRequestError, match=r"no data for 0\.4 s"):
            frames[-1].header.raise_for_error()


async def test_a_caller_who_leaves_in_the_middle(world: World) -> None:
    for count in (1, 2, 3):
        async with connect(world.alice) as (_, writer):
            writer.write(post(call("left"))[:-50_000])
            await writer.drain()
            await until(lambda count=count: len(DIRECT) == count)
    await until(lambda: not any(map(is_open, BODIES)))


async def test_without_a_content_length_the_long_way_is_taken(world: World) -> None:
    data = call("a")
    async with connect(world.alice) as (reader, writer):
        writer.write(b"POST /p2pmoe/v1/exchange HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(data), 100_000):
            piece = data[start : start + 100_000]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        writer.write(b"0\r\n\r\n")
        assert codes((await answer(reader))[1]) == {"a": 200}
    assert DIRECT == []


async def test_a_request_to_upgrade_takes_the_long_way(world: World) -> None:
    request = post(call("a")).replace(b"Host: x", b"Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket")
    async with connect(world.alice) as (reader, writer):
        writer.write(request)
        assert codes((await answer(reader))[1]) == {"a": 200}
    assert DIRECT == [False]


async def test_another_version_of_the_http_library_takes_the_long_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_signature(*_: Any, **__: Any) -> None:
        raise TypeError("got an unexpected keyword argument 'max_msg_queue_size'")

    monkeypatch.setattr(connection_module, "HttpRequestParser", other_signature)
    async with connect(world.alice) as (reader, writer):
        writer.write(post(call("a")) + post(call("b")))
        for name in ("a", "b"):
            assert codes((await answer(reader))[1]) == {name: 200}
    assert DIRECT
    assert not any(DIRECT)
