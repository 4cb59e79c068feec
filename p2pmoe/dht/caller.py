"""Requests of ours on their way: sends and repeats them, gives each its reply or tells that none came.

What is awaited stands in `calls.py`; who answers enters the table here. Knows no socket and no records.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from p2pmoe.dht.calls import Call, CallBook, Delay
from p2pmoe.dht.contacts import ContactTable
from p2pmoe.dht.requests import MakeRequest
from p2pmoe.faults import attempt
from p2pmoe.protocol.datagrams import (
    CALL_ID_BYTES,
    Address,
    Contact,
    Pong,
    Prove,
    Reply,
    Request,
    encode_datagram,
    unpack_address,
)

MAX_TOKENS: Final = 4096
MAX_DRAIN: Final = 64
STALL_S: Final = 0.05
_LISTENER: Final = "taking an answer of the DHT"
_SENDING: Final = "sending a datagram"


class Caller:
    """The asking half of the protocol, on the running event loop.

    Args:
        sender: Our node id; empty for a client.
        header: What our datagrams begin with.
        table: The contacts, which learn who answers and who does not.
        send: Sends a datagram.
        drain: Reads what waits in the socket, at most `MAX_DRAIN` datagrams, and returns how many there were.
    """

    def __init__(
        self,
        *,
        sender: bytes,
        header: bytes,
        table: ContactTable,
        send: Callable[[bytes, Address], None],
        drain: Callable[[], int],
    ) -> None:
        self.book = CallBook()
        self.timeouts = 0
        self.on_seen: Callable[[Address, Address, float], None] | None = None
        """Told who sees us at which address, and what its clock shows."""
        self.on_own: Callable[[Address], None] = _ignore
        """Told of an address at which we have asked ourselves."""
        self.on_same_id: Callable[[Address], None] = _ignore
        """Told of an address where somebody else answers with our node id. It may be a lie: see `same_key.py`."""
        self._sender = sender
        self._header = header
        self._table = table
        self._send = send
        self._drain = drain
        self._loop = asyncio.get_running_loop()
        self._tokens_held: OrderedDict[Address, bytes] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._last_reply_at = 0.0
        self._closed = False

    def close(self) -> None:
        """Stop the timer and fail what is under way. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for call in self.book.cancel_all():
            _tell(call, None)

    def call(
        self,
        contact: Contact | Address,
        make: MakeRequest,
        on_done: Callable[[Reply | None], None],
        on_delay: Callable[[Delay], None] | None = None,
        *,
        anonymous: bool = False,
    ) -> Call | None:
        """Send `make(id, sender, token)` and have the reply, or None after the last timeout, passed to `on_done`.

        A plain address is asked whoever is there. With `anonymous` the request does not say that it is ours. None
        when too many calls wait already; `on_done` was called.
        """
        node_id, address = (contact.node_id, contact.address) if isinstance(contact, Contact) else (None, contact)
        sender = b"" if anonymous else self._sender
        request = make(secrets.token_bytes(CALL_ID_BYTES), sender, self._tokens_held.get(address, b""))
        call = Call(request, encode_datagram(self._header, request), address, node_id, on_done, on_delay)
        if self._closed or not self.book.add(call):
            _tell(call, None)
            return None
        self._start_calls()
        return call

    async def ask(self, contact: Contact | Address, make: MakeRequest, *, anonymous: bool = False) -> Reply | None:
        """`call`, awaited. None: nobody answered. Cancelling forgets the call."""
        answer: asyncio.Future[Reply | None] = self._loop.create_future()

        def settle(reply: Reply | None) -> None:
            if not answer.done():
                answer.set_result(reply)

        call = self.call(contact, make, settle, anonymous=anonymous)
        try:
            return await answer
        finally:
            if call is not None:
                self.book.cancel(call)

    def _start_calls(self) -> None:
        for call in self.book.startable(self._loop.time()):
            attempt(_SENDING, self._send, call.datagram, call.address)  # what is not sent is a lost datagram
        self._set_timer()

    def _set_timer(self) -> None:
        at = self.book.next_due
        if at is None or self._closed:
            return
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            self._look_at_time()
        finally:  # without a timer every call would wait for ever
            self._start_calls()

    def _look_at_time(self) -> None:
        stall_s = self._loop.time() - self._timer_at
        # Replies may wait in the socket while the timer is run: read them before anybody is called late.
        drained = self._drain()
        if stall_s > STALL_S or drained >= MAX_DRAIN:
            self.book.postpone(max(stall_s, STALL_S))
        due = self.book.due(self._loop.time())
        for call in due.resend:
            attempt(_SENDING, self._send, call.datagram, call.address)
        for call in due.delayed:
            if call.on_delay is not None:
                attempt(_LISTENER, call.on_delay, call.delay, by_a_stranger=True)
        for call in due.failed:
            self.timeouts += 1
            if call.node_id is not None:
                heard_others = self._last_reply_at > call.first_sent_at
                self._table.missed(Contact(call.node_id, *call.address), heard_others=heard_others)
            _tell(call, None)

    def came_back(self, request: Request) -> bool:
        """Whether a request that we received is one of ours. Nobody needs to wait for a proof of our own then."""
        call = self.book.came_back(request.id)
        if call is None:
            return False
        if isinstance(request, Prove):
            self.book.cancel(call)
            self.on_own(call.address)
            call.on_done(None)
        return True

    def take_reply(self, reply: Reply, address: Address) -> bool:
        """Hand a reply to whoever waits for it; False when nobody does."""
        call = self.book.replied(reply, address, self._loop.time())
        if call is None:
            return False
        self._last_reply_at = self._loop.time()
        if reply.sender == self._table.own_id:
            (self.on_own if call.came_back else self.on_same_id)(address)
        if call.node_id is not None and reply.sender != call.node_id:
            self._table.forget(Contact(call.node_id, *address))
            _tell(call, None)
        else:
            self._keep_token(address, reply.token)
            if reply.sender:
                self._table.heard_from(Contact(reply.sender, *address), self._loop.time())
            if isinstance(reply, Pong) and self.on_seen is not None:
                seen = unpack_address(reply.seen)
                if seen is not None:
                    attempt(_LISTENER, self.on_seen, address, seen, reply.time_ms / 1000, by_a_stranger=True)
            _tell(call, reply)
        self._start_calls()
        return True

    def _keep_token(self, address: Address, token: bytes) -> None:
        self._tokens_held[address] = token
        self._tokens_held.move_to_end(address)
        if len(self._tokens_held) > MAX_TOKENS:
            self._tokens_held.popitem(last=False)

    def __repr__(self) -> str:
        return f"<Caller {self.book!r}>"


def _tell(call: Call, reply: Reply | None) -> None:
    """One listener must not keep the others, or the timer, from going on."""
    attempt(_LISTENER, call.on_done, reply, by_a_stranger=True)


def _ignore(_address: Address) -> None:
    """Nobody wants to know."""
