"""The messages of the session handshake and the bytes that are signed in it. Knows no clock and no secret.

    client                                             node
    POST …/session/nonce                        ──▶
                                                ◀──   {nonce, expires_in_s}
    signs session_bytes(node, client, nonce)
    POST …/session {public_key, nonce, …}       ──▶   checks signature, swarm key, who may call
                                                ◀──   {token, expires_in_s}
    calls with `Authorization: Bearer token`    ──▶

Bytes are written in hexadecimal. What is signed names the node: a node in the middle can use it nowhere else.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.protocol.messages import decode_header

NONCE_BYTES: Final = 32
MAX_SESSION_BYTES: Final = 4096
"""Of any message of the handshake."""

_DOMAIN: Final = b"p2pmoe-session-1\0"
_SWARM_PURPOSE: Final = b"session"

Hex32 = Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]
Hex64 = Annotated[str, Meta(pattern="^[0-9a-f]{128}\\Z")]
Lifetime = Annotated[float, Meta(ge=0, le=1e6)]


class SessionNonce(msgspec.Struct, frozen=True):
    """What the client has to sign, and for how long."""

    nonce: Hex32
    expires_in_s: Lifetime


class SessionRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The client's proof of its key, and of the swarm key where there is one."""

    public_key: Hex32
    nonce: Hex32
    signature: Hex64
    proof: Hex32 | None = None

    def __repr__(self) -> str:
        return f"<SessionRequest of {self.public_key[:16]}…>"


class SessionToken(msgspec.Struct, frozen=True):
    """What calls carry from now on."""

    token: Annotated[str, Meta(pattern="^[A-Za-z0-9_.=-]{1,512}\\Z")]
    expires_in_s: Lifetime

    def __repr__(self) -> str:
        return f"<SessionToken: {self.expires_in_s:.0f} s>"


nonce_decoder = msgspec.json.Decoder(SessionNonce)
request_decoder = msgspec.json.Decoder(SessionRequest)
token_decoder = msgspec.json.Decoder(SessionToken)
decode = decode_header


def session_bytes(node_key: bytes, client_key: bytes, nonce: bytes) -> bytes:
    """What the client signs: domain, the node's public key, the client's public key, the nonce; 32 bytes each."""
    assert len(node_key) == len(client_key) == len(nonce) == 32
    return b"".join((_DOMAIN, node_key, client_key, nonce))


def swarm_proof(swarm_key: SwarmKey, signed: bytes) -> bytes:
    """What a member of a private swarm adds: HMAC-SHA256 of the signed bytes under the key for this purpose."""
    return hmac.digest(swarm_key.derive(_SWARM_PURPOSE), signed, hashlib.sha256)


def make_session_request(
    identity: Identity, node_key: bytes, nonce: SessionNonce, swarm_key: SwarmKey | None
) -> SessionRequest:
    """The client's answer to a nonce of the node whose public key is `node_key`."""
    signed = session_bytes(node_key, identity.public_key, bytes.fromhex(nonce.nonce))
    return SessionRequest(
        public_key=identity.public_key.hex(),
        nonce=nonce.nonce,
        signature=identity.sign(signed).hex(),
        proof=None if swarm_key is None else swarm_proof(swarm_key, signed).hex(),
    )
