"""What must leave a node as it was: 100,000 fuzzed datagrams, and its own loop standing still for half a second."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from typing import Any

import msgspec

from benchmarks.dht_crowd import CONFIG, SWARM_ID, Crowd
from p2pmoe.dht.node import DHTNode
from p2pmoe.identity import Identity
from p2pmoe.protocol.datagrams import (
    Contact,
    Find,
    Found,
    Page,
    Paged,
    Ping,
    Pong,
    Store,
    Stored,
    encode_datagram,
    header_of,
)
from p2pmoe.types import format_host_port

FUZZED = 100_000
STALL_S = 0.5
STALLS = 8
HEADER = header_of(SWARM_ID)


async def fuzz(seed: int, count: int = FUZZED) -> dict[str, Any]:
    """Noise, damaged messages and well-formed nonsense, at a node that has to work meanwhile."""
    crowd = await Crowd.of(8, seed=seed)
    victim = crowd.nodes[0]
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    dice, begin = random.Random(seed), time.perf_counter()
    before = victim.server.protocol.counters.datagrams_in
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mallory:
        for number in range(count):
            mallory.sendto(_fuzzed(dice), victim.address)
            if number % 32 == 0:
                await asyncio.sleep(0)
    await asyncio.sleep(0.2)
    took_s = time.perf_counter() - begin
    taken = victim.server.protocol.counters.datagrams_in - before
    await crowd.nodes[1].put("after.", [b"value"])
    figures = {
        "datagrams": count,
        "received": taken,
        "loop_errors": len(errors),
        "transport_alive": int(not victim.server.transport.is_closing()),
        "still_finds": len(await victim.get("after.")),
        "microseconds_each": round(1e6 * took_s / count, 1),
    }
    await crowd.close()
    asyncio.get_running_loop().set_exception_handler(None)
    return figures


def _fuzzed(dice: random.Random) -> bytes:
    kind = dice.randrange(4)
    if kind == 0:
        return dice.randbytes(dice.randrange(1, 1400))
    if kind == 1:
        return HEADER + msgspec.msgpack.encode(_nonsense(dice, 3))
    datagram = bytearray(encode_datagram(HEADER, _message(dice)))
    if kind == 2:
        for _ in range(dice.randrange(1, 8)):
            datagram[dice.randrange(len(datagram))] = dice.randrange(256)
        return bytes(datagram[: dice.randrange(1, len(datagram) + 1)])
    return bytes(datagram)


def _nonsense(dice: random.Random, depth: int) -> Any:
    kind = dice.randrange(7 if depth else 5)
    if kind == 5:
        return [dice.choice((0, 1, 2, 3, 16, 17, 18, 19, 99)), *(_nonsense(dice, depth - 1) for _ in range(6))]
    if kind == 6:
        return {str(number): _nonsense(dice, depth - 1) for number in range(3)}
    return (None, dice.randrange(-(2**31), 2**63), dice.randbytes(8), dice.randbytes(20), "zz")[kind]


def _message(dice: random.Random) -> Any:
    call_id, key, sender = dice.randbytes(8), dice.randbytes(20), dice.choice((b"", dice.randbytes(20)))
    contacts = b"".join(dice.randbytes(26) for _ in range(dice.randrange(8)))
    records = [dice.randbytes(dice.randrange(200)) for _ in range(dice.randrange(4))]
    return dice.choice(
        (
            Ping(call_id, sender, bytes(16)),
            Find(call_id, sender, b"", key, dice.randrange(33), bytes(dice.randrange(400))),
            Page(call_id, sender, dice.randbytes(8), key, dice.randrange(65536)),
            Store(call_id, sender, dice.randbytes(8), key, records),
            Pong(call_id, sender, b"", dice.randbytes(6), 0),
            Found(call_id, sender, b"", contacts, b"", dice.randbytes(8), 65535, records),
            Paged(call_id, sender, b"", dice.randbytes(8), 3, records),
            Stored(call_id, sender, b"", dice.randbytes(5)),
        )
    )


async def stall(nodes: int, seed: int) -> dict[str, Any]:
    """A node on a thread of its own stands still with requests under way, while the others answer it."""
    crowd = await Crowd.of(nodes, seed=seed)
    config = msgspec.structs.replace(CONFIG, initial_peers=(format_host_port(*crowd.nodes[0].address),))
    evicted = misses = 0
    async with DHTNode(Identity.from_seed(bytes(32)), config) as victim:
        table = victim.server.table
        for _ in range(STALLS):
            before = {contact.id for contact in table}
            pings = [
                asyncio.create_task(victim.call(lambda c=c: victim.server.protocol.call_ping(c.contact))) for c in table
            ]
            gets = [asyncio.create_task(victim.get(f"nothing{number}.")) for number in range(8)]
            await asyncio.sleep(0.001)
            await victim.call(_stand_still)
            await asyncio.gather(*pings, *gets)
            evicted += len(before - {contact.id for contact in table})
            misses += sum(contact.misses for contact in table)
    await crowd.close()
    return {
        "nodes": nodes,
        "stall_s": STALL_S,
        "stalls": STALLS,
        "contacts": len(before),
        "contacts_evicted": evicted,
        "missed_requests": misses,
    }


async def _ping(node: DHTNode, contact: Contact) -> None:
    await node.server.protocol.call_ping(contact)


async def _stand_still() -> None:
    time.sleep(STALL_S)  # noqa: ASYNC251 - that is what is tested
