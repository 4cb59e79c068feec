"""The calling side over HTTP. Knows frames and endpoints, nothing of experts or gradients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import aiohttp
import msgspec
from aiohttp import hdrs
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict
from yarl import URL

from p2pmoe.errors import DecodeError, PeerUnreachableError, call_error
from p2pmoe.protocol.frames import EncodedFrame, Frame, FrameLimits, FrameReader, FrameReceived, HeaderReceived
from p2pmoe.protocol.messages import ResponseHeader, response_decoder
from p2pmoe.types import WIRE_VERSION, Endpoint

WIRE_VERSION_HEADER = "P2PMoE-Wire-Version"
_EXCHANGE_PATH = f"/p2pmoe/v{WIRE_VERSION}/exchange"
_JOIN_BYTES = 64 * 1024  # below this one joined write beats several system calls
_READ_BYTES = 4 * 1024 * 1024  # the stream buffer; the default of 64 KiB stops and starts the socket all the time
_MAX_DOCUMENT_BYTES = 4 * 1024 * 1024


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
            if len(buffer) <= _JOIN_BYTES:
                joined += buffer
                if len(joined) < _JOIN_BYTES:
                    continue
            if joined:
                await write(bytes(joined))
                joined = bytearray()
            if len(buffer) > _JOIN_BYTES:
                await write(buffer)
    if joined:
        await write(bytes(joined))


class HttpTransport:
    """Connections pooled per peer; one instance belongs to the event loop it is first used on."""

    def __init__(self, limits: FrameLimits | None = None, *, connect_timeout_s: float = 3.0) -> None:
        self._limits = limits or FrameLimits()
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._headers: CIMultiDict[str] = CIMultiDict({WIRE_VERSION_HEADER: str(WIRE_VERSION)})
        self._urls: dict[Endpoint, URL] = {}
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
        try:
            response = await self._post(endpoint, frames)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(endpoint, error) from error
        try:
            if response.status != 200:
                raise await _refusal(response)
            reader: FrameReader[ResponseHeader] = FrameReader(response_decoder, self._limits)
            content = response.content
            while chunk := await content.readany():
                self.bytes_received += len(chunk)
                reader.feed(chunk)
                while (event := reader.next_event()) is not None:
                    if isinstance(event, FrameReceived):
                        yield event.frame
                    elif isinstance(event, HeaderReceived):
                        if not inspect(event.header):
                            reader.skip()
                    else:
                        raise event.error
            reader.feed_eof()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(endpoint, error) from error
        finally:
            # An unread rest would be drained or block the connection for the next exchange: close it then.
            response.release() if response.content.at_eof() else response.close()

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        """See `Transport.get_json`."""
        try:
            async with self._open().get(URL(endpoint.url + path), headers=self._headers) as response:
                if response.status != 200:
                    raise await _refusal(response)
                body = await _read_document(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(endpoint, error) from error
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(f"{endpoint}{path} is no JSON document: {error}") from error

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- private

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=self._timeout,
                auto_decompress=False,  # a compressed answer is never asked for, and could be a bomb
                read_bufsize=_READ_BYTES,
                skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING),
            )
        return self._session

    async def _post(self, endpoint: Endpoint, frames: Sequence[EncodedFrame]) -> aiohttp.ClientResponse:
        url = self._urls.get(endpoint)
        if url is None:
            url = self._urls[endpoint] = URL(endpoint.url + _EXCHANGE_PATH)
        payload = FramesPayload(frames)
        self.bytes_sent += payload.size or 0
        session = self._open()
        try:
            return await session.post(url, data=payload, headers=self._headers, allow_redirects=False)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if isinstance(error, aiohttp.ClientConnectorError):
                raise
            # A pooled connection may have been closed by the peer just now. The ids are the same, and the
            # server applies a backward id at most once, so asking again is safe.
            return await session.post(url, data=FramesPayload(frames), headers=self._headers, allow_redirects=False)


async def _read_document(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_DOCUMENT_BYTES:
            raise DecodeError(f"{response.url} is longer than {_MAX_DOCUMENT_BYTES} bytes")
    return bytes(body)


async def _refusal(response: aiohttp.ClientResponse) -> Exception:
    """The CallError for a status that refuses the whole exchange."""
    try:
        document = msgspec.json.decode(await _read_document(response))
        message = str(document["error"])[:4096]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"{response.url} answered {response.status} {response.reason}"
    retry_after = response.headers.get(hdrs.RETRY_AFTER, "")
    return call_error(response.status, message, float(retry_after) if retry_after.isdigit() else None)


def _unreachable(endpoint: Endpoint, error: BaseException) -> PeerUnreachableError:
    reason = str(error) or type(error).__name__
    if isinstance(error, asyncio.TimeoutError):
        reason = f"no connection in time ({reason})"
    return PeerUnreachableError(f"{endpoint} cannot be reached: {reason}; is the node up and its port open?")
