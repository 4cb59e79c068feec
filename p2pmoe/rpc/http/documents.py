"""JSON documents of a node over HTTP. Knows neither frames nor tensors, so it serves callers that never load torch."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Protocol, Self

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from p2pmoe.errors import CallError, DecodeError, NameLookupError, PeerIdentityError, PeerUnreachableError, call_error
from p2pmoe.forks import shared
from p2pmoe.protocol.messages import MAX_DOCUMENT_BYTES, decode_document
from p2pmoe.rpc.http.tls import CertificateRefused, Pins
from p2pmoe.rpc.resolver import Resolver
from p2pmoe.types import WIRE_VERSION, Endpoint

WIRE_VERSION_HEADER: Final = "P2PMoE-Wire-Version"
EXCHANGE_PATH: Final = f"/p2pmoe/v{WIRE_VERSION}/exchange"
CONNECTION_ERRORS: Final = (aiohttp.ClientError, TimeoutError, OSError, UnicodeError)
"""What the HTTP library raises when a peer is not there; the last for a host that is no name, like `a..b`."""


LOOKUP_TIMEOUT_S: Final = 3.0
"""How long a peer's name may take to resolve."""
_NEXT_ADDRESS_S: Final = 0.25


class Response(Protocol):
    """What a refusal is read from."""

    @property
    def url(self) -> URL: ...
    @property
    def status(self) -> int: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def content(self) -> aiohttp.StreamReader: ...


class _Names(AbstractResolver):
    """Our resolver as the HTTP library wants it: it has a time limit, and no thread of a pool to wait for."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=each, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)
            for each in await self._resolver.addresses(host, timeout_s=LOOKUP_TIMEOUT_S)
        ]

    async def close(self) -> None:
        """Nothing is kept."""


def open_session(
    timeout: aiohttp.ClientTimeout, *, resolver: Resolver | None = None, **options: Any
) -> aiohttp.ClientSession:
    """A session that keeps connections per peer and accepts nothing it did not ask for.

    Of a name with several addresses all are tried, each a quarter of a second after the one before (RFC 8305).
    """
    names = _Names(resolver or Resolver())
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=30.0,
            resolver=names,
            happy_eyeballs_delay=_NEXT_ADDRESS_S,
            socket_factory=_make_socket,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=timeout,
        auto_decompress=False,  # a compressed answer is never asked for, and could be a bomb
        skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING),
        headers={WIRE_VERSION_HEADER: str(WIRE_VERSION)},
        **options,
    )


def _make_socket(address: tuple[Any, ...]) -> socket.socket:
    """Of aiohttp's connections, listed so that a forked child leaves them alone."""
    family, kind, protocol = address[:3]
    return shared(socket.socket(family, kind, protocol))


async def fetch_json(session: aiohttp.ClientSession, pins: Pins, endpoint: Endpoint, path: str) -> Any:
    """A JSON document of the node. Raises PeerUnreachableError, CallError, DecodeError."""
    context = pins.context_for(endpoint)
    try:
        async with session.get(URL(endpoint.url + path), ssl=context, allow_redirects=False) as response:
            if response.status != 200:
                raise await refusal(response)
            body = await _read_document(response)
    except CONNECTION_ERRORS as error:
        raise unreachable(endpoint, error) from error
    try:
        return decode_document(body)
    except DecodeError as error:
        raise DecodeError(f"{endpoint}{path}: {error}", code=error.code) from error


async def post_document(
    session: aiohttp.ClientSession, pins: Pins, endpoint: Endpoint, path: str, body: bytes
) -> bytes:
    """The answer to a small body. Raises PeerUnreachableError, CallError, DecodeError."""
    context = pins.context_for(endpoint)
    try:
        async with session.post(URL(endpoint.url + path), data=body, ssl=context, allow_redirects=False) as response:
            if response.status != 200:
                raise await refusal(response)
            return await _read_document(response)
    except CONNECTION_ERRORS as error:
        raise unreachable(endpoint, error) from error


class HttpDocuments:
    """Reads documents of many nodes, each within `timeout_s`. Use as `async with`; belongs to one event loop."""

    def __init__(self, *, timeout_s: float = 5.0) -> None:
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._pins = Pins()

    def __repr__(self) -> str:
        return f"<HttpDocuments: {'closed' if self._session is None else 'open'}>"

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        """See `Transport.get_json`."""
        if self._session is None:
            self._session = open_session(self._timeout)
        return await fetch_json(self._session, self._pins, endpoint, path)

    async def close(self) -> None:
        """Close every connection."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _read_document(response: Response) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_DOCUMENT_BYTES:
            raise DecodeError(f"{response.url} is longer than {MAX_DOCUMENT_BYTES} bytes")
    return bytes(body)


async def refusal(response: Response) -> CallError:
    """The error for a status that refuses a request as a whole."""
    try:
        body = await _read_document(response)
    except DecodeError:
        body = b""
    retry_after = response.headers.get(hdrs.RETRY_AFTER, "")
    return refusal_of(str(response.url), response.status, response.reason, retry_after, body)


def refusal_of(url: str, status: int, reason: str | None, retry_after: str, body: bytes) -> CallError:
    """The same from the parts of an answer, its `Retry-After` header among them."""
    try:
        message = str(decode_document(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"{url} answered {status} {reason or ''}"
    return call_error(status, message, float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None)


def unreachable(endpoint: Endpoint, error: BaseException) -> PeerUnreachableError:
    """The error of ours for one of the HTTP library's."""
    refused = error.certificate_error if isinstance(error, aiohttp.ClientConnectorCertificateError) else error
    if isinstance(refused, CertificateRefused):
        return PeerIdentityError(f"{endpoint} was not called: {refused.error}")
    if isinstance(error, aiohttp.ClientConnectorDNSError) and isinstance(error.os_error, NameLookupError):
        return NameLookupError(f"{endpoint} cannot be reached: {error.os_error}; is the node up, and its name right?")
    reason = str(error) or type(error).__name__
    if isinstance(error, asyncio.TimeoutError):
        reason = f"no answer in time ({reason})"
    elif isinstance(error, ssl.SSLError):
        reason = f"no TLS 1.3 there ({reason})"
    return PeerUnreachableError(f"{endpoint} cannot be reached: {reason}; is the node up and its port open?")
