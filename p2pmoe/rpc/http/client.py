"""The calling side over HTTP. Knows frames and endpoints, nothing of experts or gradients."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from p2pmoe.protocol.frames import EncodedFrame, Frame, FrameLimits, FrameReader
from p2pmoe.protocol.messages import ResponseHeader, response_decoder
from p2pmoe.rpc.http.documents import fetch_json, open_session, refusal, unreachable
from p2pmoe.rpc.http.tls import Pins
from p2pmoe.types import WIRE_VERSION, Endpoint

_EXCHANGE_PATH = f"/p2pmoe/v{WIRE_VERSION}/exchange"
JOIN_BYTES = 64 * 1024  # below this one joined write beats several system calls
_SLICE_BYTES = 256 * 1024  # asyncio copies what the socket does not take of one write; so little of it at a time
_READ_BYTES = 4 * 1024 * 1024  # the stream buffer; the default of 64 KiB stops and starts the socket all the time


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
    joined = bytearray()
    for frame in frames:
        for buffer in frame.buffers:
            if len(buffer) <= JOIN_BYTES:
                joined += buffer
                if len(joined) < JOIN_BYTES:
                    continue
            if joined:
                await write(bytes(joined))
                joined = bytearray()
            for start in range(0, len(buffer), _SLICE_BYTES) if len(buffer) > JOIN_BYTES else ():
                await write(memoryview(buffer)[start : start + _SLICE_BYTES])
    if joined:
        await write(bytes(joined))


class HttpTransport:
    """Connections pooled per peer; one instance belongs to the event loop it is first used on."""

    def __init__(self, limits: FrameLimits | None = None, *, connect_timeout_s: float = 3.0) -> None:
        self._limits = limits or FrameLimits()
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._urls: dict[Endpoint, URL] = {}
        self._pins = Pins()
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
        context = self._pins.context_for(endpoint)
        try:
            response = await self._post(endpoint, frames, context)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unreachable(endpoint, error) from error
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
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unreachable(endpoint, error) from error
        finally:
            # An unread rest would be drained or block the connection for the next exchange: close it then.
            response.release() if response.content.at_eof() else response.close()

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        """See `Transport.get_json`."""
        return await fetch_json(self._open(), self._pins, endpoint, path)

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- private

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = open_session(self._timeout, read_bufsize=_READ_BYTES)
        return self._session

    async def _post(
        self, endpoint: Endpoint, frames: Sequence[EncodedFrame], context: ssl.SSLContext | bool
    ) -> aiohttp.ClientResponse:
        url = self._urls.get(endpoint)
        if url is None:
            url = self._urls[endpoint] = URL(endpoint.url + _EXCHANGE_PATH)
        payload = FramesPayload(frames)
        self.bytes_sent += payload.size or 0
        session = self._open()
        try:
            return await session.post(url, data=payload, ssl=context, allow_redirects=False)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if isinstance(error, aiohttp.ClientConnectorError):
                raise
            # A pooled connection may have been closed by the peer just now. The ids are the same, and the
            # server applies a backward id at most once, so asking again is safe.
            return await session.post(url, data=FramesPayload(frames), ssl=context, allow_redirects=False)
