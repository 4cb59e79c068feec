"""Whole connections: HTTP requests of any kind, in pieces, to a server without a socket.

An input is `u16 chunking | bytes of the connection`. Odd chunking lets the loop run between the pieces. At the end the
caller leaves: nothing of his may stay.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any, Final, cast

import torch

from fuzzing.mutate import MUTATORS, mutate_bytes
from fuzzing.target import KIB, MIB, Target
from fuzzing.targets.kit import EchoService, chunks
from fuzzing.targets.kit_loop import StepLoop
from p2pmoe.config import HttpConfig, LimitsConfig
from p2pmoe.protocol.frames import describe_tensors, encode_frame
from p2pmoe.protocol.messages import RequestHeader
from p2pmoe.rpc.http.server import HttpServer

LIMITS: Final = LimitsConfig(
    max_header_bytes=64 * KIB, max_body_bytes=MIB, max_exchange_bytes=2 * MIB, max_json_bytes=256 * KIB, max_tensors=64,
    max_rank=8, max_inflight_bytes=4 * MIB, max_calls_per_exchange=16, max_handshakes_per_s=1e9,
    max_source_handshakes_per_s=1e9,
)  # fmt: skip
_STEPS: Final = 12  # rounds of the loop in which everything that needs no clock is done
_PIECES: Final = 40  # then comes the rest
_FIELDS: Final = (
    b"Expect: 100-continue", b"Expect: x", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip",
    b"Connection: close", b"Connection: keep-alive",
    b"Connection: Upgrade", b"Upgrade: websocket", b"Upgrade: h2c", b"Content-Length: 5", b"Content-Length: 99999",
    b"Content-Length: -1", b"Content-Length: 0", b"Content-Encoding: gzip", b"Content-Encoding: identity",
    b"Authorization: Bearer x", b"P2PMoE-Wire-Version: 1", b"P2PMoE-Wire-Version: 2", b"Host: y", b" folded", b"X\0: y",
)  # fmt: skip


class _NoListener:
    failed_handshakes = 0

    async def start(self, host: str, port: int) -> int:
        return 0


class _Transport(asyncio.Transport):
    """Hands pieces to a protocol as asyncio's transports do, and keeps what is written."""

    def __init__(self, protocol: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__({"peername": ("127.0.0.1", 9)})
        self._protocol, self._loop = protocol, loop
        self._closing = False
        self.written = bytearray()
        self.held: list[bytes] | None = None

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: Any) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.held = self.held or []

    def resume_reading(self) -> None:
        held, self.held = self.held, None
        for piece in held or ():
            self.receive(piece)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._lose)

    abort = close

    def _lose(self) -> None:
        self._protocol.connection_lost(None)

    def receive(self, piece: bytes) -> None:
        if self.held is not None:
            self.held.append(piece)
            return
        while piece and not self._closing:
            if not isinstance(self._protocol, asyncio.BufferedProtocol):
                self._protocol.data_received(piece)
                return
            memory = cast("memoryview", self._protocol.get_buffer(-1))
            if not memory:
                raise AssertionError("asyncio takes an empty buffer for a mistake")
            count = min(len(memory), len(piece))
            memory[:count] = piece[:count]
            self._protocol.buffer_updated(count)
            piece = piece[count:]


_loop = StepLoop()


def _make_server() -> HttpServer:
    server = HttpServer(
        EchoService(_loop.loop),
        HttpConfig(tls=False),
        LIMITS,
        server_name="fuzzed",
        render_metrics=lambda: (b"", "text/plain"),
    )
    server._listener = _NoListener()  # type: ignore[assignment]
    _loop.run(server.start())
    server._watch.stop()
    return server


_server = _make_server()


