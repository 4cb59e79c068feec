"""The client's side of the session handshake: one session for each node, opened before the first call.

Rules:
1. A session is opened with nodes whose public key is known from a signed record: the signature names the node, so
   with another's key it is worth nothing there. Any other endpoint is called without.
2. Whoever needs the same session waits for the one handshake; it is renewed before it ends.
3. A node without the routes (404) is called without a session; a refusal is believed for a few seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from p2pmoe.errors import CallError, OverloadedError, P2PMoEError, PeerUnreachableError, UnknownExpertError
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.protocol.messages import encode_json
from p2pmoe.protocol.sessions import (
    SessionToken,
    decode,
    make_session_request,
    nonce_decoder,
    token_decoder,
)
from p2pmoe.rpc.http.sessions import NONCE_PATH, SESSION_PATH
from p2pmoe.types import Endpoint

MAX_SESSIONS: Final = 4096
_RENEW_AT: Final = 0.8  # of its lifetime
_NO_SESSIONS_S: Final = 300.0
_REFUSED_S: Final = 5.0

Post = Callable[[Endpoint, str, bytes], Awaitable[bytes]]
"""Sends a body to a path of an endpoint and gives the answer's. Raises PeerUnreachableError, CallError, DecodeError."""


@dataclass(slots=True)
class _Session:
    """What is known of one node: a token, that it wants none, or that it refused."""

    authorization: str | None
    renew_at: float
    refusal: CallError | None = None

    def __repr__(self) -> str:
        return f"<_Session {'refused' if self.refusal else 'open' if self.authorization else 'none'}>"


class ClientSessions:
    """The sessions of one client with many nodes. Belongs to one event loop; never prints a token."""

    def __init__(
        self,
        identity: Identity | None,
        swarm_key: SwarmKey | None,
        post: Post,
        *,
        clock: Callable[[], float],
        timeout_s: float = 5.0,
    ) -> None:
        self._identity = identity
        self._swarm_key = swarm_key
        self._post = post
        self._clock = clock
        self._timeout_s = timeout_s
        self._sessions: dict[Endpoint, _Session] = {}
        self._opening: dict[Endpoint, asyncio.Task[_Session]] = {}

    def __repr__(self) -> str:
        return f"<ClientSessions: {len(self._sessions)} nodes, {len(self._opening)} handshakes>"

    def covers(self, endpoint: Endpoint) -> bool:
        """Whether a session can be had there at all."""
        return self._identity is not None and endpoint.public_key is not None

    def known(self, endpoint: Endpoint) -> _Session | None:
        """What needs no handshake now; the way of nearly every call."""
        session = self._sessions.get(endpoint)
        return session if session is not None and self._clock() < session.renew_at else None

    async def authorize(self, endpoint: Endpoint) -> str | None:
        """The `Authorization` header of a call to a node; None calls without.

        Raises:
            CallError: the node refuses this client.
            PeerUnreachableError, DecodeError: the handshake came to nothing.
        """
        if not self.covers(endpoint):
            return None
        session = self.known(endpoint) or await self._open(endpoint)
        if session.refusal is not None:
            raise session.refusal
        return session.authorization

    def forget(self, endpoint: Endpoint, authorization: str | None) -> None:
        """The node did not take this header; a newer one stays."""
        session = self._sessions.get(endpoint)
        if session is not None and session.authorization == authorization and session.refusal is None:
            del self._sessions[endpoint]

    async def close(self) -> None:
        """End the handshakes."""
        tasks = list(self._opening.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # -- private

    async def _open(self, endpoint: Endpoint) -> _Session:
        task = self._opening.get(endpoint)
        if task is None:
            task = self._opening[endpoint] = asyncio.create_task(self._shake_hands(endpoint), name="p2pmoe-handshake")
            task.add_done_callback(lambda done: self._opened(endpoint, done))
        return await asyncio.shield(task)  # a caller that gives up must not take the session from the others

    def _opened(self, endpoint: Endpoint, task: asyncio.Task[_Session]) -> None:
        self._opening.pop(endpoint, None)
        if not task.cancelled():
            task.exception()  # looked at, also when everybody who waited has left

    async def _shake_hands(self, endpoint: Endpoint) -> _Session:
        try:
            async with asyncio.timeout(self._timeout_s):
                token = await self._ask(endpoint)
            session = _Session(f"Bearer {token.token}", self._clock() + token.expires_in_s * _RENEW_AT)
        except UnknownExpertError:
            session = _Session(None, self._clock() + _NO_SESSIONS_S)
        except TimeoutError as error:
            if isinstance(error, P2PMoEError):
                raise
            raise PeerUnreachableError(f"{endpoint} did not open a session within {self._timeout_s} s") from None
        except CallError as error:
            pause_s = error.retry_after_s if isinstance(error, OverloadedError) and error.retry_after_s else _REFUSED_S
            session = _Session(None, self._clock() + pause_s, error)
        if len(self._sessions) >= MAX_SESSIONS:
            self._sessions.pop(next(iter(self._sessions)))
        self._sessions[endpoint] = session
        return session

    async def _ask(self, endpoint: Endpoint) -> SessionToken:
        assert self._identity is not None and endpoint.public_key is not None
        nonce = decode(nonce_decoder, await self._post(endpoint, NONCE_PATH, b""))
        request = make_session_request(self._identity, endpoint.public_key, nonce, self._swarm_key)
        return decode(token_decoder, await self._post(endpoint, SESSION_PATH, encode_json(request)))
