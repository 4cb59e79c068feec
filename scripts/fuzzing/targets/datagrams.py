"""The DHT's whole receiving path on a fake socket, with a look-up under way, whose answers the bytes may forge.

An input is `u8 source | u16 length | datagram`, again and again. In it two texts of 8 bytes stand for what a sender
cannot know beforehand: `*token**` for the write token of its address, `*callNNN` for the id of our NNNth call to it.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from typing import Any, Final

from fuzzing.mutate import join_datagrams, split_datagrams
from fuzzing.target import MIB, Target
from fuzzing.targets.kit_loop import StepLoop
from fuzzing.targets.records import KEY, NOW, record_of
from p2pmoe.dht.calls import MAX_OUTSTANDING, MAX_QUEUED
from p2pmoe.dht.server import SwarmServer
from p2pmoe.dht.store import digest_of
from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import NODE_ID_BYTES
from p2pmoe.protocol import datagrams as d

SWARM_ID: Final = "fuzz"
HEADER: Final = d.header_of(SWARM_ID)
TOKEN: Final = b"*token**"
OWN_ID: Final = bytes(range(NODE_ID_BYTES))
SOURCES: Final[tuple[tuple[Any, ...], ...]] = (
    ("192.0.2.1", 4001), ("192.0.2.2", 4002), ("198.51.100.3", 4003), ("203.0.113.4", 4004),
    ("127.0.0.1", 4005), ("10.0.0.6", 4006), ("2001:db8::7", 4007, 0, 0), ("::ffff:192.0.2.8", 4008, 0, 0),
    ("fe80::9%eth0", 4009, 0, 2), ("0.0.0.0", 4010), ("255.255.255.255", 65535), ("192.0.2.1", 0),
)  # fmt: skip
KNOWN: Final = 4
"""So many sources are contacts in the table, and are asked."""

_loop = StepLoop()


class FakeSocket:
    """Takes everything and gives nothing."""

    family = socket.AF_INET6
    sent_bytes = 0

    def getsockname(self) -> tuple[str, int, int, int]:
        return "::", 4000, 0, 0

    def getsockopt(self, _level: int, _option: int) -> int:
        return 0

    def recvfrom(self, _size: int) -> tuple[bytes, Any]:
        raise BlockingIOError(errno.EAGAIN, "nothing waits")

    def sendto(self, datagram: bytes, _address: Any) -> int:
        if len(datagram) > d.MAX_DATAGRAM_BYTES:
            raise AssertionError(f"a datagram of {len(datagram)} bytes was sent")
        self.sent_bytes += len(datagram)
        return len(datagram)


def receive(data: bytes) -> str:
    """Datagrams at a node that is looking something up; afterwards it still answers an honest ping."""
    return _loop.run(_receive(data))


async def _receive(data: bytes) -> str:
    server = SwarmServer(OWN_ID, SWARM_ID, clock=lambda: NOW)
    server.protocol = protocol = server._create_protocol(FakeSocket())
    for index in range(KNOWN):
        server.table.heard_from(d.Contact(_id(index), *SOURCES[index]), asyncio.get_running_loop().time())
    reading = asyncio.create_task(server.get(KEY))
    joining = asyncio.create_task(server.bootstrap([SOURCES[4]]))
    await asyncio.sleep(0)
    try:
        for number, datagram in split_datagrams(data)[:64]:
            source = SOURCES[number % len(SOURCES)]
            protocol.datagram_received(_filled(datagram, server, source), source)
            await asyncio.sleep(0)
        _check(server)
        counters = protocol.counters
        return f"{counters.malformed > 0} {min(counters.datagrams_out, 24)} {len(server.storage)} {len(server.table)}"
    finally:
        reading.cancel()
        joining.cancel()
        ended = await asyncio.gather(reading, joining, return_exceptions=True)
        await server.close()
        for each in ended:
            if isinstance(each, Exception) and not isinstance(each, P2PMoEError):
                raise each


def _check(server: SwarmServer) -> None:
    """The node is alive, and what it keeps is bounded."""
    protocol, before = server.protocol, server.protocol.counters.datagrams_out
    ping = d.encode_datagram(HEADER, d.Ping(b"honest!!", b"", bytes(16)))
    protocol.datagram_received(ping, ("192.0.2.99", 4099))
    if protocol.counters.datagrams_out != before + 1:
        raise AssertionError("an honest ping is not answered any more")
    if len(server.table) > 64 or len(protocol.book) > MAX_QUEUED + MAX_OUTSTANDING or len(server.storage) > 16:
        raise AssertionError(f"{server!r} keeps too much")
    for contact in server.table:
        family, bare = socket.AF_INET6 if ":" in contact.ip else socket.AF_INET, contact.ip.partition("%")[0]
        if not d.is_sendable(socket.inet_pton(family, bare)):
            raise AssertionError(f"{contact!r} was entered")


def _filled(datagram: bytes, server: SwarmServer, source: tuple[Any, ...]) -> bytes:
    from p2pmoe.dht.datagram_socket import plain_address

    address, protocol = plain_address(source), server.protocol
    if TOKEN in datagram:
        now = asyncio.get_running_loop().time()
        answer = protocol._answers.to(d.Ping(b"tokenask", b""), address, 64, now, NOW)
        datagram = datagram.replace(TOKEN, answer.reply.token)
    calls = [call.request.id for call in protocol.book._outstanding.values() if call.address == address]

    def id_of(match: re.Match[bytes]) -> bytes:
        number = int(match[1])
        return calls[number] if number < len(calls) else match[0]

    return re.sub(rb"\*call([0-9]{3})", id_of, datagram)


def _id(index: int) -> bytes:
    return bytes([index * 16 + 1]) * NODE_ID_BYTES


def seeds() -> dict[str, bytes]:
    records = [record_of(b"value"), record_of(b"more", part=1)]
    raws = [record.raw for record in records]
    sender, call_id, empty = _id(5), b"*call000", b""
    v4, v6 = d.pack_contacts([d.Contact(_id(9), "192.0.2.50", 50), d.Contact(_id(10), "2001:db8::5", 51)])
    found = [d.Found(call_id, _id(index), b"theirs!!", v4, v6, digest_of(records), 1, raws) for index in range(KNOWN)]
    paged = d.Found(call_id, _id(0), b"theirs!!", b"", b"", digest_of(records), 2, raws[:1])
    said = {
        "ping": [(5, d.Ping(b"12345678", sender, bytes(16)))],
        "find": [(5, d.Find(b"12345678", sender, TOKEN, KEY, 12))],
        "find-unproven": [(5, d.Find(b"12345678", empty, empty, KEY, 12, bytes(330)))],
        "store-and-read": [
            (1, d.Store(b"12345678", _id(1), TOKEN, KEY, raws)),
            (1, d.Find(b"12345679", _id(1), TOKEN, KEY, 2)),
            (1, d.Page(b"12345670", _id(1), TOKEN, KEY, 0)),
        ],
        "found": list(enumerate(found)),
        "pages": [
            (0, paged),
            (0, d.Paged(call_id, _id(0), b"theirs!!", digest_of(records), 2, raws[1:])),
        ],
        "pong": [(4, d.Pong(call_id, _id(4), b"theirs!!", d.pack_address("198.51.100.9", 9), int(NOW * 1000)))],
        "stored": [(0, d.Stored(call_id, _id(0), b"theirs!!", bytes(2)))],
        "joined-v6": [(6, d.Ping(b"12345678", _id(6))), (6, d.Pong(call_id, _id(6), empty, empty, 0))],
    }
    return {
        name: join_datagrams([(source, d.encode_datagram(HEADER, each)) for source, each in messages])
        for name, messages in said.items()
    }


TARGETS: Final = (
    Target("datagrams", receive, (), MIB, seeds, mutate="datagrams", max_input_bytes=16 * d.MAX_DATAGRAM_BYTES),
)
