"""Bundles: what one provider offers under one prefix, as record values. Knows no DHT, no key and no clock.

A record's value is the msgpack array `[version, scheme, host, port, schema_digest, form, base, children]`:
the node's HTTP endpoint, the digest of the children's schema (empty for children that are only prefixes of longer
uids), and the children's numbers in ascending order, in the shorter of two forms:

    form 0, list    children = LEB128 varints: each number minus the one before it, minus one (the first minus base)
    form 1, bitmap  children = bit i (least significant first) of byte i // 8 stands for base + i

No children is a tombstone: it takes the place of an older bundle until that has expired everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from p2pmoe.errors import DecodeError, EncodeError
from p2pmoe.experts.uid import MAX_COORDINATE
from p2pmoe.protocol.records import MAX_PARTS, MAX_VALUE_BYTES
from p2pmoe.types import Endpoint, is_host, parse_ip

BUNDLE_VERSION: Final = 1
MAX_CHILDREN: Final = 400
MAX_HOST_CHARS: Final = 255
MAX_DIGEST_BYTES: Final = 32
_SCHEMES: Final = ("http", "https")


class _Wire(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=BUNDLE_VERSION, le=BUNDLE_VERSION)]
    scheme: Literal[0, 1]
    host: Annotated[str, Meta(max_length=MAX_HOST_CHARS, pattern=r"^[A-Za-z0-9._:-]*\Z")]
    port: Annotated[int, Meta(ge=0, le=65535)]
    digest: Annotated[bytes, Meta(max_length=MAX_DIGEST_BYTES)]
    form: Literal[0, 1]
    base: Annotated[int, Meta(ge=0, le=MAX_COORDINATE)]
    children: Annotated[bytes, Meta(max_length=MAX_VALUE_BYTES)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


@dataclass(frozen=True, slots=True)
class Bundle:
    """Children of one prefix that share an endpoint and a schema digest (hex; empty for inner prefixes)."""

    endpoint: Endpoint
    schema_digest: str
    children: tuple[int, ...]

    @property
    def is_tombstone(self) -> bool:
        return not self.children


def encode_bundle(bundle: Bundle, max_bytes: int = MAX_VALUE_BYTES) -> bytes:
    """Raises EncodeError when it does not fit: over 400 children, over `max_bytes`, or no such endpoint or digest."""
    endpoint, children = bundle.endpoint, bundle.children
    if len(children) > MAX_CHILDREN:
        raise EncodeError(f"a bundle lists at most {MAX_CHILDREN} children, got {len(children)}")
    form, base, packed = _pack(children)
    try:
        wire = _Wire(
            BUNDLE_VERSION,
            _SCHEMES.index(endpoint.scheme),  # type: ignore[arg-type]
            endpoint.host,
            endpoint.port,
            bytes.fromhex(bundle.schema_digest),
            form,
            base,
            packed,
        )
        value = _encoder.encode(wire)
        decode_bundle(value, b"")
    except (ValueError, msgspec.MsgspecError) as error:
        raise EncodeError(f"cannot announce {endpoint} with schema {bundle.schema_digest!r}: {error}") from error
    if len(value) > max_bytes:
        raise EncodeError(f"a bundle of {len(children)} children takes {len(value)} of {max_bytes} bytes")
    return value


def decode_bundle(value: bytes, public_key: bytes) -> Bundle:
    """Parse a peer's bytes; the signer's key becomes the endpoint's. Raises DecodeError, and nothing else."""
    try:
        wire = _decoder.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"not a bundle: {error}") from error
    children = tuple(_unpack(wire))
    if children and not (wire.host and wire.port):
        raise DecodeError("not a bundle: children without an endpoint")
    if wire.host and not _is_callable(wire.host):
        raise DecodeError("not a bundle: a host is an IP literal or a name of labels of 1 to 63 characters")
    endpoint = Endpoint(wire.host, wire.port, _SCHEMES[wire.scheme], public_key)
    return Bundle(endpoint, wire.digest.hex(), children)


