"""Datagrams in, datagrams out: the DHT's RPCs on a UDP socket. What a record is worth is decided elsewhere.

Takes the place of rpcudp's transport below kademlia's `KademliaProtocol`: an explicit table of messages, replies
bound to id, address and kind, retransmissions, budgets. Nothing a stranger sends raises out of `datagram_received`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from kademlia.protocol import KademliaProtocol

from p2pmoe.dht.answers import Answers
from p2pmoe.dht.caller import MAX_DRAIN, Caller
from p2pmoe.dht.contacts import ContactTable
from p2pmoe.dht.datagram_socket import DatagramSocket, plain_address
from p2pmoe.dht.requests import ping_message, store_message
from p2pmoe.dht.sealing import Sealer
from p2pmoe.dht.store import RecordStore
from p2pmoe.dht.tokens import SourceBudgets, source_of
from p2pmoe.dht.validation import RecordTrust
from p2pmoe.errors import DecodeError
from p2pmoe.faults import unexpected
from p2pmoe.protocol.datagrams import (
    PLAIN,
    SEALED,
    Address,
    Contact,
    Found,
    Paged,
    Pong,
    Proof,
    Prove,
    Request,
    Status,
    Stored,
    contact_of,
    decode_datagram,
    encode_datagram,
    is_link_local,
    sender_at,
    unpack_contacts,
)

MAX_VERIFY_PINGS: Final = 16
MIN_COST_BYTES: Final = 200


@dataclass(slots=True)
class Counters:
    """What passed through the socket."""

    datagrams_in: int = 0
    datagrams_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    malformed: int = 0
    unopened: int = 0
    """Not sealed with our swarm key, or seen before."""
    over_budget: int = 0
    records_refused: int = 0


class DatagramProtocol(KademliaProtocol):  # type: ignore[misc]
    """The RPCs of one node. `sock` is the socket under the transport, read directly to drain it."""

    def __init__(
        self,
        *,
        own_id: bytes,
        header: bytes,
        table: ContactTable,
        store: RecordStore,
        trust: RecordTrust,
        budgets: SourceBudgets,
        clock: Callable[[], float],
        sock: socket.socket,
        client_mode: bool = False,
        sealer: Sealer | None = None,
        announce_port: int | None = None,
        prove: Callable[[bytes], bytes] | None = None,
    ) -> None:
        super().__init__(table.node, store, table.ksize)
        self.router = table
        self.table = table
        self.store: RecordStore = store
        self.trust = trust
        self.counters = Counters()
        self.client_mode = client_mode
        self._socket = DatagramSocket(sock)
        self.transmit: Callable[[bytes, Address], None] = self._socket.send
        """What sends; tests put a bad line in its place."""
        self.caller = Caller(
            sender=b"" if client_mode else sender_at(own_id, announce_port),
            header=header,
            table=table,
            send=self._send,
            drain=self._drain,
        )
        self.book = self.caller.book
        self.call = self.caller.call
        self.ask = self.caller.ask
        self._header = header
        self.budgets = budgets
        self._sealer = sealer
        self._answers = Answers(own_id, table, store, trust, SEALED if sealer else PLAIN, prove)
        self.on_foreign: Callable[[Address, bytes], None] | None = None
        """Told where a datagram came from that is of another swarm or version, and how it begins."""
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._verifying: set[Address] = set()
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        # rpcudp makes an RPC of every unknown name; here a typo is an error.
        raise AttributeError(name)

    # --- the socket -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.close()

    def error_received(self, exc: Exception) -> None:
        """An ICMP error of some datagram; its call times out by itself."""

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._receive(data, addr)
        self._drain()

    def _drain(self) -> int:
        """Read what waits in the socket now: asyncio reads one datagram per turn of the loop."""
        count = 0
        for data, addr in self._socket.waiting(MAX_DRAIN):
            count += 1
            self._receive(data, addr)
            if self._closed:
                break
        return count

    def _receive(self, data: bytes, addr: tuple[Any, ...]) -> None:
        try:
            self._take(data, addr)
        except Exception as error:  # noqa: BLE001 - one datagram must not keep us from reading the others
            self.counters.malformed += 1
            unexpected("taking in a datagram", error, by_a_stranger=True)

    def _take(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self.counters.datagrams_in += 1
        self.counters.bytes_in += len(data)
        address = plain_address(addr)
        datagram = self._sealer.open(data) if self._sealer else data
        if datagram is None:
            self.counters.unopened += 1
            self.budgets.charge(source_of(address), _cost(len(data)), self._loop.time())
            return
        try:
            message = decode_datagram(self._header, datagram)
        except DecodeError:
            self.counters.malformed += 1
            self.budgets.charge(source_of(address), _cost(len(data)), self._loop.time())
            if self.on_foreign is not None and not datagram.startswith(self._header):
                self.on_foreign(address, datagram[: len(self._header)])
            return
        if isinstance(message, Pong | Found | Paged | Stored | Proof):
            if not self.caller.take_reply(message, address):
                self.counters.malformed += 1
        elif not self.client_mode:
            self._take_request(message, address, len(datagram))

    def _send(self, datagram: bytes, address: Address) -> None:
        if self._closed:
            return
        if self._sealer is not None:
            datagram = self._sealer.seal(datagram)
        self.counters.datagrams_out += 1
        self.counters.bytes_out += len(datagram)
        self.transmit(datagram, address)

    def close(self) -> None:
        """Fail what is under way; send nothing more."""
        self._closed = True
        self.caller.close()

    # --- requests of ours -------------------------------------------------------------------------------------

    def now(self) -> float:
        """The time that records are judged by, in seconds since 1970."""
        return self._clock()

    async def call_ping(self, node_to_ask: Contact | Address) -> Pong | None:
        """Ask whether somebody is there. The padding lets the answer carry our address."""
        reply = await self.ask(node_to_ask, ping_message)
        return reply if isinstance(reply, Pong) else None

    async def call_store(self, node_to_ask: Contact, key: bytes, value: list[bytes]) -> list[Status]:
        """Hand records (raw bytes, together at most one page) to a holder; their statuses, empty when it is silent."""
        for _ in range(2):  # a token that has just been rotated away is replaced by the answer
            reply = await self.ask(node_to_ask, store_message(key, value))
            if not isinstance(reply, Stored) or len(reply.statuses) != len(value):
                return []
            statuses = [_status(number) for number in reply.statuses]
            if Status.BAD_TOKEN not in statuses:
                break
        return statuses

    # --- requests of others -----------------------------------------------------------------------------------

    def _take_request(self, request: Request, address: Address, size: int) -> None:
        now = self._loop.time()
        source = source_of(address)
        if not self.budgets.spend(source, _cost(size), now):
            self.counters.over_budget += 1
            return
        if self.caller.came_back(request) and isinstance(request, Prove):
            return  # our own question, sent to us or passed on by somebody: our answer would prove nothing
        answer = self._answers.to(request, address, size, now, self._clock())
        self.counters.records_refused += answer.refused
        datagram = encode_datagram(self._header, answer.reply)
        self.budgets.charge(source, len(datagram) + answer.cost_bytes, now)
        self._send(datagram, address)
        if (contact := contact_of(request, address)) is not None:
            self._verify(contact)

    def _verify(self, contact: Contact) -> None:
        """Ping a stranger that asked us something; it enters the table when it answers."""
        if len(self._verifying) >= MAX_VERIFY_PINGS or contact.address in self._verifying:
            return
        if not self.table.wants(contact) or not self.may_send_to(contact, contact.host):
            return
        self._verifying.add(contact.address)
        self.call(contact, ping_message, lambda _: self._verifying.discard(contact.address))

    def may_send_to(self, contact: Contact, told_by: str) -> bool:
        """False for an address that nobody at `told_by` can reach."""
        return self._socket.may_send_to(contact.host, told_by)

    def contacts_in(self, reply: Found, told_by: str) -> list[Contact]:
        """The contacts of a reply that may be asked."""
        try:
            contacts = unpack_contacts(reply.v4, reply.v6)
        except DecodeError:
            self.counters.malformed += 1
            return []
        contacts = [on_the_link_of(told_by, contact) for contact in contacts]
        return [contact for contact in contacts if self.may_send_to(contact, told_by)]

    def __repr__(self) -> str:
        return f"<DatagramProtocol {self.book!r}>"


def on_the_link_of(told_by: str, contact: Contact) -> Contact:
    """A link-local address means something on one link: that of whoever told us."""
    scope = told_by.partition("%")[2]
    return contact._replace(host=f"{contact.host}%{scope}") if scope and is_link_local(contact.host) else contact


def _cost(size: int) -> int:
    """What a datagram is charged: a small one takes as much time as one of some hundred bytes."""
    return max(size, MIN_COST_BYTES)


def _status(number: int) -> Status:
    try:
        return Status(number)
    except ValueError:
        return Status.MALFORMED
