"""What a DHT node keeps on disk between runs: peers that answered, its last sequence. JSON; trusts nothing in it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from p2pmoe.errors import EncodeError
from p2pmoe.files import open_at_once
from p2pmoe.protocol.datagrams import Address, is_link_local, pack_address, unpack_address

MAX_STATE_BYTES: Final = 256 * 1024
MAX_PEERS: Final = 64


class SavedState(msgspec.Struct, frozen=True):
    """The file's content. Unknown keys are ignored, so that a newer version's file can be read."""

    peers: Annotated[tuple[tuple[str, Annotated[int, Meta(ge=1, le=65535)]], ...], Meta(max_length=MAX_PEERS)] = ()
    sequence: Annotated[int, Meta(ge=0, le=2**62)] = 0


_decoder = msgspec.json.Decoder(SavedState)


def read_state(path: Path, *, max_sequence: int = 2**62) -> SavedState | None:
    """The saved state; None when the file is missing or broken, which costs only a slower join.

    Peers that no datagram could be sent to are left out: a name would be looked up on the DHT's loop, which stands
    still meanwhile. A sequence above `max_sequence` counts as none: peers refuse records from so far ahead.
    """
    try:
        with open_at_once(path) as file:
            content = file.read(MAX_STATE_BYTES + 1) or b""  # None of a pipe
        state = _decoder.decode(content) if len(content) <= MAX_STATE_BYTES else None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if state is None:
        return None
    peers = tuple(peer for peer in map(_usable, state.peers) if peer is not None)
    return SavedState(peers, state.sequence if state.sequence <= max_sequence else 0)


def load_state(path: Path, *, max_sequence: int = 2**62) -> SavedState:
    """`read_state`, empty where there is none."""
    return read_state(path, max_sequence=max_sequence) or SavedState()


def _usable(peer: Address) -> Address | None:
    try:
        packed = unpack_address(pack_address(*peer))
        return None if packed is None or is_link_local(packed[0]) else packed  # its link may have another number now
    except EncodeError:
        return None


def save_state(path: Path, peers: list[Address], sequence: int) -> None:
    """Replace the file in one step. Raises OSError when that cannot be done."""
    content = msgspec.json.encode(SavedState(tuple(peers[:MAX_PEERS]), sequence))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)  # noqa: PTH105 - Path.replace is the same; the pair reads better
    finally:
        temporary.unlink(missing_ok=True)
