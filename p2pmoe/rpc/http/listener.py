"""Accepts connections: asks `Admission` first, then shakes hands within a deadline. Knows nothing of HTTP.

asyncio's own servers begin the handshake before they tell the address of a caller, so the accepting is done here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, Final

from p2pmoe.errors import OverloadedError
from p2pmoe.faults import attempt, own
from p2pmoe.forks import shared
from p2pmoe.rpc.http.admission import Admission, Ticket

BACKLOG: Final = 128
_ACCEPT_PAUSE_S: Final = 0.2
_STOP_TIMEOUT_S: Final = 0.5
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset and leaves nothing behind

logger = logging.getLogger(__name__)


class Listener:
    """Listening sockets and the connections that are not open yet. Belongs to one event loop.

    Args:
        make_protocol: gets the connection's ticket, which the protocol gives back when the connection is lost.
        context: None for plain TCP.
    """

    def __init__(
        self,
        make_protocol: Callable[[Ticket], asyncio.Protocol],
        admission: Admission,
        *,
        context: ssl.SSLContext | None,
        handshake_timeout_s: float,
        shutdown_timeout_s: float,
    ) -> None:
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
        self.failed_handshakes = 0

    def __repr__(self) -> str:
        return f"<Listener on {len(self._sockets)} sockets, {self._admission}>"

    async def start(self, host: str, port: int) -> int:
        """Listen on every address of `host`; the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, _, _, _, address in dict.fromkeys(found):
                listening = _listen(family, (address[0], port, *address[2:]))
                self._sockets.append(listening)
                port = listening.getsockname()[1]  # of several addresses all get the port the system picked first
        except OSError:
            await self.close()
            raise
        for listening in self._sockets:
            own(self._accept(listening), self._accepting, "accepting connections")
        return port

    async def close(self) -> None:
        """Stop listening, drop handshakes under way. Open connections are their protocols' business."""
        self._closing = True
        await self._stop_accepting()
        await asyncio.sleep(0)  # a handshake that has not begun cannot be dropped in good order
        for task in self._opening:
            task.cancel()
        if self._opening:
            await asyncio.wait(self._opening)
        while self._sockets:
            self._sockets.pop().close()

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
                # Out of descriptors, mostly. Callers wait in the backlog meanwhile.
                logger.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if self._closing:
                connection.close()
                return
            # Whatever a connection does to us, the next one must be accepted.
            attempt("accepting a connection", self._take, connection, address, by_a_stranger=True)
            await asyncio.sleep(0)  # accepting a waiting caller does not yield by itself, and they may never end

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
            own(self._open(connection, ticket), self._opening, "a handshake", by_a_stranger=True)

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


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let another process take the port away
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.setblocking(False)
        listening.bind(address)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return shared(listening)
