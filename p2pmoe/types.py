"""Small values that every layer may use. Knows nothing of torch, sockets or signatures."""

from __future__ import annotations

import ipaddress
import re
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
    are pooled per endpoint, so two peers behind one address never share one. `host` is in its one spelling.
    """

    host: str
    port: int
    scheme: str = "http"
    public_key: bytes | None = None

    def __post_init__(self) -> None:
        host = canonical_host(self.host)
        if host != self.host:  # or one peer would have two pools, two standings and two bans
            object.__setattr__(self, "host", host)

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


IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME_RE: Final = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}", re.ASCII)
_NUMBER_RE: Final = re.compile(r"0x[0-9a-f]*|[0-9]+", re.ASCII)
_SCOPE_RE: Final = re.compile(r"[A-Za-z0-9._-]{1,32}", re.ASCII)
MAX_NAME_CHARS: Final = 253


@lru_cache(maxsize=4096)
def parse_ip(text: str) -> IPAddress | None:
    """The address that a text stands for, None for a name.

    IPv4 in IPv6 (`::ffff:192.0.2.1`) is IPv4. What systems take since ever (`127.1`, `0x7f.1`) is read as they read
    it. A scope (`%eth0`) is kept where it means something: on a link-local address.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    address, percent, scope = text.partition("%")
    if percent and not _SCOPE_RE.fullmatch(scope):
        return None
    try:
        ip = ipaddress.ip_address(address.lower())
    except ValueError:
        return None if scope else _legacy_ipv4(address.lower().removesuffix("."))
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if scope and ip.is_link_local:
            return ipaddress.IPv6Address(f"{ip}%{scope}")
    return ip


def _legacy_ipv4(text: str) -> ipaddress.IPv4Address | None:
    """`127.1` and its like, as the C library's inet_aton has read them for forty years."""
    parts = text.split(".")
    if len(parts) > 4 or len(text) > 64 or not all(_NUMBER_RE.fullmatch(part) for part in parts):
        return None
    try:
        *leading, last = (int(part, 16 if part[1:2] == "x" else 8 if part[0] == "0" else 10) for part in parts)
    except ValueError:  # 08, or 0x with nothing behind it
        return None
    if any(part > 255 for part in leading) or last >= 256 ** (4 - len(leading)):
        return None
    return ipaddress.IPv4Address(sum(part << 8 * (3 - place) for place, part in enumerate(leading)) + last)


@lru_cache(maxsize=4096)
def canonical_host(text: str) -> str:
    """The one spelling of a host that addresses are compared, counted and pooled by.

    An IP address in its shortest form (see `parse_ip`); a name in lower case, in ASCII (IDNA), without a dot at its
    end. Raises nothing: what is no host comes back as it is, and `is_host` says so.
    """
    host = text.strip()
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:
            return text
    ip = parse_ip(host)
    if ip is not None:
        return str(ip)
    return host.removesuffix(".").lower()


def is_host(text: str) -> bool:
    """Whether this is an IP address or a name that a resolver takes: of `a..b` it raises errors of its own kind."""
    host = canonical_host(text)
    if parse_ip(host) is not None:
        return True
    # A name that ends in a number is an address with a fault, and no name (RFC 1123, 2.1).
    return (
        len(host) <= MAX_NAME_CHARS
        and _NAME_RE.fullmatch(host) is not None
        and _NUMBER_RE.fullmatch(host.rpartition(".")[2]) is None
    )


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether bytes sent to this host stay on this machine. A name other than localhost could lead anywhere."""
    host = canonical_host(host)
    ip = parse_ip(host)
    return host == "localhost" if ip is None else ip.is_loopback


@lru_cache(maxsize=4096)
def source_of(address: str) -> str:
    """What counts as one source: an IPv4 address, the 64-bit network of an IPv6 address (a home has all of it)."""
    ip = parse_ip(address.partition("%")[0])
    if ip is None:
        return address[:64]
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))
