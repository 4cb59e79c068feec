"""Which names stand in front of a swarm's uids: the records under the empty prefix. Knows no DHT, no key and no clock.

Under the key of the prefix `""` a node lists the names of all its experts, as it lists their coordinates under `ffn.`.
A record's value is the msgpack array `[1, [name, …]]`, the names in ascending order. No names is a tombstone.
The records live longer than those of experts, and are written as much more seldom: every node of a swarm writes here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from p2pmoe.errors import DecodeError
from p2pmoe.experts.uid import prefix_of
from p2pmoe.identity import peer_id_of
from p2pmoe.protocol.records import MAX_PARTS, MAX_VALUE_BYTES, Record
from p2pmoe.types import PeerId

ROOT: Final = ""
"""The prefix above all others."""
NAMES_TTL_S: Final = 180.0
"""How long names are believed."""
NAMES_REFRESH_S: Final = 60.0
"""How often they are written, for holders that came since."""
MAX_NAMES: Final = 400

Name = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}\Z")]


class _Wire(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    names: Annotated[list[Name], Meta(max_length=MAX_NAMES)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


def pack_names(names: Iterable[str], max_bytes: int = MAX_VALUE_BYTES) -> list[bytes]:
    """Values for parts 0, 1, …, at least one. Names beyond the eighth part are left out: they are found by asking."""
    values: list[bytes] = []
    part: list[str] = []
    for name in sorted(set(names)):
        if part and len(_encoder.encode(_Wire(1, [*part, name]))) > max_bytes:
            values.append(_encoder.encode(_Wire(1, part)))
            part = []
        part.append(name)
    values.append(_encoder.encode(_Wire(1, part)))
    return values[:MAX_PARTS]


def decode_names(value: bytes) -> Sequence[str]:
    """Parse a peer's bytes. Raises DecodeError, and nothing else."""
    try:
        return _decoder.decode(value).names
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"not a list of names: {error}") from error


def names_of(records: Iterable[Record]) -> Mapping[str, tuple[PeerId, ...]]:
    """The names in records of the root, in order, each with the peers that use it.

    In a closed swarm a member's scope decides which name it may use.
    """
    found: dict[str, dict[PeerId, None]] = {}
    for record in records:
        try:
            names = decode_names(record.value)
        except DecodeError:
            continue
        for name in names:
            if _in_scope(name, record.scope):
                found.setdefault(name, {})[peer_id_of(record.public_key)] = None
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def _in_scope(name: str, scope: str | None) -> bool:
    prefix = prefix_of(name, ())
    return scope is None or prefix.startswith(scope) or scope.startswith(prefix)
