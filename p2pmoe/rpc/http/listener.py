"""Accepts connections: asks `Admission` first, then shakes hands within a deadline. Knows nothing of HTTP.

asyncio's own servers begin the handshake before they tell the address of a caller, so the accepting is done here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from p2pmoe.errors import OverloadedError
from p2pmoe.faults import attempt, own
from p2pmoe.forks import shared
from p2pmoe.rpc.http.admission import Admission, Ticket
from p2pmoe.rpc.http.grain import Meter, MeteredSocket
from p2pmoe.rpc.resolver import Resolver

BACKLOG: Final = 128
COMPLAIN_EVERY_S: Final = 60.0
_ACCEPT_PAUSE_S: Final = 0.2
_LOOKUP_TIMEOUT_S: Final = 5.0
_PORT_ATTEMPTS: Final = 8
_NOT_HERE: Final = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
_STOP_TIMEOUT_S: Final = 0.5
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset and leaves nothing behind

logger = logging.getLogger(__name__)


class Listener:
    """Listening sockets and the connections that are not open yet. Belongs to one event loop.

    Args:
        make_protocol: gets the connection's ticket, which the protocol gives back when the connection is lost.
        context: None for plain TCP.
        resolver: looks up the name that is listened on.
    """

    def __init__(
        self,
        make_protocol: Callable[[Ticket], asyncio.Protocol],
        admission: Admission,
        *,
        context: ssl.SSLContext | None,
        handshake_timeout_s: float,
        shutdown_timeout_s: float,
        resolver: Resolver | None = None,
    ) -> None:
        self._resolver = resolver or Resolver()
        self._make_protocol, self._admission = make_protocol, admission
        self._options: dict[str, Any] = {}
        if context is not None:
            self._options = {
                "ssl": context,
                "ssl_handshake_timeout": handshake_timeout_s,
                "ssl_shutdown_timeout": shutdown_timeout_s,
            }
        self._sockets: list[socket.socket] = []
        self._accepting: set[asyncio.Task[None]] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._closing = False
        self._complained_at = -math.inf
        self.failed_handshakes = 0

    def __repr__(self) -> str:
        return f"<Listener on {len(self._sockets)} sockets, {self._admission}>"

    async def start(self, host: str, port: int) -> int:
        """Listen on every address of `host`, of `::` on those of IPv4 too; the port. Raises OSError."""
        hosts = await self._resolver.addresses(host, timeout_s=_LOOKUP_TIMEOUT_S)
        if hosts == ["::"]:
            hosts = ["::", "0.0.0.0"]  # noqa: S104 - what :: is said to mean; two sockets work on every system
        attempts = 1 if port else _PORT_ATTEMPTS
        for left in reversed(range(attempts)):
            try:
                port = self._listen_on(hosts, port)
                break
            except OSError as error:
                self._close_sockets()
                # The port that the system picked for the first address may be taken on the next one.
                if not left or error.errno != errno.EADDRINUSE:
                    raise
        for listening in self._sockets:
            own(self._accept(listening), self._accepting, "accepting connections")
        return port

    def _listen_on(self, hosts: Sequence[str], port: int) -> int:
        missing: OSError | None = None
        for host in hosts:
            try:
                listening = _listen(host, port)
            except OSError as error:
                # A name like localhost may have an address of a kind that this machine has switched off.
                if error.errno not in _NOT_HERE:
                    raise
                missing = missing or error
                continue
            self._sockets.append(listening)
            port = listening.getsockname()[1]  # of several addresses all get the port the system picked first
        if missing is not None and not self._sockets:
            raise missing
        return port

    def _close_sockets(self) -> None:
        while self._sockets:
            self._sockets.pop().close()

    async def close(self) -> None:
        """Stop listening, drop handshakes under way. Open connections are their protocols' business."""
        self._closing = True
        await self._stop_accepting()
        await asyncio.sleep(0)  # a handshake that has not begun cannot be dropped in good order
        for task in self._opening:
            task.cancel()
        if self._opening:
            await asyncio.wait(self._opening)
        self._close_sockets()

    # -- private

    async def _stop_accepting(self) -> None:
        """End the accepting by an error of the sockets: cancelled, it would lose a connection just accepted."""
        for listening in self._sockets:
            with contextlib.suppress(OSError):  # systems that shut down connected sockets only
                listening.shutdown(socket.SHUT_RDWR)
        if self._accepting:
            await asyncio.wait(self._accepting, timeout=_STOP_TIMEOUT_S)
        late = set(self._accepting)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listening)
                shared(connection)
            except OSError as error:
                if self._closing:
                    return
                self._complain(error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if self._closing:
                connection.close()
                return
            # Whatever a connection does to us, the next one must be accepted.
            attempt("accepting a connection", self._take, connection, address, by_a_stranger=True)
            await asyncio.sleep(0)  # accepting a waiting caller does not yield by itself, and they may never end

    def _complain(self, error: OSError) -> None:
        """Out of descriptors, mostly. Callers wait in the backlog meanwhile; one line a minute tells of it."""
        now = time.monotonic()
        if now - self._complained_at >= COMPLAIN_EVERY_S:
            self._complained_at = now
            logger.warning(
                "connections cannot be accepted, callers wait: %s; lower limits.max_connections, or let this process "
                "open more files (ulimit -n)",
                error.strerror or error,
            )

    def _take(self, connection: socket.socket, address: tuple[Any, ...]) -> None:
        try:
            ticket = self._admission.enter(address[0])
        except OverloadedError as error:
            logger.debug("connection refused: %s", error)
            with contextlib.suppress(OSError):  # the caller was quicker
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.close()
        except BaseException:
            connection.close()
            raise
        else:
            ticket.meter = Meter(is_tls="ssl" in self._options)
            metered = shared(MeteredSocket.of(connection, ticket.meter))
            own(self._open(metered, ticket), self._opening, "a handshake", by_a_stranger=True)

    async def _open(self, connection: socket.socket, ticket: Ticket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: self._make_protocol(ticket), connection, **self._options)
        except OSError as error:  # no TLS, another version, silence, a connection that broke
            self.failed_handshakes += 1
            logger.debug("handshake failed: %s", error)
            ticket.give_back()
        except BaseException:
            ticket.give_back()
            raise


def _listen(host: str, port: int) -> socket.socket:
    bare, _, scope = host.partition("%")
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let another process take the port away
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listening.family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.setblocking(False)
        listening.bind((bare, port, 0, int(scope)) if scope.isdecimal() else (bare, port))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return shared(listening)
