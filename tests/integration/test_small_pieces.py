"""Requests that come in tiny pieces are refused before they cost the others much; honest ones beside them go on."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator

import pytest
import torch
from frame_kit import call_bytes
from swarm_kit import WAIT_S, World, make_backend, open_world

from p2pmoe.config import LimitsConfig
from p2pmoe.protocol.messages import RequestParameters

LIMITS = LimitsConfig(source_pieces_per_s=64.0)  # 512 at once
PATH = "/p2pmoe/v1/exchange"
ENOUGH = 200_000
"""Pieces that no limit here allows."""


@pytest.fixture(params=["http", "https"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with open_world({"alice": [make_backend("ffn.0")]}, carrier=request.param, limits=LIMITS) as world:
        yield world


def connect(world: World) -> socket.socket:
    endpoint = world.alice.endpoint
    sock = socket.create_connection((endpoint.host, endpoint.port), WAIT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if endpoint.scheme == "http":
        return sock
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(sock)


def head(*lines: str, method: str = "POST", path: str = PATH) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def drip(sock: socket.socket, piece: bytes, limit: int = ENOUGH) -> int:
    """How many pieces were sent until the node had enough."""
    for count in range(limit):
        try:
            sock.sendall(piece)
        except OSError:
            return count
    return limit


def answer(sock: socket.socket) -> bytes:
    """What can still be read."""
    received = b""
    with contextlib.suppress(OSError):
        while part := sock.recv(65536):
            received += part
    return received


def call(world: World) -> None:
    """An honest call by somebody else."""
    x = torch.ones(2, 4)
    assert world.swarm.expert("ffn.0")(x).shape == (2, 4)


def test_chunks_of_one_byte_are_refused_in_words(world: World, caplog: pytest.LogCaptureFixture) -> None:
    data = call_bytes(torch.ones(64 * 1024, 4), id="x", model_name="ffn.0", parameters=RequestParameters())
    with connect(world) as sock:
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in data[:2000])
        sock.sendall(head("Transfer-Encoding: chunked") + chunks)
        text = answer(sock)
        if text:  # a reset may have been quicker
            assert b"less than 64 bytes on average" in text
        sent = drip(sock, b"1\r\n\0\r\n" * 100)
        assert sent < ENOUGH
    call(world)
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR], caplog.text


def test_a_body_byte_by_byte_is_refused(world: World) -> None:
    with connect(world) as sock:
        sock.sendall(head("Content-Length: 1000000"))
        assert drip(sock, b"\0") < ENOUGH
    call(world)


def test_a_large_body_byte_by_byte_is_refused_where_it_is_received_directly(world: World) -> None:
    data = call_bytes(torch.ones(64 * 1024, 4), id="x", model_name="ffn.0", parameters=RequestParameters())
    with connect(world) as sock:
        sock.sendall(head(f"Content-Length: {len(data)}") + data[:200_000])
        assert drip(sock, b"\0") < ENOUGH
    call(world)


def test_a_head_byte_by_byte_ends_the_connection(world: World) -> None:
    with connect(world) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\nX-Long: ")
        assert drip(sock, b"a", 32_000) < 32_000
    call(world)


def test_reconnecting_does_not_help(world: World) -> None:
    for _ in range(10):
        with contextlib.suppress(OSError), connect(world) as sock:
            sock.sendall(head("Transfer-Encoding: chunked") + b"1\r\n\0\r\n" * 2000)
            drip(sock, b"1\r\n\0\r\n" * 1000, 1000)
    call(world)


def honest_bodies() -> Iterator[tuple[str, list[bytes]]]:
    data = call_bytes(torch.ones(2000, 4), id="x", model_name="ffn.0", parameters=RequestParameters())
    yield "chunks of 1 KiB", [data[start : start + 1024] for start in range(0, len(data), 1024)]
    yield "chunks of 256 bytes", [data[start : start + 256] for start in range(0, len(data), 256)]
    small = call_bytes(torch.ones(1, 4), id="x", model_name="ffn.0", parameters=RequestParameters())
    yield "a small call byte by byte", [small[start : start + 1] for start in range(len(small))]


@pytest.mark.parametrize(("name", "pieces"), list(honest_bodies()))
def test_honest_pieces_pass(world: World, name: str, pieces: list[bytes]) -> None:
    with connect(world) as sock:
        sock.sendall(head("Transfer-Encoding: chunked", "Connection: close"))
        for piece in pieces:
            sock.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        text = answer(sock)
    assert text.startswith(b"HTTP/1.1 200 "), (name, text[:200])
    assert b'"outputs"' in text, (name, text[:400])


def test_line_ends_in_a_body_that_has_a_length_are_no_pieces(world: World) -> None:
    """JSON by the inference protocol, a number on every line."""
    numbers = ",\r\n".join(["1"] * 40_000)
    body = (
        '{"inputs": [{"name": "0", "datatype": "FP32", "shape": [10000, 4], "data": [\r\n' + numbers + "\r\n]}]}"
    ).encode()
    with connect(world) as sock:
        sock.sendall(head(f"Content-Length: {len(body)}", "Connection: close", path="/v2/models/ffn.0/infer") + body)
        assert answer(sock).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_pass_until_the_documents_are_used_up() -> None:
    limits = LimitsConfig(source_documents_per_s=3.0)  # thirty at once
    with open_world({"alice": [make_backend("ffn.0")]}, carrier="http", limits=limits) as world:
        expert = world.swarm.expert("ffn.0")
        expert(torch.ones(2, 4))
        with connect(world) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(head(method="GET", path="/nowhere") * 1000)
            text = answer(sock)
        assert text.count(b"HTTP/1.1 404 ") <= 31
        assert text.count(b"HTTP/1.1 429 ") <= 1
        expert(torch.ones(2, 4))  # calls have limits of their own
