"""Who may call this node. A `rpc.base.Doorkeeper`; all rules in one place, no I/O.

Rules:
1. A denied peer is refused, whatever else is said of it.
2. With an allow-list only the peers in it may call.
3. With a swarm key only its holders may call; with both, both are asked for.
4. With any of 2 and 3, or mode "identified", a call needs a session; else one without is served as anonymous.
5. A session is opened by a signature over a fresh nonce and both public keys. One address opens a bounded number
   a second, and a bounded number of its peers have limits of their own; all further ones share one: keys are
   free, and more of them must not give anybody more.
6. An admin is who knows the admin token. No token, no admin.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from p2pmoe.config import AccessConfig
from p2pmoe.errors import AccessDeniedError, AuthenticationError, BadSignatureError, OverloadedError
from p2pmoe.identity import SwarmKey, peer_id_of, verify
from p2pmoe.protocol.sessions import SessionNonce, SessionRequest, SessionToken, session_bytes, swarm_proof
from p2pmoe.rpc.token_bucket import TokenBucket
from p2pmoe.server.sessions import NONCE_LIFETIME_S, OWN_SHARE, Sessions
from p2pmoe.types import Caller, PeerId, source_of

MAX_REMEMBERED: Final = 4096
"""Tokens whose check is remembered, and addresses whose handshakes are."""
_BURST_S: Final = 10.0
_BEARER: Final = "Bearer "


class _Address:
    """What was done from one address."""

    __slots__ = ("bucket", "peers")

    def __init__(self, bucket: TokenBucket) -> None:
        self.bucket = bucket
        self.peers: OrderedDict[PeerId, float] = OrderedDict()  # until when they have a session


class Access:
    """The door of one node.

    Args:
        config: who may call.
        public_key: the node's own, 32 bytes.
        swarm_key: of a private swarm.
        admin_token: what an admin carries.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: AccessConfig,
        public_key: bytes,
        *,
        clock: Callable[[], float],
        swarm_key: SwarmKey | None = None,
        admin_token: bytes | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        self._allow = frozenset(config.allow)
        self._deny = frozenset(config.deny)
        self._config = config
        self._public_key = public_key
        self._swarm_key = swarm_key
        self._admin_token = admin_token
        self._clock = clock
        self._sessions = Sessions(lifetime_s=config.session_lifetime_s, clock=clock) if sessions is None else sessions
        self._known: OrderedDict[str, tuple[Caller, float]] = OrderedDict()  # header -> who, until when
        self._addresses: OrderedDict[str, _Address] = OrderedDict()
        self.needs_session = config.mode != "open" or bool(self._allow) or swarm_key is not None

    def __repr__(self) -> str:
        state = "known callers only" if self.needs_session else "open"
        return f"<Access: {state}, {len(self._known)} sessions seen>"

    # -- rpc.base.Doorkeeper

    def identify(self, authorization: str | None, address: str) -> Caller:
        """See `Doorkeeper.identify`."""
        if authorization is None:
            if self.needs_session:
                raise AuthenticationError(
                    "this node serves known callers only: open a session (POST /p2pmoe/v1/session/nonce, then "
                    "/p2pmoe/v1/session, see docs/wire.md) and send its token as `Authorization: Bearer …`"
                )
            return _anonymous(address)
        known = self._known.get(authorization)
        if known is None:
            return self._recognize(authorization)
        caller, expires_at = known
        if expires_at <= self._clock():
            del self._known[authorization]
            raise AuthenticationError("the session has ended; open a new one")
        return caller

    def make_nonce(self, address: str) -> SessionNonce:
        """See `Doorkeeper.make_nonce`. Costs one hash and no memory, so it is not counted."""
        return SessionNonce(self._sessions.make_nonce().hex(), NONCE_LIFETIME_S)

    def open_session(self, request: SessionRequest, address: str) -> SessionToken:
        """See `Doorkeeper.open_session`."""
        source = self._source(address)
        if wait_s := source.bucket.take(1.0, self._clock()):
            rate = self._config.sessions_per_s
            error = OverloadedError(f"over {rate:g} session handshakes a second from {source_of(address)}; try later")
            error.retry_after_s = wait_s
            raise error
        public_key, nonce = bytes.fromhex(request.public_key), bytes.fromhex(request.nonce)
        self._sessions.check_nonce(nonce)
        signed = session_bytes(self._public_key, public_key, nonce)
        self._check_proof(request.proof, signed)
        try:
            verify(public_key, signed, bytes.fromhex(request.signature))
        except BadSignatureError as error:
            raise AuthenticationError(
                "the signature does not fit: sign this node's public key, yours and the nonce, as docs/wire.md says"
            ) from error
        peer_id = peer_id_of(public_key)
        self._check_peer(peer_id)
        self._sessions.spend(nonce)
        token = self._sessions.issue(public_key, self._share(source, peer_id, address))
        return SessionToken(token, self._sessions.lifetime_s)

    def is_admin(self, authorization: str | None) -> bool:
        """See `Doorkeeper.is_admin`."""
        token = (authorization or "").removeprefix(_BEARER).encode("utf-8", "surrogateescape")
        return self._admin_token is not None and hmac.compare_digest(token, self._admin_token)

    # -- private

    def _recognize(self, authorization: str) -> Caller:
        if not authorization.startswith(_BEARER):
            raise AuthenticationError("Authorization must be `Bearer` and a session token, or be left out")
        public_key, share, expires_at = self._sessions.read(authorization.removeprefix(_BEARER))
        peer_id = peer_id_of(public_key)
        caller = Caller(peer_id if share == OWN_SHARE else f"shared {share.hex()}", peer_id)
        self._known[authorization] = caller, expires_at
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return caller

    def _check_proof(self, proof: str | None, signed: bytes) -> None:
        if self._swarm_key is None:
            return
        if proof is None:
            raise AccessDeniedError("this node belongs to a private swarm; pass its key with --swarm-key FILE")
        if not hmac.compare_digest(swarm_proof(self._swarm_key, signed), bytes.fromhex(proof)):
            raise AccessDeniedError("the swarm key is not that of this node's swarm; check --swarm-key FILE")

    def _check_peer(self, peer_id: PeerId) -> None:
        if peer_id in self._deny:
            raise AccessDeniedError(f"this node does not serve peer {peer_id}; ask another provider")
        if self._allow and peer_id not in self._allow:
            raise AccessDeniedError(
                f"this node serves certain peers only, and {peer_id} is not one of them; ask its owner to add it "
                f"to [access] allow, or ask another provider"
            )

    def _source(self, address: str) -> _Address:
        key = source_of(address)
        source = self._addresses.get(key)
        if source is None:
            rate = self._config.sessions_per_s
            source = self._addresses[key] = _Address(TokenBucket(rate, max(1.0, rate * _BURST_S), self._clock()))
            if len(self._addresses) > MAX_REMEMBERED:
                self._addresses.popitem(last=False)
        else:
            self._addresses.move_to_end(key)
        return source

    def _share(self, source: _Address, peer_id: PeerId, address: str) -> bytes:
        """Whose limits a new session goes by: the peer's own, or those that its address has for all further peers."""
        now = self._clock()
        peers = source.peers
        while peers and next(iter(peers.values())) <= now:
            peers.popitem(last=False)
        if peer_id not in peers and len(peers) >= self._config.max_peers_per_address:
            return hashlib.sha256(source_of(address).encode()).digest()[: len(OWN_SHARE)]
        peers[peer_id] = now + self._sessions.lifetime_s
        peers.move_to_end(peer_id)
        return OWN_SHARE


@lru_cache(maxsize=MAX_REMEMBERED)
def _anonymous(address: str) -> Caller:
    return Caller(source_of(address))
