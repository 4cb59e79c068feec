"""The door over HTTP: who sends a request, the session handshake, and what only admins see. Knows a `Doorkeeper`.

The address of a caller is that of the connection. `X-Forwarded-For` and its like are never believed; a request that
carries one has passed a proxy, so that its address says nothing of where it comes from: it is not local.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import hdrs, web

from p2pmoe.errors import AuthenticationError, BadRequestError, TooLargeError
from p2pmoe.protocol.sessions import MAX_SESSION_BYTES, decode, request_decoder
from p2pmoe.rpc.base import Doorkeeper
from p2pmoe.rpc.http.responses import json_response
from p2pmoe.types import WIRE_VERSION, Caller, is_loopback

NONCE_PATH: Final = f"/p2pmoe/v{WIRE_VERSION}/session/nonce"
SESSION_PATH: Final = f"/p2pmoe/v{WIRE_VERSION}/session"

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

    def identify(self, authorization: str | None, address: str) -> Caller:
        """Who sends a call with that header from that address. Raises AuthenticationError."""
        return Caller(address) if self._doorkeeper is None else self._doorkeeper.identify(authorization, address)

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
        return json_response(self._doorkeeper.make_nonce(request.remote or ""))

    async def _open_session(self, request: web.Request) -> web.Response:
        assert self._doorkeeper is not None
        body = await self._read(request)
        return json_response(self._doorkeeper.open_session(decode(request_decoder, body), request.remote or ""))

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


def _is_local(request: web.Request) -> bool:
    """Whether the request was made on this machine, for this machine, by nobody else's order."""
    if any(name in request.headers for name in _FORWARDED):
        return False
    # A foreign page whose name points at 127.0.0.1 makes the browser call us under that name.
    host = request.headers.get(hdrs.HOST, "").rpartition("@")[2]
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return is_loopback(request.remote or "") and is_loopback(name.strip("[]"))
