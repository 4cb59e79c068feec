"""The UDP socket itself, read and written directly. Knows no messages.

Not through asyncio's transport, because that closes itself for good on the first address that the system refuses, and
because asyncio reads one datagram per turn of the loop.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any, Final

from p2pmoe.protocol.datagrams import Address, is_link_local, is_sendable, scope_of
from p2pmoe.rpc.resolver import host_of

MAX_READ: Final = 65_536


class DatagramSocket:
    """A bound, non-blocking UDP socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._versions = versions_of(sock)
        self._maps_v4 = sock.family == socket.AF_INET6

    def waiting(self, most: int) -> Iterator[tuple[bytes, Any]]:
        """What lies in the socket now, at most so many datagrams."""
        for _ in range(most):
            try:
                yield self._sock.recvfrom(MAX_READ)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # Windows reports an ICMP error of an earlier datagram here
                continue

    def send(self, datagram: bytes, address: Address) -> None:
        """Send it, or not: a datagram that cannot leave is a lost datagram, and the call's timer knows what to do."""
        with contextlib.suppress(OSError, ValueError, OverflowError):
            self._sock.sendto(datagram, address_on(self._sock, address) if self._maps_v4 else address)

    def may_send_to(self, host: str, told_by: str) -> bool:
        """False for an address that nobody at `told_by` can reach: no peer makes us poke our own local network."""
        if (6 if ":" in host else 4) not in self._versions or (is_link_local(host) and "%" not in host):
            return False
        bare = host.partition("%")[0]
        packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, bare)
        return is_sendable(packed) and scope_of(host) >= scope_of(told_by)


def versions_of(sock: socket.socket) -> frozenset[int]:
    """Which versions of IP a bound socket sends and receives: 4, 6 or both."""
    if sock.family == socket.AF_INET:
        return frozenset({4})
    takes_both = sock.getsockname()[0] == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return frozenset({4, 6}) if takes_both else frozenset({6})


def address_on(sock: socket.socket, address: Address) -> tuple[Any, ...]:
    """An address as this socket's family writes it: IPv4 mapped into IPv6, the scope as a number of its own."""
    host, port = address
    if sock.family != socket.AF_INET6:
        return address
    if ":" not in host:
        return f"::ffff:{host}", port
    bare, _, scope = host.partition("%")
    return (bare, port, 0, int(scope)) if scope.isdecimal() else (host, port)


def plain_address(addr: tuple[Any, ...]) -> Address:
    """`(host, port)` with the host in its one spelling: IPv4 where it is mapped, the scope of a link-local address."""
    return (str(addr[0]) if len(addr) == 2 else host_of(addr)), int(addr[1])
