r"""Delegations: by which the owner of a closed swarm lets a member write records. Bytes and values; no clock, no file.

In a closed swarm a record's value is the msgpack array `[delegation, payload]`; a delegation is the msgpack array

    [version, scope, expires_at, signature]

`scope` is a uid prefix such as `ffn.3.`, or empty for all uids; `expires_at` is in milliseconds since 1970. The
signature is Ed25519 by the owner over

    "p2pmoe-delegation-1\0" | swarm id length u32 | swarm id | member's public key 32 | scope length u32 | scope
    | expires_at u64

with all numbers big-endian. It names the member and the swarm, so that nobody else can show it, and nowhere else.

A member with the scope `ffn.3.` writes under that prefix and all below it. Under the prefixes above it (`ffn.`) it may
say one thing only: that the way to its scope leads through the child 3.
"""

from __future__ import annotations

import base64
import binascii
import struct
import textwrap
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from p2pmoe.errors import DecodeError, EncodeError
from p2pmoe.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, peer_id_of, verify
from p2pmoe.protocol.records import MAX_VALUE_BYTES

DELEGATION_VERSION: Final = 1
MAX_SCOPE_CHARS: Final = 128
MAX_FILE_BYTES: Final = 4096

_DOMAIN: Final = b"p2pmoe-delegation-1\0"
_SCOPE: Final = r"^([A-Za-z_][A-Za-z0-9_-]{0,63}\.((0|[1-9][0-9]{0,9})\.){0,3})?\Z"


class _Wire(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=DELEGATION_VERSION, le=DELEGATION_VERSION)]
    scope: Annotated[str, Meta(max_length=MAX_SCOPE_CHARS, pattern=_SCOPE)]
    expires_at: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class _Wrapped(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    delegation: _Wire
    payload: Annotated[bytes, Meta(max_length=MAX_VALUE_BYTES)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)
_wrapped_decoder = msgspec.msgpack.Decoder(_Wrapped)


@dataclass(frozen=True, slots=True)
class Delegation:
    """The owner's word that a member may write under `scope`. Whether the signature holds is another question."""

    scope: str
    expires_at_ms: int
    signature: bytes

    @property
    def expires_at(self) -> float:
        """Seconds since 1970."""
        return self.expires_at_ms / 1000

    def covers(self, name: str) -> bool:
        """True for a uid or prefix inside the scope."""
        return name.startswith(self.scope)

    def leads_through(self, prefix: str) -> bool:
        """True for a prefix above the scope."""
        return self.scope != prefix and self.scope.startswith(prefix)

    def check_signature(self, owner: bytes, swarm_id: str, member: bytes) -> None:
        """Raises BadSignatureError unless this owner gave it to this member of this swarm."""
        verify(owner, signed_bytes(swarm_id, member, self.scope, self.expires_at_ms), self.signature)

    def __repr__(self) -> str:
        return f"<Delegation {self.scope or 'all uids'!r} until {self.expires_at_ms}>"


def child_towards(scope: str, prefix: str) -> int | None:
    """The child of `prefix` through which the way to `scope` leads: 3 for `ffn.3.7.` and `ffn.`; None if none does."""
    if scope == prefix or not scope.startswith(prefix):
        return None
    step = scope[len(prefix) :].partition(".")[0]
    return int(step) if step.isascii() and step.isdigit() else None


def signed_bytes(swarm_id: str, member: bytes, scope: str, expires_at_ms: int) -> bytes:
    """What the owner's signature covers."""
    swarm, text = swarm_id.encode(), scope.encode()
    return b"".join(
        (
            _DOMAIN,
            struct.pack(">I", len(swarm)),
            swarm,
            member,
            struct.pack(">I", len(text)),
            text,
            struct.pack(">Q", expires_at_ms),
        )
    )


def delegate(owner: Identity, swarm_id: str, member: bytes, *, expires_at_ms: int, scope: str = "") -> Delegation:
    """Let a member (public key, 32 bytes) write under `scope` until `expires_at_ms`.

    Raises:
        EncodeError: the member's key has not 32 bytes, the scope is no uid prefix, or the time is out of range.
    """
    if len(member) != PUBLIC_KEY_BYTES:
        raise EncodeError(f"a member's public key has {PUBLIC_KEY_BYTES} bytes, got {len(member)}")
    if not 0 <= expires_at_ms < 2**63:
        raise EncodeError(f"expires_at_ms {expires_at_ms} must be in 0..2**63-1")
    unsigned = Delegation(scope, expires_at_ms, bytes(SIGNATURE_BYTES))
    try:
        _decoder.decode(_encode(unsigned))
    except msgspec.MsgspecError as error:
        raise EncodeError(
            f"the scope {scope!r} is no uid prefix: write ffn. or ffn.3., or leave it out for all uids"
        ) from error
    signature = owner.sign(signed_bytes(swarm_id, member, scope, expires_at_ms))
    return Delegation(scope, expires_at_ms, signature)


def wrap(delegation: Delegation, payload: bytes) -> bytes:
    """A record's value in a closed swarm. Raises EncodeError when it would have more than 900 bytes."""
    value = _encoder.encode(_Wrapped(_wire(delegation), payload))
    if len(value) > MAX_VALUE_BYTES:
        raise EncodeError(
            f"{len(payload)} bytes beside a delegation make a value of {len(value)}; {MAX_VALUE_BYTES} are allowed"
        )
    return value


def room_beside(delegation: Delegation) -> int:
    """How many bytes of payload fit into a record's value with this delegation."""
    return MAX_VALUE_BYTES - len(wrap(delegation, b"")) - 1  # a payload over 255 B has a longer length field


def unwrap(value: bytes) -> tuple[Delegation, bytes]:
    """The delegation and the payload of a peer's record value. Raises DecodeError."""
    try:
        wrapped = _wrapped_decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"no delegation in front of a payload: {error}") from error
    return _of(wrapped.delegation), wrapped.payload


def is_wrapped(value: bytes) -> bool:
    """Whether a record's value looks as it does in closed swarms: for hints, nothing is believed."""
    return value.startswith(b"\x92\x94\x01")


def format_delegation(delegation: Delegation, member: bytes, swarm_id: str, expires: str) -> str:
    """The text of a delegation file: comments for people, then the delegation in base64. No secret."""
    lines = [
        "# A p2pmoe delegation: the owner of a closed swarm lets a member announce experts. No secret.",
        f"# member  {peer_id_of(member)} (public key {member.hex()})",
        f"# swarm   {swarm_id!r}",
        f"# scope   {delegation.scope or 'all uids'}",
        f"# expires {expires}",
        *textwrap.wrap(base64.b64encode(_encode(delegation)).decode("ascii"), 76),
    ]
    return "\n".join(lines) + "\n"


def parse_delegation(text: str) -> Delegation:
    """Read a delegation file's text. Raises DecodeError."""
    packed = "".join(line.strip() for line in text.splitlines() if not line.lstrip().startswith("#"))
    try:
        return _of(_decoder.decode(base64.b64decode(packed, validate=True)))
    except (binascii.Error, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DecodeError(f"not a delegation: {error}") from error


def _wire(delegation: Delegation) -> _Wire:
    return _Wire(DELEGATION_VERSION, delegation.scope, delegation.expires_at_ms, delegation.signature)


def _encode(delegation: Delegation) -> bytes:
    return _encoder.encode(_wire(delegation))


def _of(wire: _Wire) -> Delegation:
    return Delegation(wire.scope, wire.expires_at, wire.signature)
