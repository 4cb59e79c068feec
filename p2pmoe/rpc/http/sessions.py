"""The door over HTTP: who sends a request, the session handshake, and what only admins see. Knows a `Doorkeeper`.

The address of a caller is that of the connection. `X-Forwarded-For` and its like are never believed; a request that
carries one has passed a proxy, so that its address says nothing of where it comes from: it is not local.
"""

from __future__ import annotations

import asyncio
import ipaddress
from functools import lru_cache
from typing import Any, Final

import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict

from p2pmoe.errors import AuthenticationError, BadRequestError, TooLargeError
from p2pmoe.protocol.sessions import MAX_SESSION_BYTES, decode, request_decoder
from p2pmoe.rpc.base import Doorkeeper
from p2pmoe.types import WIRE_VERSION, Caller

NONCE_PATH: Final = f"/p2pmoe/v{WIRE_VERSION}/session/nonce"
SESSION_PATH: Final = f"/p2pmoe/v{WIRE_VERSION}/session"

SAFE_HEADERS: Final[CIMultiDict[str]] = CIMultiDict(
    {
        # Documents are for programs; a browser that is led here must not run, frame, guess or keep anything.
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        hdrs.CACHE_CONTROL: "no-store",
    }
)
_FORWARDED: Final = (
    hdrs.FORWARDED,
    hdrs.X_FORWARDED_FOR,
    hdrs.X_FORWARDED_HOST,
    hdrs.X_FORWARDED_PROTO,
    "X-Real-IP",
    hdrs.VIA,
)


class Door:
    """What the HTTP server asks before it answers. Without a doorkeeper everybody is anonymous and nobody an admin."""

    def __init__(self, doorkeeper: Doorkeeper | None, *, read_timeout_s: float) -> None:
        self._doorkeeper = doorkeeper
        self._read_timeout_s = read_timeout_s

    def routes(self) -> list[web.RouteDef]:
        """The handshake's, where there is a doorkeeper to shake hands with."""
        if self._doorkeeper is None:
            return []
        return [web.post(NONCE_PATH, self._make_nonce), web.post(SESSION_PATH, self._open_session)]

    def identify(self, request: web.Request) -> Caller:
        """Who sends a call. Raises AuthenticationError."""
        address = request.remote or ""
        if self._doorkeeper is None:
            return Caller(address)
        return self._doorkeeper.identify(request.headers.get(hdrs.AUTHORIZATION), address)

    def check_admin(self, request: web.Request) -> None:
        """For what shows more than public status. Raises AuthenticationError."""
        if _is_local(request):
            return
        if self._doorkeeper is None or not self._doorkeeper.is_admin(request.headers.get(hdrs.AUTHORIZATION)):
            raise AuthenticationError(
                f"{request.path} is answered on loopback, or with `Authorization: Bearer` and the token of "
                f"[admin] token_path"
            )

    async def _make_nonce(self, request: web.Request) -> web.Response:
        assert self._doorkeeper is not None
        return _json(self._doorkeeper.make_nonce(request.remote or ""))

    async def _open_session(self, request: web.Request) -> web.Response:
        assert self._doorkeeper is not None
        body = await self._read(request)
        return _json(self._doorkeeper.open_session(decode(request_decoder, body), request.remote or ""))

    async def _read(self, request: web.Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._read_timeout_s):
                async for chunk in request.content.iter_any():
                    body += chunk
                    if len(body) > MAX_SESSION_BYTES:
                        raise TooLargeError(f"a session request takes at most {MAX_SESSION_BYTES} bytes")
        except TimeoutError:
            raise BadRequestError(f"the session request did not arrive within {self._read_timeout_s} s") from None
        return bytes(body)


def _json(document: Any) -> web.Response:
    body = msgspec.json.encode(document)
    return web.Response(body=body, content_type="application/json", headers=SAFE_HEADERS)


def _is_local(request: web.Request) -> bool:
    """Whether the request was made on this machine, for this machine, by nobody else's order."""
    if any(name in request.headers for name in _FORWARDED):
        return False
    # A foreign page whose name points at 127.0.0.1 makes the browser call us under that name.
    host = request.headers.get(hdrs.HOST, "").rpartition("@")[2]
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return is_loopback(request.remote or "") and (name.lower() == "localhost" or is_loopback(name.strip("[]")))


@lru_cache(maxsize=1024)
def is_loopback(address: str) -> bool:
    """Whether a literal address is one of this machine's own."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback
