"""A POST without the HTTP library's ceremony: its pool, its connections and its parser, the request written by hand.

A small call spends more time in the library's request object, its writer task and its response object than on the
wire (docs/benchmarks.md); all of those exist for what an exchange never has: cookies, redirects, proxies, encodings.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Final

import aiohttp
from aiohttp import hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError, RawResponseMessage
from multidict import CIMultiDictProxy
from yarl import URL

from p2pmoe.protocol.frames import Buffer

JOIN_BYTES: Final = 64 * 1024  # below this one joined write beats several system calls
SLICE_BYTES: Final = 256 * 1024  # asyncio copies what the socket does not take of one write; so little of it at a time


class DirectResponse:
    """Status and headers of an answer, and its body as it arrives. `release()` or `close()` it."""

    def __init__(
        self,
        url: URL,
        connection: aiohttp.connector.Connection,
        message: RawResponseMessage,
        body: aiohttp.StreamReader,
    ) -> None:
        self.url = url
        self.status: int = message.code
        self.reason: str | None = message.reason
        self.headers: CIMultiDictProxy[str] = message.headers
        self.content = body
        self._connection = connection

    def __repr__(self) -> str:
        return f"<DirectResponse {self.status} of {self.url}>"

    def release(self) -> None:
        """Give the connection back to the pool."""
        self._connection.release()

    def close(self) -> None:
        """Close the connection: the rest of the body is not wanted."""
        self._connection.close()


class DirectPost:
    """Posts bodies to one URL over a connector's pooled connections.

    Args:
        connector: whose connections are used and pooled.
        url: where to.
        context: the TLS that pins the peer, or what the library takes for plain HTTP.
        headers: of every request, `Host` and `Content-Length` excepted. ASCII, no line ends.
        timeout: for connecting; reading is the caller's to bound.
        read_bufsize: bytes of a body that are read ahead.
    """

    def __init__(
        self,
        connector: aiohttp.BaseConnector,
        url: URL,
        *,
        context: ssl.SSLContext | bool,
        headers: Iterable[tuple[str, str]],
        timeout: aiohttp.ClientTimeout,
        read_bufsize: int,
    ) -> None:
        self._connector = connector
        self._timeout = timeout
        self._read_bufsize = read_bufsize
        self._url = url
        # Says to the pool whose connection is wanted; it is never sent.
        self._request = aiohttp.ClientRequest(hdrs.METH_POST, url, loop=asyncio.get_running_loop(), ssl=context)
        lines = [f"POST {url.raw_path_qs} HTTP/1.1", f"Host: {url.raw_authority}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self._head = ("\r\n".join(lines) + "\r\n").encode("ascii")

    def __repr__(self) -> str:
        return f"<DirectPost {self._url}>"

    async def send(self, buffers: Iterable[Buffer], nbytes: int, authorization: str | None = None) -> DirectResponse:
        """Post a body of `nbytes` given as buffers. Raises aiohttp.ClientError, TimeoutError or OSError.

        `authorization` is sent as that header: printable ASCII.
        """
        head = b"%bContent-Length: %d\r\n" % (self._head, nbytes)
        if authorization is not None:
            head += b"Authorization: %b\r\n" % authorization.encode("ascii")
        connection = await self._connector.connect(self._request, [], self._timeout)
        try:
            protocol, transport = _ends(connection)
            protocol.set_response_params(auto_decompress=False, read_bufsize=self._read_bufsize)
            for part in joined(buffers, bytearray(head + b"\r\n")):
                transport.write(part)
            while True:
                message, body = await protocol.read()
                if not 100 <= message.code < 200 or message.code == 101:
                    return DirectResponse(self._url, connection, message, body)
        except HttpProcessingError as error:
            connection.close()
            raise aiohttp.ClientPayloadError(f"the answer is no HTTP: {error.message}") from error
        except BaseException:
            connection.close()
            raise


def _ends(connection: aiohttp.connector.Connection) -> tuple[ResponseHandler, asyncio.Transport]:
    if connection.protocol is None or connection.transport is None:
        raise aiohttp.ServerDisconnectedError
    return connection.protocol, connection.transport


def joined(buffers: Iterable[Buffer], begin: bytearray | None = None) -> Iterable[Buffer]:
    """What to write, in order: small buffers joined after `begin`, large tensor memory as it lies, in slices."""
    together = begin or bytearray()
    for buffer in buffers:
        if len(buffer) <= JOIN_BYTES:
            together += buffer
            if len(together) < JOIN_BYTES:
                continue
        if together:
            yield bytes(together)
            together = bytearray()
        for start in range(0, len(buffer), SLICE_BYTES) if len(buffer) > JOIN_BYTES else ():
            yield memoryview(buffer)[start : start + SLICE_BYTES]
    if together:
        yield bytes(together)
