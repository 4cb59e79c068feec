"""What a fuzz target is. Adding one: write a function of bytes, put one `Target` into a registry of `targets/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from p2pmoe.errors import P2PMoEError

KIB: Final = 1024
MIB: Final = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads foreign bytes.

    `run` gives a short text that says what became of the bytes (the engine keeps an input that leads to a new one),
    or raises one of `errors`. Everything else it raises is a finding, and so is taking more memory than twice
    `limit_bytes`, or more time than `deadline_s`. It keeps no state: the same bytes do the same again.
    """

    name: str
    run: Callable[[bytes], str]
    errors: tuple[type[P2PMoEError], ...]
    """What these bytes may be refused with; a typed error of another kind is a finding too."""
    limit_bytes: int
    """The memory that the configured limits allow for one input."""
    seeds: Callable[[], Mapping[str, bytes]]
    """Valid inputs by name: golden messages."""
    mutate: str = "bytes"
    """How inputs are built: bytes, json, toml, frames, msgpack or datagrams; see `mutate.py`."""
    max_input_bytes: int = 4 * KIB
    deadline_s: float = 2.0