def _is_callable(host: str) -> bool:
    """Whether a connection could lead to one machine there, whoever asks."""
    ip = parse_ip(host)
    return is_host(host) and (ip is None or not (ip.is_unspecified or ip.is_multicast or ip.is_link_local))


def pack_bundles(
    endpoint: Endpoint, children: Iterable[tuple[int, str]], max_bytes: int = MAX_VALUE_BYTES
) -> list[bytes]:
    """Values for parts 0, 1, …: `(child, schema digest)` pairs grouped by digest, each part as full as it goes.

    `max_bytes` of a value is less in a closed swarm, where a delegation stands beside it.

    Raises:
        EncodeError: one prefix would need more than 8 parts, or the endpoint cannot be written.
    """
    by_digest: dict[str, list[int]] = {}
    for child, digest in sorted(set(children)):
        by_digest.setdefault(digest, []).append(child)
    values = [
        value for digest, numbers in sorted(by_digest.items()) for value in _split(endpoint, digest, numbers, max_bytes)
    ]
    if len(values) > MAX_PARTS:
        raise EncodeError(
            f"{sum(map(len, by_digest.values()))} children with {len(by_digest)} schemas under one prefix need "
            f"{len(values)} parts; {MAX_PARTS} are allowed: use fewer schemas or spread the experts over more prefixes"
        )
    return values


def tombstone(endpoint: Endpoint) -> bytes:
    """The value that takes an older bundle's place."""
    return encode_bundle(Bundle(endpoint, "", ()))


def _split(endpoint: Endpoint, digest: str, numbers: Sequence[int], max_bytes: int) -> Iterator[bytes]:
    start = 0
    while start < len(numbers):
        count = min(MAX_CHILDREN, len(numbers) - start)
        while True:
            try:
                value = encode_bundle(Bundle(endpoint, digest, tuple(numbers[start : start + count])), max_bytes)
                break
            except EncodeError:
                if count == 1:
                    raise
                count = count * 9 // 10 or 1
        yield value
        start += count


def _pack(children: Sequence[int]) -> tuple[Literal[0, 1], int, bytes]:
    if not children:
        return 0, 0, b""
    base = children[0]
    as_list = _pack_list(children)
    span = children[-1] - base + 1
    if (span + 7) // 8 >= len(as_list):
        return 0, base, as_list
    bits = bytearray((span + 7) // 8)
    for child in children:
        bits[(child - base) // 8] |= 1 << (child - base) % 8
    return 1, base, bytes(bits)


def _pack_list(children: Sequence[int]) -> bytes:
    packed = bytearray()
    previous = children[0] - 1
    for child in children:
        gap = child - previous - 1
        previous = child
        while gap >= 0x80:
            packed.append(gap & 0x7F | 0x80)
            gap >>= 7
        packed.append(gap)
    return bytes(packed)


def _unpack(wire: _Wire) -> list[int]:
    children = _unpack_bits(wire) if wire.form else _unpack_list(wire)
    if len(children) > MAX_CHILDREN or (children and children[-1] > MAX_COORDINATE):
        raise DecodeError(f"not a bundle: more than {MAX_CHILDREN} children, or one over {MAX_COORDINATE}")
    return children


def _unpack_bits(wire: _Wire) -> list[int]:
    if sum(byte.bit_count() for byte in wire.children) > MAX_CHILDREN:
        raise DecodeError(f"not a bundle: more than {MAX_CHILDREN} children")
    return [
        wire.base + 8 * place + bit for place, byte in enumerate(wire.children) for bit in range(8) if byte >> bit & 1
    ]


def _unpack_list(wire: _Wire) -> list[int]:
    children: list[int] = []
    previous, gap, shift = wire.base - 1, 0, 0
    for byte in wire.children:
        gap |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            if shift > 28:
                raise DecodeError("not a bundle: a number of more than 5 bytes")
            continue
        previous += gap + 1
        children.append(previous)
        gap = shift = 0
    if shift:
        raise DecodeError("not a bundle: the last number is cut off")
    return children
