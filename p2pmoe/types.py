"""Small values that every layer may use. Knows nothing of torch, sockets or signatures."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Literal, NamedTuple, NewType

PeerId = NewType("PeerId", str)
"""The name of a peer: 32 lower-case base32 characters of the 20-byte node id made from its public key."""

_PEER_ID_CHARS = 32

Pass = Literal["forward", "backward"]
Mode = Literal["train", "eval"]
MODES: Final = ("train", "eval")
SEED_BITS: Final = 64


class Manner(NamedTuple):
    """How a call wants its expert computed; the same in the backward call as in its forward call.

    `mode` "train" is the module as its owner has set it up, "eval" all of it in `eval()`. `seed`, an integer of 64
    bits, decides what the expert draws.
    """

    mode: Mode = "train"
    seed: int | None = None


WIRE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls a node.

    `key` is what limits and fair shares go by: the peer id of a caller that has proved its key, else the address
    that it calls from.
    """

    key: str
    peer_id: PeerId | None = None


LOCAL_CALLER = Caller("local")
"""Whoever calls from inside the process."""


def may_be_many(key: str) -> bool:
    """Whether a caller's key is an address or a share of one: many trainers may stand behind it."""
    return key != LOCAL_CALLER.key and not (len(key) == _PEER_ID_CHARS and key.isalnum())


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a node's HTTP service listens, and whose it is.

    `public_key` is the peer's raw Ed25519 key (32 bytes) where it is known from a signed record; connections
    are pooled per endpoint, so two peers behind one address never share one.
    """

    host: str
    port: int
    scheme: str = "http"
    public_key: bytes | None = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def __str__(self) -> str:
        return self.url

    def with_public_key(self, public_key: bytes) -> Endpoint:
        return replace(self, public_key=public_key)


def format_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether bytes sent to this host stay on this machine. A name other than localhost could lead anywhere."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@lru_cache(maxsize=4096)
def source_of(address: str) -> str:
    """What counts as one source: an IPv4 address, the 64-bit network of an IPv6 address (a home has all of it)."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))
