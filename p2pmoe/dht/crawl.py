"""Runs a look-up over the protocol: sends what the state machine asks for, feeds it what comes back.

The place of kademlia's `SpiderCrawl`. No rules of its own: `lookup.py` decides whom to ask and `harvest.py`
what to believe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Final

from p2pmoe.dht.calls import Call, Delay
from p2pmoe.dht.harvest import Harvest, PageRequest
from p2pmoe.dht.lookup import Lookup
from p2pmoe.dht.protocol import DatagramProtocol
from p2pmoe.dht.requests import find_message, page_message
from p2pmoe.faults import unexpected
from p2pmoe.protocol.datagrams import Contact, Found, Paged, Reply

ALPHA: Final = 5
DEADLINE_S: Final = 5.0
WANT_CONTACTS: Final = 12
READING_GRACE_S: Final = 0.5
"""How long pages may still come when the look-up is done and some holder's records are complete."""


class Crawl:
    """One look-up under way on the event loop, with or without gathering the key's records."""

    def __init__(
        self,
        protocol: DatagramProtocol,
        key: bytes,
        seeds: Iterable[Contact],
        *,
        width: int,
        alpha: int = ALPHA,
        want: int = WANT_CONTACTS,
        harvest: Harvest | None = None,
        quick: bool = False,
    ) -> None:
        self.key = key
        self.harvest = harvest
        table = protocol.table
        self.lookup = Lookup(int.from_bytes(key, "big"), (), width=width, alpha=alpha, own_id=table.own_id)
        for contact in seeds:
            known = table.get(contact.node_id)
            self.lookup.add(contact, doubtful=known is not None and known.misses > 0)
        self._protocol = protocol
        self._quick = quick
        self._want = want
        self._pages: set[Call] = set()
        self._grace: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()

    async def run(self, deadline_s: float = DEADLINE_S) -> list[Contact]:
        """The nodes nearest to the key that answered, nearest first; what was found by the deadline at the latest."""
        try:
            self._advance()
            async with asyncio.timeout(deadline_s):
                await self._finished  # raises UnexpectedError when an answer was too much for us
        except TimeoutError:
            pass
        finally:
            self._finished.cancel()
            if self._grace is not None:
                self._grace.cancel()
            for call in self._pages:
                self._protocol.book.cancel(call)
        # Requests to nodes that are late go on: whether they are missed is the table's business.
        return self.lookup.nearest()

    def _advance(self) -> None:
        if self._finished.done():
            return
        if self._quick and self.harvest is not None and self.harvest.agreed():
            self._finish()
            return
        for contact in self.lookup.next_to_ask():
            self._protocol.call(
                contact,
                find_message(self.key, self._want),
                partial(self._answered, contact),
                partial(self._delayed, contact),
            )
        if not self.lookup.done:
            return
        if self.harvest is not None and self.harvest.is_reading:
            if self.harvest.has_complete:
                # A holder that names pages without end, or doles them out, holds nobody up for long.
                self._grace = self._grace or self._loop.call_later(READING_GRACE_S, self._finish)
        elif self.harvest is None or not self.harvest.is_empty or not self.lookup.is_hasty:
            # Else: on a line that loses much, or on a starved machine, the holders may all be among the late ones.
            self._finish()

    def _finish(self) -> None:
        if not self._finished.done():
            self._finished.set_result(None)

    def _fail(self, error: Exception) -> None:
        """An answer could not be taken in: this look-up fails, not whoever handed us the answer."""
        fault = unexpected("a look-up in the DHT", error, by_a_stranger=True)
        if not self._finished.done():
            self._finished.set_exception(fault)

    def _answered(self, contact: Contact, reply: Reply | None) -> None:
        if self._finished.done():
            return
        try:
            self._take_answer(contact, reply)
        except Exception as error:  # noqa: BLE001
            self._fail(error)

    def _take_answer(self, contact: Contact, reply: Reply | None) -> None:
        if isinstance(reply, Found):
            self.lookup.answered(contact, self._protocol.contacts_in(reply, contact.host))
            if self.harvest is not None:
                self._ask_pages(self.harvest.found(contact, reply, self._protocol.now()), reply.digest)
        else:
            self.lookup.failed(contact)
        self._advance()

    def _delayed(self, contact: Contact, delay: Delay) -> None:
        if self._finished.done():
            return
        try:
            (self.lookup.late if delay is Delay.LATE else self.lookup.slow)(contact)
            self._advance()
        except Exception as error:  # noqa: BLE001
            self._fail(error)

    def _ask_pages(self, requests: list[PageRequest], digest: bytes, *, again: bool = False) -> None:
        for contact, index in requests:
            on_delay = None if again else partial(self._page_delayed, contact, digest, index)
            call = self._protocol.call(
                contact, page_message(self.key, index), partial(self._paged, contact, digest, index), on_delay
            )
            if call is not None:
                self._pages.add(call)

    def _page_delayed(self, contact: Contact, digest: bytes, index: int, delay: Delay) -> None:
        if delay is not Delay.SLOW or self.harvest is None or self._finished.done():
            return
        try:
            self._ask_pages(self.harvest.elsewhere(contact, digest, index), digest, again=True)
        except Exception as error:  # noqa: BLE001
            self._fail(error)

    def _paged(self, contact: Contact, digest: bytes, index: int, reply: Reply | None) -> None:
        if self._finished.done() or self.harvest is None:
            return
        page = reply if isinstance(reply, Paged) else None
        try:
            self._ask_pages(self.harvest.paged(contact, digest, index, page, self._protocol.now()), digest)
            self._advance()
        except Exception as error:  # noqa: BLE001
            self._fail(error)
