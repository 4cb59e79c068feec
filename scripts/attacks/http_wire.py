"""HTTP as an attacker speaks it: bytes on a connection, and whatever comes back. No HTTP library would let us lie."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import struct
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

CONNECT_S = 3.0
REPLY_S = 4.0
PREFIX = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back; `status` 0 when there was no HTTP reply: then `end` says how it ended."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    end: str = ""

    @property
    def seen(self) -> str:
        return str(self.status) if self.status else self.end

    @property
    def frames(self) -> list[dict[str, Any]]:
        """The headers of the frames in the body."""
        return [header for header, _ in self._parts()]

    @property
    def answers(self) -> list[tuple[dict[str, Any], bytes]]:
        """Headers and tensors, without the expert's updates, which go on between a call and its repetition."""
        parts = self._parts()
        for header, _ in parts:
            header.get("parameters", {}).pop("updates", None)
        return parts

    def _parts(self) -> list[tuple[dict[str, Any], bytes]]:
        parts, rest = [], self.body
        while rest:
            header_bytes, body_bytes = PREFIX.unpack_from(rest)
            body_at = 8 + header_bytes
            parts.append((json.loads(rest[8:body_at]), rest[body_at : body_at + body_bytes]))
            rest = rest[body_at + body_bytes :]
        return parts

    @property
    def seen_frames(self) -> str:
        """`frame 400`, or `frame 200+400` for several; the status when the exchange as a whole was refused."""
        if self.status != 200:
            return self.seen
        codes = sorted({frame.get("code", 200) for frame in self.frames})
        return "frame " + "+".join(map(str, codes)) if codes else "no frame"


def attacker_tls(host_checks: bool = False) -> ssl.SSLContext:
    """A stranger's TLS: it believes any certificate, and any version from 1.2 on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = host_checks
    context.verify_mode = ssl.CERT_NONE
    return context


class Line:
    """One connection. `sent` counts bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: Counter[str]) -> None:
        self.reader, self.writer, self._sent = reader, writer, sent

    @classmethod
    async def open(
        cls, host: str, port: int, tls: ssl.SSLContext | None, sent: Counter[str], *, source: str | None = None
    ) -> Self:
        """Raises OSError or TimeoutError when nobody answers, or the handshake is refused. `source`: from where."""
        local = (source, 0) if source else None
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=2**24, local_addr=local)
        sent["connections"] += 1
        return cls(reader, writer, sent)

    async def send(self, data: bytes) -> bool:
        """False when the node has closed the connection or stopped reading."""
        self._sent["bytes"] += len(data)
        with contextlib.suppress(OSError, TimeoutError):
            self.writer.write(data)
            async with asyncio.timeout(REPLY_S):
                await self.writer.drain()
            return True
        return False

    async def reply(self, within_s: float = REPLY_S) -> Reply:
        """The next HTTP reply. `end` is "closed" or "silent" when there was none."""
        try:
            async with asyncio.timeout(within_s):
                return await self._reply()
        except (asyncio.IncompleteReadError, OSError):
            return Reply(0, end="closed")
        except TimeoutError:
            return Reply(0, end="silent")
        except (ValueError, IndexError, asyncio.LimitOverrunError):
            return Reply(0, end="no HTTP")

    async def is_closed(self, within_s: float = REPLY_S) -> bool:
        """Whether the node closes the connection in time; what it still says is thrown away."""
        try:
            async with asyncio.timeout(within_s):
                while await self.reader.read(65536):
                    pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True

    async def _reply(self) -> Reply:
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        pairs = [line.partition(":") for line in lines if line]
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if headers.get("transfer-encoding") == "chunked":
            return Reply(status, headers, await self._chunks())
        return Reply(status, headers, await self.reader.readexactly(int(headers.get("content-length", 0))))

    async def _chunks(self) -> bytes:
        body = bytearray()
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readuntil(b"\r\n")
        return bytes(body)

    async def close(self) -> None:
        """Drop the connection at once, without a farewell of TLS."""
        self.writer.transport.abort()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self.writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """A whole request; `headers` replace the honest ones, an empty value leaves one out."""
    lines = {"Host": "node", "Content-Length": str(len(body))} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def frame(header: Any, body: bytes = b"", *, header_bytes: int | None = None, body_bytes: int | None = None) -> bytes:
    """A frame that may lie about its lengths. `header` is JSON text as bytes, or a value."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    lengths = (
        len(text) if header_bytes is None else header_bytes,
        len(body) if body_bytes is None else body_bytes,
    )
    return PREFIX.pack(*lengths) + text + body
