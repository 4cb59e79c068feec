r"""Signed DHT records: bytes and values. Knows no clock, no socket and no store.

A record fills one slot `(key, public_key, part)`. On the wire it is the msgpack array

    [version, part, value, sequence, expires_at, public_key, signature]

in msgpack's shortest form. The signature is Ed25519 over

    "p2pmoe-record-1\0" | version u8 | key 20 | part u8 | sequence u64 | expires_at u64 | public_key 32
    | value length u32 | value

with all numbers big-endian, so that no two records sign the same bytes and none can be moved to another key.
`sequence` is a microsecond clock that never repeats; `expires_at` is in milliseconds since 1970.
The bytes of a record are kept and relayed as they came: nobody signs or encodes on another's behalf.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from p2pmoe.errors import BadSignatureError, DecodeError, EncodeError
from p2pmoe.identity import NODE_ID_BYTES, PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, verify

RECORD_VERSION: Final = 1
KEY_BYTES: Final = NODE_ID_BYTES
MAX_VALUE_BYTES: Final = 900
MAX_RECORD_BYTES: Final = 1040
"""A record of the largest value takes at most 1,030 bytes; what is longer is refused unread."""
MAX_PARTS: Final = 8

_KEY_DOMAIN: Final = b"p2pmoe-key-1\0"
_SIGN_DOMAIN: Final = b"p2pmoe-record-1\0"
_SIGNED_FIELDS: Final = struct.Struct(f">B{KEY_BYTES}sBQQ{PUBLIC_KEY_BYTES}sI")

Slot = tuple[bytes, int]
"""`(public_key, part)`: whose record it is, and which of the signer's parts under the key."""


def key_of(swarm_id: str, prefix: str) -> bytes:
    """The 20-byte DHT key of a prefix such as `ffn.3.` in a swarm."""
    return hashlib.sha256(b"%b%b\0%b" % (_KEY_DOMAIN, swarm_id.encode(), prefix.encode())).digest()[:KEY_BYTES]


class _Wire(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=RECORD_VERSION, le=RECORD_VERSION)]
    part: Annotated[int, Meta(ge=0, lt=MAX_PARTS)]
    value: Annotated[bytes, Meta(max_length=MAX_VALUE_BYTES)]
    sequence: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    expires_at: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    public_key: Annotated[bytes, Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


@dataclass(frozen=True, slots=True)
class Record:
    """One signed value. `raw` are the bytes it came as; whether the signature holds is another question."""

    part: int
    value: bytes
    sequence: int
    expires_at_ms: int
    public_key: bytes
    signature: bytes
    raw: bytes
    scope: str | None = None
    """In a closed swarm, once a reader has opened it: the prefix that the owner let the signer write under."""

    @property
    def slot(self) -> Slot:
        return self.public_key, self.part

    @property
    def expires_at(self) -> float:
        """Seconds since 1970."""
        return self.expires_at_ms / 1000

    def check_signature(self, key: bytes) -> None:
        """Raises BadSignatureError unless the signer signed exactly this record for this key."""
        verify(self.public_key, signed_bytes(key, self), self.signature)

    def __repr__(self) -> str:
        return f"<Record {self.public_key[:4].hex()}…/{self.part} sequence {self.sequence} {len(self.value)} B>"


def signed_bytes(key: bytes, record: Record | _Wire) -> bytes:
    """What the signature of a record under `key` (20 bytes) covers."""
    if len(key) != KEY_BYTES:
        raise BadSignatureError(f"a key has {KEY_BYTES} bytes, got {len(key)}")
    expires_at_ms = record.expires_at_ms if isinstance(record, Record) else record.expires_at
    fields = _SIGNED_FIELDS.pack(
        RECORD_VERSION, key, record.part, record.sequence, expires_at_ms, record.public_key, len(record.value)
    )
    return _SIGN_DOMAIN + fields + record.value


def sign_record(
    identity: Identity, key: bytes, value: bytes, *, part: int = 0, sequence: int, expires_at_ms: int
) -> Record:
    """Make a record of ours.

    Raises:
        EncodeError: a field is out of range: value over 900 bytes, part over 7, a key that has not 20 bytes.
    """
    if len(key) != KEY_BYTES or len(value) > MAX_VALUE_BYTES or not 0 <= part < MAX_PARTS:
        raise EncodeError(
            f"a record needs a key of {KEY_BYTES} bytes (got {len(key)}), a value of at most {MAX_VALUE_BYTES} "
            f"bytes (got {len(value)}) and a part below {MAX_PARTS} (got {part})"
        )
    if not 0 <= sequence < 2**63 or not 0 <= expires_at_ms < 2**63:
        raise EncodeError(f"sequence {sequence} and expires_at_ms {expires_at_ms} must be in 0..2**63-1")
    unsigned = _Wire(RECORD_VERSION, part, value, sequence, expires_at_ms, identity.public_key, bytes(SIGNATURE_BYTES))
    signature = identity.sign(signed_bytes(key, unsigned))
    raw = _encoder.encode(msgspec.structs.replace(unsigned, signature=signature))
    return Record(part, value, sequence, expires_at_ms, identity.public_key, signature, raw)


def decode_record(raw: bytes) -> Record:
    """Parse a peer's bytes; checks form only, not the signature nor the time.

    Raises:
        DecodeError: too long, wrong types or sizes, trailing bytes, or not in msgpack's shortest form.
    """
    if len(raw) > MAX_RECORD_BYTES:
        raise DecodeError(f"a record has at most {MAX_RECORD_BYTES} bytes, got {len(raw)}", code=413)
    try:
        wire = _decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"not a record: {error}") from error
    # One record has one spelling; otherwise "equal sequence must be byte-identical" could be broken by anyone.
    if _encoder.encode(wire) != raw:
        raise DecodeError("not a record: not in msgpack's shortest form")
    return Record(wire.part, wire.value, wire.sequence, wire.expires_at, wire.public_key, wire.signature, bytes(raw))
