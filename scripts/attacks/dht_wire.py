"""The DHT as an attacker speaks it: a UDP socket of its own, any bytes, any sender id, records signed or not."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from p2pmoe.errors import DecodeError
from p2pmoe.identity import Identity
from p2pmoe.protocol.datagrams import (
    Find,
    Found,
    Message,
    Ping,
    Pong,
    Status,
    Store,
    Stored,
    decode_datagram,
    encode_datagram,
)
from p2pmoe.protocol.records import Record, sign_record

ANSWER_S = 0.6
SILENCE_S = 0.25


class Udp(asyncio.DatagramProtocol):
    """One socket, connected to nobody. Use as `async with`; replies are counted and matched by id."""

    def __init__(self, node: tuple[str, int], header: bytes, sent: Counter[str], dice: random.Random) -> None:
        self.node, self.header, self.dice = node, header, dice
        self._sent = sent
        self.received: list[tuple[bytes, Message | None]] = []
        self.bytes_out = self.bytes_in = 0
        self.on_message: Callable[[Message], Message | bytes | None] | None = None
        """What answers the node's own requests; nobody does by default."""
        self._waiting: dict[bytes, asyncio.Future[Message]] = {}

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        local = ("::1" if ":" in self.node[0] else "127.0.0.1") if self.node[0] in {"127.0.0.1", "::1"} else None
        await loop.create_datagram_endpoint(
            lambda: self,
            local_addr=(local, 0) if local else (("::", 0) if ":" in self.node[0] else ("0.0.0.0", 0)),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.transport.close()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.bytes_in += len(data)
        try:
            message = decode_datagram(self.header, data)
        except DecodeError:
            message = None
        self.received.append((data, message))
        if message is None:
            return
        waiting = self._waiting.pop(message.id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
        elif self.on_message is not None and (answer := self.on_message(message)) is not None:
            self.send(answer)

    def send(self, message: Message | bytes) -> int:
        """Send, and give the size."""
        data = message if isinstance(message, bytes) else encode_datagram(self.header, message)
        self._sent["datagrams"] += 1
        self._sent["bytes"] += len(data)
        self.bytes_out += len(data)
        self.transport.sendto(data, self.node)
        return len(data)

    async def ask(self, message: Message, within_s: float = ANSWER_S) -> Message | None:
        """Send a request and wait for its reply; None: silence."""
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[message.id] = answer
        self.send(message)
        try:
            return await asyncio.wait_for(answer, within_s)
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(message.id, None)

    async def silence_or_reply(self, within_s: float = SILENCE_S) -> str:
        """Whether anything has come back: "no reply", or what it was."""
        before = len(self.received)
        await asyncio.sleep(within_s)
        new = self.received[before:]
        return "no reply" if not new else f"{type(new[0][1]).__name__} of {len(new[0][0])} B"

    async def ping(self, sender: bytes = b"", padding: int = 16) -> Pong | None:
        reply = await self.ask(Ping(secrets.token_bytes(8), sender, bytes(padding)))
        return reply if isinstance(reply, Pong) else None

    async def find(self, key: bytes, token: bytes = b"", *, sender: bytes = b"", padding: int = 344) -> Found | None:
        reply = await self.ask(Find(secrets.token_bytes(8), sender, token, key, 8, bytes(padding)))
        return reply if isinstance(reply, Found) else None

    async def token(self) -> bytes:
        """A write token of our own address. Raises TimeoutError when the node is silent."""
        for _ in range(3):
            if (pong := await self.ping()) is not None:
                return pong.token
        raise TimeoutError("the node's DHT does not answer a ping")

    async def store(self, key: bytes, *records: Record | bytes, token: bytes | None = None) -> str:
        """The statuses of a Store by name, joined with "+"; "no reply" when there was none."""
        raws = [each.raw if isinstance(each, Record) else each for each in records]
        if token is None:
            token = await self.token()
        reply = await self.ask(Store(secrets.token_bytes(8), b"", token, key, raws))
        if not isinstance(reply, Stored):
            return "no reply"
        return "+".join(sorted({Status(number).name for number in reply.statuses}))


def fresh_record(
    identity: Identity,
    key: bytes,
    value: bytes = b"attack",
    *,
    part: int = 0,
    sequence: int | None = None,
    expires_in_s: float = 20.0,
) -> Record:
    """A record of the attacker's own. It lives shortly, so that a real node is rid of it soon."""
    now = time.time()
    return sign_record(
        identity,
        key,
        value,
        part=part,
        sequence=int(now * 1e6) if sequence is None else sequence,
        expires_at_ms=int((now + expires_in_s) * 1000),
    )
