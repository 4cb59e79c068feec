"""DHT nodes for tests: they know their own name and can sign."""

from __future__ import annotations

import asyncio
import hashlib
import time

from p2pmoe.dht.addresses import bind
from p2pmoe.dht.server import SwarmServer
from p2pmoe.identity import Identity
from p2pmoe.protocol.datagrams import (
    Contact,
    Found,
    Paged,
    Ping,
    Pong,
    Stored,
    decode_datagram,
    encode_datagram,
    header_of,
)
from p2pmoe.protocol.records import Record, sign_record

SWARM_ID = "test"
HEADER = header_of(SWARM_ID)


class Peer(SwarmServer):
    """A node that knows its own name and can sign."""

    identity: Identity
    address: tuple[str, int]

    def record(self, key: bytes, value: bytes = b"value", *, part: int = 0, ttl_s: float = 60, sequence=None) -> Record:
        now = self.clock()
        return sign_record(
            self.identity,
            key,
            value,
            part=part,
            sequence=int(now * 1e6) if sequence is None else sequence,
            expires_at_ms=int((now + ttl_s) * 1000),
        )


def identity_of(name: str) -> Identity:
    return Identity.from_seed(hashlib.sha256(name.encode()).digest())


async def open_peer(name: str, *, clock=time.time, host: str = "127.0.0.1", **options) -> Peer:
    identity = identity_of(name)
    peer = Peer(identity.node_id, SWARM_ID, clock=clock, **options)
    peer.identity = identity
    sock = bind(host, 0)
    peer.address = sock.getsockname()[:2]
    await peer.open(sock)
    return peer


class Stranger:
    """A bare UDP socket that speaks whatever it is told to. `answer(message, address)` makes its replies."""

    def __init__(self, name: str = "mallory", answer=None) -> None:
        self.identity = identity_of(name)
        self.sock = bind("127.0.0.1", 0)
        self.sock.setblocking(False)
        self.address = self.sock.getsockname()[:2]
        self.contact = Contact(self.identity.node_id, *self.address)
        self.answer = answer
        self.heard: list = []
        asyncio.get_running_loop().add_reader(self.sock, self._read)
        self._inbox: asyncio.Queue = asyncio.Queue()

    def send(self, message, address) -> int:
        datagram = message if isinstance(message, bytes) else encode_datagram(HEADER, message)
        return self.sock.sendto(datagram, address)

    async def receive(self, timeout_s: float = 2.0):
        """The next message and its size."""
        async with asyncio.timeout(timeout_s):
            return await self._inbox.get()

    async def ask(self, message, address):
        self.send(message, address)
        return (await self.receive())[0]

    async def token_from(self, peer: Peer) -> bytes:
        reply = await self.ask(Ping(b"tokenask", b"", bytes(16)), peer.address)
        return reply.token

    async def silence(self, peer: Peer) -> None:
        """Returns once the peer has dealt with all that was sent before; fails if it answered any of it."""
        pong = await self.ask(Ping(b"done yet", b""), peer.address)
        assert pong.id == b"done yet", pong

    def _read(self) -> None:
        data, address = self.sock.recvfrom(65_536)
        message = decode_datagram(HEADER, data)
        self.heard.append(message)
        if self.answer is not None and not isinstance(message, Pong | Found | Paged | Stored):
            replies = self.answer(message, address)
            for reply in replies if isinstance(replies, list) else [replies]:
                if reply is not None:
                    self.send(reply, address)
            return
        self._inbox.put_nowait((message, len(data)))

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.sock)
        self.sock.close()


async def until(condition, timeout_s: float = 5.0) -> None:
    """Let the loop turn until the condition holds; fails when it takes too long."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0)


async def settle(peer: Peer) -> None:
    """Let the peer's verify-pings and their answers pass."""
    await until(lambda: not peer.protocol.book and not peer.protocol._verifying)
