"""Where the DHT listens, and what this machine is called: sockets and hosts. Knows no protocol and no peers."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Sequence
from typing import Final

from p2pmoe.config import parse_host_port
from p2pmoe.errors import AddressInUseError, ConfigError, NameLookupError
from p2pmoe.forks import shared
from p2pmoe.protocol.datagrams import scope_of
from p2pmoe.rpc.resolver import Resolver
from p2pmoe.types import canonical_host, format_host_port, parse_ip

LOOKUP_TIMEOUT_S: Final = 5.0
"""How long the name in `dht.host` may take to resolve."""
_OUTSIDE: Final = {4: "192.0.2.1", 6: "2001:db8::1"}  # addresses of documentation: nothing is sent there


def bind(host: str, port: int, *, resolver: Resolver | None = None) -> socket.socket:
    """A bound UDP socket on the first address of `host` that can be bound; `::` takes IPv4 too where the system can.

    Raises:
        AddressInUseError: the port is taken or not allowed.
        ConfigError: the host is no address of this machine.
    """
    try:
        hosts = (resolver or Resolver()).addresses_blocking(host, timeout_s=LOOKUP_TIMEOUT_S)
    except NameLookupError as error:
        raise ConfigError(f"dht.host {host!r}: {error}; give an IP address of this machine") from error
    first: OSError | None = None
    for each in hosts:
        try:
            return shared(_bind_one(each, port))
        except OSError as error:
            first = first or error
    assert first is not None
    raise _bind_error(first, format_host_port(host, port)) from first


def _bind_one(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    bare, _, scope = host.partition("%")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        if sock.family == socket.AF_INET6:
            with contextlib.suppress(OSError):  # OpenBSD has no sockets that take both
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((bare, port, 0, int(scope)) if scope.isdecimal() else (host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_error(error: OSError, where: str) -> AddressInUseError | ConfigError:
    if error.errno == errno.EADDRINUSE:
        return AddressInUseError(
            f"UDP port {where} of the DHT is taken by another program; stop that, or choose another with dht.port "
            f"(0 lets the system pick)"
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return AddressInUseError(f"UDP port {where} of the DHT is not allowed to us; choose a dht.port above 1023")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"the DHT cannot listen on UDP {where}: this machine has no such address; set dht.host to one that it has "
            f"(0.0.0.0 for all), and dht.announce_host to the one that others reach it at"
        )
    return ConfigError(f"the DHT cannot listen on UDP {where}: {error.strerror}; check dht.host and dht.port")


def client_host(initial_peers: Sequence[str]) -> str:
    """What a client binds: loopback when all its peers are there, else whatever reaches them.

    A name may have addresses of either kind.
    """
    hosts = [_literal(parse_host_port(peer, what="initial peer")[0]) for peer in initial_peers]
    if all(host is not None and ":" not in host for host in hosts):
        return "127.0.0.1" if all(host is not None and scope_of(host) == 0 for host in hosts) else "0.0.0.0"  # noqa: S104
    return "::" if has_ipv6() else "0.0.0.0"  # noqa: S104


def has_ipv6() -> bool:
    """Whether this system has IPv6 at all; a machine may be set up without."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::", 0))
    except OSError:
        return False
    return True


def _literal(host: str) -> str | None:
    if host == "localhost":
        return "127.0.0.1"
    return host if parse_ip(host) is not None else None


def is_wildcard(host: str) -> bool:
    """0.0.0.0 or ::, every interface of the machine."""
    ip = parse_ip(host)
    return ip is not None and ip.is_unspecified


def is_own_host(host: str) -> bool:
    """Whether an address is this machine's own: only such a one can be bound."""
    try:
        _bind_one(host, 0).close()
    except OSError:
        return False
    return not is_wildcard(host)


def reached_at(host: str) -> str:
    """The address at which others reach what listens on `host`: of a wildcard that of the interface leading outwards.

    A machine without a network has loopback alone.
    """
    host = canonical_host(host)
    if not is_wildcard(host):
        return host
    found = [each for each in map(_outward, (4, 6) if host == "::" else (4,)) if each is not None]
    # Both reach as far, mostly, and IPv4 is what more peers have.
    return max(found, key=scope_of, default="127.0.0.1" if host != "::" or not has_ipv6() else "::1")


def _outward(version: int) -> str | None:
    """The address of the interface that leads outwards. Connecting a UDP socket sends nothing."""
    try:
        with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect((_OUTSIDE[version], 9))
            host = canonical_host(str(probe.getsockname()[0]))
    except OSError:
        return None
    return None if is_wildcard(host) else host
