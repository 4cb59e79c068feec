"""A POST without the HTTP library's ceremony: its pool, its connections and its parser, the request written by hand.

A small call spends more time in the library's request object, its writer task and its response object than on the
wire (docs/benchmarks.md); all of those exist for what an exchange never has: cookies, redirects, proxies, encodings.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable

import aiohttp
from aiohttp import hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError, RawResponseMessage
from multidict import CIMultiDictProxy
from yarl import URL

from p2pmoe.protocol.frames import Buffer
from p2pmoe.rpc.http.writing import joined, post_head, with_length


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
        self._head = post_head(url, headers)

    def __repr__(self) -> str:
        return f"<DirectPost {self._url}>"

    async def send(self, buffers: Iterable[Buffer], nbytes: int, authorization: str | None = None) -> DirectResponse:
        """Post a body of `nbytes` given as buffers. Raises aiohttp.ClientError, TimeoutError or OSError.

        `authorization` is sent as that header: printable ASCII.
        """
        connection = await self._connector.connect(self._request, [], self._timeout)
        try:
            protocol, transport = _ends(connection)
            protocol.set_response_params(auto_decompress=False, read_bufsize=self._read_bufsize)
            for part in joined(buffers, with_length(self._head, nbytes, authorization)):
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
