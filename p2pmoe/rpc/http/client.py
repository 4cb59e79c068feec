"""The calling side over HTTP. Knows frames and endpoints, nothing of experts or gradients."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import chain
from typing import Any

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from p2pmoe.errors import PeerUnreachableError
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.protocol.frames import EncodedFrame, Frame, FrameLimits, FrameReader
from p2pmoe.protocol.messages import ResponseHeader, response_decoder
from p2pmoe.rpc.http.client_sessions import ClientSessions
from p2pmoe.rpc.http.direct import DirectPost, DirectResponse, joined
from p2pmoe.rpc.http.documents import (
    CONNECTION_ERRORS,
    WIRE_VERSION_HEADER,
    fetch_json,
    open_session,
    post_document,
    refusal,
    unreachable,
)
from p2pmoe.rpc.http.tls import Pins
from p2pmoe.types import WIRE_VERSION, Endpoint

_EXCHANGE_PATH = f"/p2pmoe/v{WIRE_VERSION}/exchange"
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


async def write_frames(frames: Sequence[EncodedFrame], write: Callable[..., Any]) -> None:
    """Small frames in one joined write, large tensor memory as it lies."""
    for part in joined(chain.from_iterable(frame.buffers for frame in frames)):
        await write(part)


class HttpTransport:
    """Connections pooled per peer; one instance belongs to the event loop it is first used on.

    With an `identity` calls go through a session with each node whose public key is known; without they are anonymous.
    `swarm_key` is that of a private swarm.
    """

    def __init__(
        self,
        limits: FrameLimits | None = None,
        *,
        identity: Identity | None = None,
        swarm_key: SwarmKey | None = None,
        connect_timeout_s: float = 3.0,
    ) -> None:
        self._limits = limits or FrameLimits()
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._posts: dict[Endpoint, DirectPost] = {}
        self._pins = Pins()
        self._sessions = ClientSessions(identity, swarm_key, self._post_document, clock=time.monotonic)
        self.bytes_sent = 0
        self.bytes_received = 0
        self.exchanges = 0

    def __repr__(self) -> str:
        return f"<HttpTransport: {self.exchanges} exchanges>"

    async def exchange(
        self, endpoint: Endpoint, frames: Sequence[EncodedFrame], inspect: Callable[[ResponseHeader], bool]
    ) -> AsyncGenerator[Frame[ResponseHeader], None]:
        """See `Transport.exchange`."""
        self.exchanges += 1
        response = await self._call(endpoint, frames)
        try:
            if response.status != 200:
                raise await refusal(response)
            reader: FrameReader[ResponseHeader] = FrameReader(response_decoder, self._limits)
            content = response.content
            while chunk := await content.readany():
                self.bytes_received += len(chunk)
                reader.feed(chunk)
                for frame in reader.accepted_frames(inspect):
                    yield frame
            reader.feed_eof()
        except CONNECTION_ERRORS as error:
            raise unreachable(endpoint, error) from error
        finally:
            # An unread rest would be drained or block the connection for the next exchange: close it then.
            response.release() if response.content.at_eof() else response.close()

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        """See `Transport.get_json`."""
        return await fetch_json(self._open(), self._pins, endpoint, path)

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._sessions.close()
        if self._session is not None:
            await self._session.close()
            self._session = None
            self._posts.clear()

    # -- private

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = open_session(self._timeout, read_bufsize=_READ_BYTES)
        return self._session

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
        self.bytes_sent += nbytes
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
            url, context = URL(endpoint.url + _EXCHANGE_PATH), self._pins.context_for(endpoint)
            headers = None if authorization is None else {hdrs.AUTHORIZATION: authorization}
            payload = FramesPayload(frames)
            return await session.post(url, data=payload, headers=headers, ssl=context, allow_redirects=False)
        post = self._posts.get(endpoint) or self._prepare(session, endpoint)
        return await post.send(chain.from_iterable(frame.buffers for frame in frames), nbytes, authorization)

    def _prepare(self, session: aiohttp.ClientSession, endpoint: Endpoint) -> DirectPost:
        assert session.connector is not None
        if len(self._posts) >= _MAX_PEERS:
            self._posts.clear()
        post = self._posts[endpoint] = DirectPost(
            session.connector,
            URL(endpoint.url + _EXCHANGE_PATH),
            context=self._pins.context_for(endpoint),
            headers=[(hdrs.CONTENT_TYPE, "application/octet-stream"), (WIRE_VERSION_HEADER, str(WIRE_VERSION))],
            timeout=self._timeout,
            read_bufsize=_READ_BYTES,
        )
        return post
