"""The listener: it ends at once, and no connection that it took is left behind."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
import warnings

import pytest
from swarm_kit import WAIT_S

from p2pmoe import faults
from p2pmoe.config import LimitsConfig
from p2pmoe.rpc.http.admission import Admission, Ticket
from p2pmoe.rpc.http.listener import Listener


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
