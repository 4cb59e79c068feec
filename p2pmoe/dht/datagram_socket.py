"""The UDP socket itself, read and written directly. Knows no messages.

Not through asyncio's transport, because that closes itself for good on the first address that the system refuses, and
because asyncio reads one datagram per turn of the loop.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any, Final

from p2pmoe.protocol.datagrams import Address, is_sendable, scope_of

MAX_READ: Final = 65_536


class DatagramSocket:
    """A bound, non-blocking UDP socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
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
        host, port = address
        if self._maps_v4 and ":" not in host:
            host = f"::ffff:{host}"
        with contextlib.suppress(OSError, ValueError, OverflowError):
            self._sock.sendto(datagram, (host, port))

    def may_send_to(self, host: str, told_by: str) -> bool:
        """False for an address that nobody at `told_by` can reach: no peer makes us poke our own local network."""
        if not self._maps_v4 and ":" in host:
            return False
        packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
        return is_sendable(packed) and scope_of(host) >= scope_of(told_by)


def plain_address(addr: tuple[Any, ...]) -> Address:
    """`(host, port)` without scope ids and IPv4-mapped forms."""
    host = str(addr[0]).partition("%")[0]
    if host.startswith("::ffff:") and "." in host:
        host = host[7:]
    return host, int(addr[1])
