"""Names become addresses: off every event loop, within a time limit, one look-up of a name at a time.

The system's resolver blocks, cannot be cancelled, and may take half a minute. Each look-up has a daemon thread of its
own, so that neither a loop nor the end of a program waits for it. Knows no ports and no protocol.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Final

from p2pmoe.errors import NameLookupError
from p2pmoe.types import canonical_host, parse_ip

MAX_LOOKUPS: Final = 16
"""Under way at the same time; each is a thread that the system may hold for long."""
MAX_ADDRESSES: Final = 16
"""Of one name."""

GetAddrInfo = Callable[..., list[tuple[Any, ...]]]


class Resolver:
    """Addresses of names, from any thread and any event loop.

    Args:
        getaddrinfo: what asks the system, as `socket.getaddrinfo`.
    """

    def __init__(self, getaddrinfo: GetAddrInfo = socket.getaddrinfo) -> None:
        self._getaddrinfo = getaddrinfo
        self._running: dict[str, Future[list[str]]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Resolver: {len(self._running)} look-ups>"

    async def addresses(self, host: str, *, timeout_s: float) -> list[str]:
        """The IP addresses of a name, in the system's order, each in its one spelling; of an address itself.

        Raises NameLookupError: the name has no address, or nobody said so in time.
        """
        found = self._start(host)
        if found is None:
            return [canonical_host(host)]
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(found)  # it runs: who gives up does not cancel it for the others
        except TimeoutError:
            raise _too_slow(host, timeout_s) from None

    def addresses_blocking(self, host: str, *, timeout_s: float) -> list[str]:
        """The same for a thread that may block."""
        found = self._start(host)
        if found is None:
            return [canonical_host(host)]
        try:
            return found.result(timeout_s)
        except FutureTimeoutError:
            raise _too_slow(host, timeout_s) from None

    # -- private

    def _start(self, host: str) -> Future[list[str]] | None:
        """None for what is an address already, unless its scope has to be looked up."""
        name = canonical_host(host)
        if parse_ip(name) is not None and "%" not in name:
            return None
        with self._lock:
            found = self._running.get(name)
            if found is not None:
                return found
            if len(self._running) >= MAX_LOOKUPS:
                raise NameLookupError(f"{name!r} is not looked up: {MAX_LOOKUPS} names still wait for the resolver")
            found = self._running[name] = Future()
        found.set_running_or_notify_cancel()
        threading.Thread(target=self._look_up, args=(name, found), name=f"p2pmoe-name-{name}", daemon=True).start()
        return found

    def _look_up(self, name: str, found: Future[list[str]]) -> None:
        try:
            answers = self._getaddrinfo(name, None, type=socket.SOCK_DGRAM)
            hosts = list(dict.fromkeys(host for host in map(_host_of, answers) if host is not None))
        except Exception as error:  # noqa: BLE001 - OSError and UnicodeError of the system's, whatever of another's
            self._forget(name)
            reason = getattr(error, "strerror", None) or error
            found.set_exception(NameLookupError(f"the name {name!r} does not resolve: {reason}"))
            return
        self._forget(name)
        if hosts:
            found.set_result(hosts[:MAX_ADDRESSES])
        else:
            found.set_exception(NameLookupError(f"the name {name!r} does not resolve: it has no address"))

    def _forget(self, name: str) -> None:
        with self._lock:
            self._running.pop(name, None)


def _host_of(answer: tuple[Any, ...]) -> str | None:
    family, address = answer[0], answer[4]
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    return host_of(address)


def host_of(address: tuple[Any, ...]) -> str:
    """The host of a socket's address in its one spelling: IPv4 where it is mapped, the scope only where it matters."""
    host = str(address[0])
    if len(address) == 4 and address[3] and "%" not in host:
        host = f"{host}%{address[3]}"
    return canonical_host(host)


def _too_slow(host: str, timeout_s: float) -> NameLookupError:
    return NameLookupError(f"the name {host!r} does not resolve: no answer of the name server within {timeout_s:.3g} s")
