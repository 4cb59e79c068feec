"""The listener: it ends at once, and no connection that it took is left behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import time
import warnings
from types import SimpleNamespace

import pytest
from swarm_kit import WAIT_S

from p2pmoe import faults
from p2pmoe.config import LimitsConfig
from p2pmoe.dht.addresses import has_ipv6
from p2pmoe.rpc.http.admission import Admission, Ticket
from p2pmoe.rpc.http.listener import Listener
from p2pmoe.rpc.resolver import Resolver


class Quiet(asyncio.Protocol):
    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self.transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._ticket.give_back()


@pytest.mark.parametrize("turns", range(4))
async def test_closing_between_accept_and_the_next_step_leaves_no_socket(turns: int) -> None:
    """A connection that the kernel hands over in the very round in which the listener is closed is closed too."""
    limits = LimitsConfig(max_handshakes_per_s=1e6, max_source_handshakes_per_s=1e6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        for _ in range(20):
            protocols: list[Quiet] = []

            def make(ticket: Ticket, protocols: list[Quiet] = protocols) -> Quiet:
                protocols.append(Quiet(ticket))
                return protocols[-1]

            listener = Listener(
                make, Admission(limits), context=None, handshake_timeout_s=WAIT_S, shutdown_timeout_s=WAIT_S
            )
            port = await listener.start("127.0.0.1", 0)
            await asyncio.sleep(0)
            with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S):
                for _ in range(turns):
                    await asyncio.sleep(0)
                begun = time.monotonic()
                await asyncio.wait_for(listener.close(), WAIT_S)
                assert time.monotonic() - begun < 0.4, "it waited for the timeout"
                for protocol in protocols:
                    if protocol.transport is not None:
                        protocol.transport.close()
                await asyncio.sleep(0)
            del listener
        gc.collect()
    assert [str(each.message) for each in caught if issubclass(each.category, ResourceWarning)] == []


async def test_whatever_a_connection_does_to_us_the_next_one_is_accepted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(faults, "_told_at", {})
    admission = Admission(LimitsConfig())
    real, failures = admission.enter, iter([OSError("reset"), TypeError("nobody foresaw it")])

    def enter(address: str) -> Ticket:
        if (error := next(failures, None)) is not None:
            raise error
        return real(address)

    monkeypatch.setattr(admission, "enter", enter)
    accepted: asyncio.Queue[Quiet] = asyncio.Queue()

    def make(ticket: Ticket) -> Quiet:
        accepted.put_nowait(Quiet(ticket))
        return Quiet(ticket)

    listener = Listener(make, admission, context=None, handshake_timeout_s=WAIT_S, shutdown_timeout_s=WAIT_S)
    port = await listener.start("127.0.0.1", 0)
    writers = []
    async with asyncio.timeout(WAIT_S):
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
        await accepted.get()
    for writer in writers:
        writer.close()
    await listener.close()
    assert [each.getMessage() for each in caplog.records if each.exc_info] == [
        "accepting a connection failed unexpectedly"
    ]


def listener(**options) -> Listener:
    return Listener(
        Quiet, Admission(LimitsConfig()), context=None, handshake_timeout_s=WAIT_S, shutdown_timeout_s=WAIT_S, **options
    )


async def connects(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_two_colons_listen_on_ipv4_too_at_one_port() -> None:
    both = listener()
    port = await both.start("::", 0)
    try:
        assert await connects("127.0.0.1", port)
        assert await connects("::1", port)
    finally:
        await both.close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_a_port_that_is_taken_on_one_of_the_addresses_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        both = listener()
        with pytest.raises(OSError, match="in use"):
            await both.start("::", other.getsockname()[1])
        assert "0 sockets" in repr(both)


def names(*hosts: str) -> Resolver:
    return Resolver(lambda *_, **__: [(_family(host), 1, 6, "", (host, 0)) for host in hosts])


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


async def test_a_name_listens_on_those_of_its_addresses_that_this_machine_has() -> None:
    one = listener(resolver=names("203.0.113.77", "127.0.0.1", "127.0.0.2"))
    port = await one.start("box.example", 0)
    try:
        assert "2 sockets" in repr(one)
        assert await connects("127.0.0.1", port)
    finally:
        await one.close()
    none = listener(resolver=names("203.0.113.77"))
    with pytest.raises(OSError, match=r"assign|address"):
        await none.start("box.example", 0)


async def test_accepting_without_descriptors_is_one_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop, now, left = asyncio.get_running_loop(), [1000.0], [130]
    served = asyncio.Event()
    accept = loop.sock_accept

    async def scarce(listening: socket.socket) -> tuple[socket.socket, object]:
        now[0] += 1.0
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EMFILE, "Too many open files")
        return await accept(listening)

    class Greeted(Quiet):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            served.set()

    monkeypatch.setattr(loop, "sock_accept", scarce)
    monkeypatch.setattr("p2pmoe.rpc.http.listener.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("p2pmoe.rpc.http.listener._ACCEPT_PAUSE_S", 0.0)
    listener = Listener(
        Greeted, Admission(LimitsConfig()), context=None, handshake_timeout_s=WAIT_S, shutdown_timeout_s=WAIT_S
    )
    port = await listener.start("127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S):
        await asyncio.wait_for(served.wait(), WAIT_S)
        await listener.close()
    assert [each.getMessage() for each in caplog.records] == 3 * [
        "connections cannot be accepted, callers wait: Too many open files; lower limits.max_connections, or let this "
        "process open more files (ulimit -n)"
    ]
