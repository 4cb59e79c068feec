"""Small values that every layer may use. Knows nothing of torch, sockets or signatures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NewType

from p2pmoe.errors import ConfigError

PeerId = NewType("PeerId", str)
"""The name of a peer: 32 lower-case base32 characters of the 20-byte node id made from its public key."""

Pass = Literal["forward", "backward"]

WIRE_VERSION = 1


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


def parse_host_port(text: str, *, what: str = "address") -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT` as a pair. Raises ConfigError for anything else."""
    host, separator, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"{what} {text!r} is ambiguous; write an IPv6 address as [::1]:31337")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{what} {text!r} is not HOST:PORT with a port from 1 to 65535, e.g. 127.0.0.1:31337")
    return host, int(port)


def format_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