def connect(data: bytes) -> str:
    """One connection: the statuses of its answers."""
    seed = int.from_bytes(data[:2], "little")
    tasks = asyncio.all_tasks(_loop.loop)
    connection = _loop.run(_open(_server))
    transport = _Transport(connection, _loop.loop)
    _loop.loop.call_soon(connection.connection_made, transport)
    _settle()
    rest = data[2:]
    for piece in itertools.islice(chunks(rest, seed), _PIECES):
        _loop.run(_receive(transport, piece))
        rest = rest[len(piece) :]
        if seed % 2:
            _settle()
    _loop.run(_receive(transport, rest))
    _settle()
    transport.close()
    _settle()
    left = asyncio.all_tasks(_loop.loop) - tasks
    if _server._budget.held or _server._answers.running or _server.admission.connections or left:
        raise AssertionError(
            f"a connection that is closed leaves {_server._budget.held} bytes, {_server._answers}, "
            f"{_server.admission}, {len(left)} tasks"
        )
    written = bytes(transport.written)
    if written and not written.startswith(b"HTTP/"):
        raise AssertionError(f"an answer begins with {written[:40]!r}")
    statuses = [part[:3].decode("latin-1") for part in written.split(b"HTTP/1.1 ")[1:][:6]]
    return " ".join(statuses)


async def _open(server: HttpServer) -> Any:
    return server._make_connection(server.admission.enter("127.0.0.1"))


async def _receive(transport: _Transport, piece: bytes) -> None:
    transport.receive(piece)


def _settle() -> None:
    for _ in range(_STEPS):
        _loop.settle()


def mutate_requests(data: bytes, dice: random.Random) -> bytes:
    """Other frames in a body of a fitting length, other fields in a head, requests twice, or blind changes."""
    chunking, rest = dice.randbytes(2), data[2:]
    choice = dice.randrange(6)
    head, separator, body = rest.partition(b"\r\n\r\n")
    if choice == 0 or not separator:
        return mutate_bytes(data, dice)
    if choice == 1:
        return chunking + rest + rest[: dice.randrange(len(rest) + 1)]
    if choice == 2:
        lines = head.split(b"\r\n")
        lines.insert(dice.randrange(1, len(lines) + 1), dice.choice(_FIELDS))
        return chunking + b"\r\n".join(lines) + separator + body
    if choice == 3:
        return chunking + rest
    if choice == 4:
        body = MUTATORS["frames"](body, dice)
        fields = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
        return chunking + b"\r\n".join([*fields, b"Content-Length: %d" % len(body)]) + separator + body
    return chunking + mutate_bytes(head, dice) + separator + body


MUTATORS["requests"] = mutate_requests


def seeds() -> dict[str, bytes]:
    def call(rows: int, uid: str = "any") -> bytes:
        headers, memories = describe_tensors((torch.zeros(rows, 2),))
        return b"".join(encode_frame(RequestHeader(id="a", model_name=uid, inputs=headers), memories).buffers)

    def post(body: bytes, *fields: bytes) -> bytes:
        lines = [b"POST /p2pmoe/v1/exchange HTTP/1.1", b"Host: x", *fields, b"Content-Length: %d" % len(body)]
        return b"\r\n".join([*lines, b"", b""]) + body

    get = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    small, large = call(1), call(12_000)
    chunked = b"POST /p2pmoe/v1/exchange HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(small), small)
    return {
        name: chunking + data
        for name, chunking, data in (
            ("one-call", b"\0\0", get + post(small)),
            ("one-call-in-pieces", b"\1\0", get + post(small) + post(small)),
            ("two-calls", b"\1\0", post(small + call(2, "ffn.0"))),
            ("a-large-call", b"\3\0", post(large + small)),
            ("a-large-call-pipelined", b"\0\0", get + post(large) + post(small) + get),
            ("chunked", b"\1\0", chunked + post(small)),
            ("closing", b"\1\0", post(small, b"Connection: close")),
        )
    }


TARGETS: Final = (
    Target(
        "connections", connect, (), LIMITS.max_exchange_bytes + LIMITS.max_body_bytes, seeds, mutate="requests",
        max_input_bytes=128 * KIB, deadline_s=10.0,
    ),
)  # fmt: skip
