"""Connections that come too many, too slowly or never to an end, against a running server: they end, others do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from frame_kit import call_bytes
from swarm_kit import WAIT_S, Peer, World, make_backend, open_world, trusting_context

from p2pmoe.config import HttpConfig, LimitsConfig
from p2pmoe.errors import ConfigError
from p2pmoe.protocol.frames import FrameLimits, FrameReader
from p2pmoe.protocol.messages import RequestParameters, response_decoder

LIMITS = LimitsConfig(
    http_head_timeout_s=0.3,
    handshake_timeout_s=0.3,
    write_stall_timeout_s=0.3,
    linger_s=0.1,
    idle_read_timeout_s=5.0,
    min_body_bytes_per_s=100_000,
    slow_body_grace_s=0.2,
    max_http_head_bytes=8192,
    max_connections=12,
    max_source_connections=10,
    max_handshakes_per_s=1000.0,
    max_source_handshakes_per_s=1000.0,
    max_json_depth=8,
)
EXCHANGE = b"POST /p2pmoe/v1/exchange HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
PATIENCE_S = 5.0


@pytest.fixture(params=["http", "https"])
def world(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[World]:
    """At the end an honest call works, and nobody's misbehaviour stands in the log as an error."""
    caplog.set_level(logging.INFO)
    with open_world({"alice": [make_backend("ffn.0")]}, carrier=request.param, limits=LIMITS) as world:
        yield world
        assert world.swarm.expert("ffn.0")(torch.ones(1, 4)).shape == (1, 4)
    assert [each.message for each in caplog.records if each.exc_info or each.levelno >= logging.ERROR] == []


@contextlib.asynccontextmanager
async def connect(peer: Peer, **options: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    context = None
    if peer.endpoint.scheme == "https":
        context = trusting_context()
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection(peer.endpoint.host, peer.endpoint.port, ssl=context, **options)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            await asyncio.sleep(0)


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Everything until the node ends the connection; it must, within the patience of this test."""
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while chunk := await reader.read(65536):
                data += chunk
    return data


async def drip(writer: asyncio.StreamWriter, data: bytes, pause_s: float = 0.02) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(pause_s)


def refusal(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize("sent", [b"", b"GET / HTT", b"\r\n\r\n", b"GET / HTTP/1.1\r\nX: y\r\n"])
async def test_a_head_that_never_ends(world: World, sent: bytes) -> None:
    async with connect(world.alice) as (reader, writer):
        writer.write(sent)
        assert await rest(reader) == b""


async def test_a_head_that_drips_is_cut_off_although_bytes_keep_coming(world: World) -> None:
    async with connect(world.alice) as (reader, writer):
        dripping = asyncio.create_task(drip(writer, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000))
        assert await rest(reader) == b""
        dripping.cancel()


async def test_the_second_head_of_a_connection_has_a_deadline_too(world: World) -> None:
    async with connect(world.alice) as (reader, writer):
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in await reader.readuntil(b'{"live":true}')
        await asyncio.sleep(2 * LIMITS.http_head_timeout_s)  # an idle connection may stay
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in await reader.readuntil(b'{"live":true}')
        writer.write(b"GET /v2/health/live HT")
        assert await rest(reader) == b""


async def test_a_head_that_is_too_long_is_cut_off_before_it_ends(world: World) -> None:
    async with connect(world.alice) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            for index in range(200):
                writer.write(b"X-%d: " % index + b"y" * 500 + b"\r\n" if index else b"GET / HTTP/1.1\r\n")
                await writer.drain()
        answer = await rest(reader)
        assert answer == b"" or refusal(answer)[0] == 400


@pytest.mark.parametrize("head", [b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", b"\x00\xff\r\n\r\n", b"GET\r\n\r\n"])
async def test_what_is_no_http_is_answered_in_our_form(world: World, head: bytes) -> None:
    async with connect(world.alice) as (reader, writer):
        writer.write(head)
        answer = await rest(reader)
        assert answer == b"" or refusal(answer)[0] == 400


async def test_a_large_body_does_not_count_as_a_head(world: World) -> None:
    body = b"x" * 300_000
    async with connect(world.alice) as (reader, writer):
        writer.write(EXCHANGE % len(body) + body)
        answer = await rest(reader)
        assert answer.startswith(b"HTTP/1.1 200")  # an exchange that is answered with an error frame


async def test_a_body_below_the_minimum_rate(world: World) -> None:
    for path in (b"/p2pmoe/v1/exchange", b"/v2/models/ffn.0/infer"):
        async with connect(world.alice) as (reader, writer):
            writer.write(EXCHANGE.replace(b"/p2pmoe/v1/exchange", path) % 100_000)
            dripping = asyncio.create_task(drip(writer, b"\x10\x00\x00\x00" + b" " * 1000))
            assert b"bytes/s that a body must come at" in await rest(reader)
            dripping.cancel()


async def test_a_body_that_nobody_reads_does_not_hold_the_connection(world: World) -> None:
    async with connect(world.alice) as (reader, writer):
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert (await rest(reader)).endswith(b'{"live":true}')


async def test_an_answer_that_nobody_takes(world: World) -> None:
    """The caller asks again and again and reads nothing: memory for answers is bounded, and so is the wait."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, (world.alice.endpoint.host, world.alice.endpoint.port))
    options = {"server_hostname": ""} if world.alice.endpoint.scheme == "https" else {}
    context = None
    if options:
        context = trusting_context()
    async with asyncio.timeout(WAIT_S):
        _, writer = await asyncio.open_connection(sock=raw, ssl=context, limit=1024, **options)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while not writer.transport.is_closing():
                writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.transport.abort()
        await asyncio.sleep(0)


async def test_a_handshake_that_never_ends(world: World) -> None:
    if world.alice.endpoint.scheme == "http":
        pytest.skip("there is none")
    for sent in (b"", b"\x16\x03\x01\x02\x00\x01"):
        reader, writer = await asyncio.open_connection(world.alice.endpoint.host, world.alice.endpoint.port)
        writer.write(sent)
        assert await rest(reader) == b""
        writer.transport.abort()
        await asyncio.sleep(0)


async def is_served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    try:
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        return b"200" in await reader.readuntil(b'{"live":true}')
    except (OSError, asyncio.IncompleteReadError):
        return False


async def test_more_connections_than_one_source_may_have(world: World) -> None:
    """Those over the limit are closed unanswered; the open ones go on, and a place becomes free again."""

    async def try_once() -> bool:
        try:
            async with connect(world.alice) as one_more:
                return await is_served(*one_more)
        except OSError:
            return False

    async with contextlib.AsyncExitStack() as stack:
        held = []
        for _ in range(LIMITS.max_source_connections):
            held.append(await stack.enter_async_context(connect(world.alice)))
            assert await is_served(*held[-1])
        assert [await try_once() for _ in range(4)] == [False] * 4
        assert all([await is_served(*each) for each in held])
        held[0][1].transport.abort()
        async with asyncio.timeout(PATIENCE_S):
            while not await try_once():  # noqa: ASYNC110 - the state belongs to another thread
                await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "fields", ["", "Connection: keep-alive\r\n", "Expect: 100-continue\r\n", "Connection: close\r\n"]
)
@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
@pytest.mark.parametrize("rows", [1, 5000])
async def test_two_calls_of_a_caller_of_any_age_are_both_answered(
    world: World, version: str, fields: str, rows: int
) -> None:
    """Small results leave together; large ones as they come, which an old caller cannot be told the length of."""
    body = b"".join(
        call_bytes(torch.ones(rows, 4), id=each, model_name="ffn.0", parameters=RequestParameters()) for each in "ab"
    )
    head = f"POST /p2pmoe/v1/exchange {version}\r\nHost: x\r\n{fields}Content-Length: {len(body)}\r\n\r\n"
    async with connect(world.alice) as (reader, writer):
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        if version == "HTTP/1.1" and "Expect" in fields:
            assert answer.startswith(b"HTTP/1.1 100 ")
            answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(f"{version} 200 OK".encode())
        frames: FrameReader[Any] = FrameReader(response_decoder, FrameLimits())
        found: dict[str, int] = {}
        if b"chunked" in answer:
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += await reader.read(65536)
            data = b"".join(_chunks(received))
        elif length := re.search(rb"Content-Length: (\d+)", answer):
            data = await reader.readexactly(int(length[1]))
        else:
            data = await rest(reader)
        frames.feed(data)
        for frame in frames.accepted_frames(lambda _: True):
            found[frame.header.id] = frame.header.code
        assert found == {"a": 200, "b": 200}


