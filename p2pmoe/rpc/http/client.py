"""The calling side over HTTP. Knows frames and endpoints, nothing of experts or gradients."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from p2pmoe.errors import PeerUnreachableError
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.protocol.frames import EncodedFrame, FrameLimits, FrameReader
from p2pmoe.protocol.messages import ResponseHeader, response_decoder
from p2pmoe.rpc.base import Reply
from p2pmoe.rpc.deadline import Deadline
from p2pmoe.rpc.http.blocking import IDLE_S, BlockingPosts
from p2pmoe.rpc.http.client_sessions import ClientSessions
from p2pmoe.rpc.http.direct import DirectPost, DirectResponse
from p2pmoe.rpc.http.documents import (
    CONNECTION_ERRORS,
    EXCHANGE_PATH,
    WIRE_VERSION_HEADER,
    fetch_json,
    open_session,
    post_document,
    refusal,
    unreachable,
)
from p2pmoe.rpc.http.tls import Pins
from p2pmoe.rpc.http.writing import body_of, write_frames
from p2pmoe.rpc.resolver import Resolver
from p2pmoe.types import WIRE_VERSION, Endpoint

_READ_BYTES = 4 * 1024 * 1024  # the stream buffer; the default of 64 KiB stops and starts the socket all the time
_DIRECT_BYTES = 1024 * 1024  # larger requests are written with back-pressure while the first results arrive
_MAX_PEERS = 4096  # whose prepared requests are kept
_Response = DirectResponse | aiohttp.ClientResponse


class FramesPayload(aiohttp.payload.Payload):
    """A request body made of frames, written without joining large buffers."""

    def __init__(self, frames: Sequence[EncodedFrame]) -> None:
        super().__init__(frames, content_type="application/octet-stream")
        self._size = sum(frame.nbytes for frame in frames)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise TypeError("frames are no text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        await write_frames(self._value, writer.write)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        assert content_length is None or content_length == self._size
        await self.write(writer)


class HttpTransport:
    """Connections pooled per peer; one instance belongs to the event loop it is first used on.

    With an `identity` calls go through a session with each node whose public key is known; without they are anonymous.
    `swarm_key` is that of a private swarm. `resolver` looks up the names of peers that are announced by name.
    """

    def __init__(
        self,
        limits: FrameLimits | None = None,
        *,
        identity: Identity | None = None,
        swarm_key: SwarmKey | None = None,
        connect_timeout_s: float = 3.0,
        resolver: Resolver | None = None,
    ) -> None:
        self._resolver = resolver or Resolver()
        self._limits = limits or FrameLimits()
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._posts: dict[Endpoint, DirectPost] = {}
        self._pins = Pins()
        self._sessions = ClientSessions(identity, swarm_key, self._post_document, clock=time.monotonic)
        self._headers = ((hdrs.CONTENT_TYPE, "application/octet-stream"), (WIRE_VERSION_HEADER, str(WIRE_VERSION)))
        self._blocking = BlockingPosts(
            EXCHANGE_PATH,
            self._headers,
            self._limits,
            self._pins,
            self._sessions,
            connect_timeout_s=connect_timeout_s,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sweeping = False
        self._bytes_sent = 0
        self._bytes_received = 0
        self._exchanges = 0

    @property
    def exchanges(self) -> int:
        """HTTP exchanges begun."""
        return self._exchanges + self._blocking.exchanges

    @property
    def bytes_sent(self) -> int:
        """Of requests' bodies."""
        return self._bytes_sent + self._blocking.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Of answers' bodies."""
        return self._bytes_received + self._blocking.bytes_received

    def __repr__(self) -> str:
        return f"<HttpTransport: {self.exchanges} exchanges>"

    async def exchange(
        self, endpoint: Endpoint, frames: Sequence[EncodedFrame], inspect: Callable[[ResponseHeader], bool]
    ) -> AsyncGenerator[Reply, None]:
        """See `Transport.exchange`."""
        self._exchanges += 1
        response = await self._call(endpoint, frames)
        try:
            if response.status != 200:
                raise await refusal(response)
            reader: FrameReader[ResponseHeader] = FrameReader(response_decoder, self._limits)
            content = response.content
            while chunk := await content.readany():
                self._bytes_received += len(chunk)
                reader.feed(chunk)
                for frame in reader.accepted_frames(inspect):
                    yield frame
            reader.feed_eof()
        except CONNECTION_ERRORS as error:
            raise unreachable(endpoint, error) from error
        finally:
            # An unread rest would be drained or block the connection for the next exchange: close it then.
            response.release() if response.content.at_eof() else response.close()

    def try_exchange(
        self,
        endpoint: Endpoint,
        frames: Sequence[EncodedFrame],
        inspect: Callable[[ResponseHeader], bool],
        deadline: Deadline,
    ) -> Generator[Reply, None, None] | None:
        """See `BlockingTransport.try_exchange`."""
        if self._loop is None or self._loop.is_closed():
            return None
        if not self._sweeping:
            self._sweeping = True
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._sweep_later)
        return self._blocking.try_exchange(endpoint, frames, inspect, deadline)

    def proves(self, endpoint: Endpoint) -> bool:
        """See `ProvingTransport`: only TLS that is pinned to the peer's key does."""
        return endpoint.scheme == "https" and endpoint.public_key is not None

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        """See `Transport.get_json`."""
        return await fetch_json(self._open(), self._pins, endpoint, path)

    async def close(self) -> None:
        """See `Transport.close`."""
        self._blocking.close()
        await self._sessions.close()
        if self._session is not None:
            await self._session.close()
            self._session = None
            self._posts.clear()

    # -- private

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._loop = asyncio.get_running_loop()
            self._session = open_session(self._timeout, resolver=self._resolver, read_bufsize=_READ_BYTES)
        return self._session

    def _sweep_later(self) -> None:
        assert self._loop is not None
        self._loop.call_later(IDLE_S / 2, self._sweep)

    def _sweep(self) -> None:
        """Once nothing is idle, the next exchange begins anew with looking."""
        self._sweeping = False  # should it raise, the next exchange begins anew too
        self._sweeping = bool(self._blocking.sweep())
        if self._sweeping:
            self._sweep_later()

    async def _post_document(self, endpoint: Endpoint, path: str, body: bytes) -> bytes:
        return await post_document(self._open(), self._pins, endpoint, path, body)

    async def _call(self, endpoint: Endpoint, frames: Sequence[EncodedFrame]) -> _Response:
        authorization = await self._sessions.authorize(endpoint)
        response = await self._post_or_fail(endpoint, frames, authorization)
        if response.status == 401 and self._sessions.covers(endpoint):  # the node was restarted, or wants sessions now
            response.close()
            self._sessions.forget(endpoint, authorization)
            authorization = await self._sessions.authorize(endpoint)
            response = await self._post_or_fail(endpoint, frames, authorization)
        return response

    async def _post_or_fail(
        self, endpoint: Endpoint, frames: Sequence[EncodedFrame], authorization: str | None
    ) -> _Response:
        try:
            return await self._post(endpoint, frames, authorization)
        except PeerUnreachableError:  # an endpoint that must not be called; it is an OSError too
            raise
        except CONNECTION_ERRORS as error:
            raise unreachable(endpoint, error) from error

    async def _post(self, endpoint: Endpoint, frames: Sequence[EncodedFrame], authorization: str | None) -> _Response:
        nbytes = sum(frame.nbytes for frame in frames)
        self._bytes_sent += nbytes
        try:
            return await self._send(endpoint, frames, nbytes, authorization)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if isinstance(error, aiohttp.ClientConnectorError):
                raise
            # A pooled connection may have been closed by the peer just now. The ids are the same, and the
            # server applies a backward id at most once, so asking again is safe.
            return await self._send(endpoint, frames, nbytes, authorization)

    async def _send(
        self, endpoint: Endpoint, frames: Sequence[EncodedFrame], nbytes: int, authorization: str | None
    ) -> _Response:
        session = self._open()
        if nbytes > _DIRECT_BYTES:
            url, context = URL(endpoint.url + EXCHANGE_PATH), self._pins.context_for(endpoint)
            headers = None if authorization is None else {hdrs.AUTHORIZATION: authorization}
            payload = FramesPayload(frames)
            return await session.post(url, data=payload, headers=headers, ssl=context, allow_redirects=False)
        post = self._posts.get(endpoint) or self._prepare(session, endpoint)
        return await post.send(body_of(frames), nbytes, authorization)

    def _prepare(self, session: aiohttp.ClientSession, endpoint: Endpoint) -> DirectPost:
        assert session.connector is not None
        if len(self._posts) >= _MAX_PEERS:
            self._posts.clear()
        post = self._posts[endpoint] = DirectPost(
            session.connector,
            URL(endpoint.url + EXCHANGE_PATH),
            context=self._pins.context_for(endpoint),
            headers=self._headers,
            timeout=self._timeout,
            read_bufsize=_READ_BYTES,
        )
        return post
