"""Where the DHT listens and whom it asks first: sockets and names become addresses. Knows no protocol."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Sequence

from p2pmoe.config import parse_host_port
from p2pmoe.errors import AddressInUseError, ConfigError
from p2pmoe.forks import shared
from p2pmoe.protocol.datagrams import Address, scope_of
from p2pmoe.types import format_host_port


def bind(host: str, port: int) -> socket.socket:
    """A bound UDP socket; `::` takes IPv4 too where the system can.

    Raises:
        AddressInUseError: the port is taken or not allowed.
        ConfigError: the host is no address of this machine.
    """
    where = format_host_port(host, port)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"dht.host {host!r} cannot be resolved: {error}; give an IP address of this machine"
        ) from error
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6 and hasattr(socket, "IPPROTO_IPV6"):
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _bind_error(error, where) from error
    return shared(sock)


def _bind_error(error: OSError, where: str) -> AddressInUseError | ConfigError:
    if error.errno == errno.EADDRINUSE:
        return AddressInUseError(
            f"UDP port {where} of the DHT is taken by another program; stop that, or choose another with dht.port "
            f"(0 lets the system pick)"
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return AddressInUseError(f"UDP port {where} of the DHT is not allowed to us; choose a dht.port above 1023")
    return ConfigError(f"the DHT cannot listen on UDP {where}: {error.strerror}; check dht.host and dht.port")


def client_host(initial_peers: Sequence[str]) -> str:
    """What a client binds: loopback when all its peers are there, else whatever reaches them."""
    hosts = [parse_host_port(peer, what="initial peer")[0] for peer in initial_peers]
    addresses = [_literal(host) for host in hosts]
    if all(address is not None and scope_of(address) == 0 and ":" not in address for address in addresses):
        return "127.0.0.1"
    return "::" if any(address is not None and ":" in address for address in addresses) else "0.0.0.0"  # noqa: S104


def _literal(host: str) -> str | None:
    if host == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


async def resolve(peers: Sequence[str], *, ipv6: bool, timeout_s: float) -> list[Address]:
    """The addresses of `HOST:PORT` texts. Names that do not resolve in time are left out.

    Raises ConfigError for a text that is no HOST:PORT.
    """
    found = await asyncio.gather(*(_resolve_one(peer, ipv6=ipv6, timeout_s=timeout_s) for peer in peers))
    return list(dict.fromkeys(address for address in found if address is not None))


async def _resolve_one(peer: str, *, ipv6: bool, timeout_s: float) -> Address | None:
    host, port = parse_host_port(peer, what="initial peer")
    literal = _literal(host)
    if literal is not None:
        return (literal, port) if ipv6 or ":" not in literal else None
    family = socket.AF_UNSPEC if ipv6 else socket.AF_INET
    try:
        async with asyncio.timeout(timeout_s):
            answers = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError, TimeoutError):
        return None
    return (str(answers[0][4][0]), port) if answers else None