def _chunks(received: bytes) -> Iterator[bytes]:
    while received:
        size, _, received = received.partition(b"\r\n")
        yield received[: int(size, 16)]
        received = received[int(size, 16) + 2 :]


async def test_a_head_request_gets_no_body_and_an_unknown_expectation_no_call(world: World) -> None:
    async with connect(world.alice) as (reader, writer):
        writer.write(b"HEAD /v2/health/live HTTP/1.0\r\n\r\n")
        answer = await rest(reader)
    assert answer.startswith(b"HTTP/1.0 200 OK")
    assert answer.endswith(b"\r\n\r\n")
    async with connect(world.alice) as (reader, writer):
        writer.write(b"POST /p2pmoe/v1/exchange HTTP/1.1\r\nHost: x\r\nExpect: tea\r\nContent-Length: 0\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 417 ")


async def test_deep_json(world: World) -> None:
    deep = b'{"inputs":[{"name":"0","datatype":"FP32","shape":[1,4],"data":' + b"[" * 9000 + b"]" * 9000 + b"}]}"
    async with connect(world.alice) as (reader, writer):
        writer.write(
            b"POST /v2/models/ffn.0/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(deep) + deep
        )
        code, message = refusal(await rest(reader))
        assert (code, "more than 8 levels" in message) == (400, True)


@pytest.mark.parametrize("config", [{"host": "0.0.0.0"}, {"host": "node.example"}, {"announce_host": "203.0.113.7"}])
def test_plain_http_is_for_loopback_only(config: dict[str, str]) -> None:
    HttpConfig(**config)
    with pytest.raises(ConfigError, match="on loopback only"):
        HttpConfig(tls=False, **config)
    for host in ("127.0.0.1", "::1", "localhost"):
        HttpConfig(tls=False, host=host)
