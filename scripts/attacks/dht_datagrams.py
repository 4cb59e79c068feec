"""Datagrams that are noise, too large, of another swarm, or ask for more than they cost."""

from __future__ import annotations

import secrets

import msgspec

from attacks.context import Context
from attacks.dht_wire import Udp, fresh_record
from attacks.registry import attack
from p2pmoe.experts.uid import parse_uid
from p2pmoe.protocol.datagrams import (
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


@attack("udp_noise", expects="no reply", once=True)
async def noise(ctx: Context) -> str:
    """Random bytes, 1,000 datagrams a second."""
    async with ctx.udp() as udp:
        async for _ in ctx.paced(1000, burst=10):
            udp.send(ctx.dice.randbytes(ctx.dice.randrange(1, 1400)))
        return await udp.silence_or_reply()


@attack("udp_damaged_messages", expects="no reply", once=True)
async def damaged_messages(ctx: Context) -> str:
    """Replies with flipped bits and cut ends, 1,000 a second."""
    async with ctx.udp() as udp:
        whole = encode_datagram(udp.header, Found(bytes(8), bytes(20), b"", bytes(260), b"", bytes(8), 9, [bytes(90)]))
        async for _ in ctx.paced(1000, burst=10):
            data = bytearray(whole[: ctx.dice.randrange(1, len(whole) + 1)])
            data[ctx.dice.randrange(len(data))] ^= 1 << ctx.dice.randrange(8)
            udp.send(bytes(data))
        return await udp.silence_or_reply()


@attack("udp_empty", expects="no reply", per_s=4)
async def empty(ctx: Context) -> str:
    """Datagrams of no bytes, which some loops take for the end."""
    async with ctx.udp() as udp:
        for _ in range(20):
            udp.send(b"")
        return await udp.silence_or_reply()


@attack("udp_oversized", expects="no reply", per_s=4)
async def oversized(ctx: Context) -> str:
    """Messages that are right but for their length: 1,201 to 60,000 bytes."""
    async with ctx.udp() as udp:
        for size in (1200, 1400, 9000, 60_000):
            udp.send(udp.header + msgspec.msgpack.encode([0, secrets.token_bytes(8), b"", bytes(size)]))
        return await udp.silence_or_reply()


@attack("udp_other_swarm", expects="no reply", per_s=4)
async def other_swarm(ctx: Context) -> str:
    """Messages of another swarm, and of other versions."""
    async with ctx.udp() as udp:
        ping = encode_datagram(b"", Ping(secrets.token_bytes(8), b"", bytes(16)))
        for header in (header_of("another"), b"\0" + udp.header[1:], b"\2" + udp.header[1:], b""):
            udp.send(header + ping)
        return await udp.silence_or_reply()


@attack("udp_msgpack_bombs", expects="no reply", per_s=4)
async def msgpack_bombs(ctx: Context) -> str:
    """Arrays, maps and strings that announce 4 billion items, nesting 1,000 deep, kinds that do not exist."""
    async with ctx.udp() as udp:
        for body in (
            b"\xdd\xff\xff\xff\xff",
            b"\xdf\xff\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
            b"\xdb\xff\xff\xff\xff",
            b"\x94\x00\xc6\xff\xff\xff\xff",
            b"\x91" * 1100,
            b"\x95\x63" + b"\xc4\x08" + bytes(8) + b"\xc4\0" * 3,
            msgspec.msgpack.encode([1, bytes(8), b"", b"", bytes(20), 33, b""]),
            msgspec.msgpack.encode([3, bytes(8), b"", b"", bytes(20), [b""] * 17]),
            msgspec.msgpack.encode([0, bytes(8), bytes(19), b""]),
            msgspec.msgpack.encode([0, bytes(7), b"", b""]),
            msgspec.msgpack.encode([0, bytes(8), b"", b"", "more"]),
        ):
            udp.send(udp.header + body)
        return await udp.silence_or_reply()


def _factor(udp: Udp, sent: int) -> str:
    """How much came back for `sent` bytes, as an attacker with a forged address would aim it at somebody."""
    return "at most 3 times" if udp.bytes_in <= 3 * sent else f"{udp.bytes_in / sent:.1f} times"


@attack("udp_amplify_ping", expects="at most 3 times", per_s=3)
async def amplify_ping(ctx: Context) -> str:
    """The shortest ping there is."""
    async with ctx.udp() as udp:
        sent = udp.send(Ping(secrets.token_bytes(8), b"", b""))
        await udp.silence_or_reply(0.3)
        ctx.notes["factor"] = round(udp.bytes_in / sent, 2)
        return _factor(udp, sent)


@attack("udp_amplify_find", expects="at most 3 times", per_s=3)
async def amplify_find(ctx: Context) -> str:
    """The shortest look-up of a key that holds records, without a token."""
    async with ctx.udp() as udp:
        key = ctx.key(parse_uid(ctx.uids["victim"]).prefix)
        sent = udp.send(Find(secrets.token_bytes(8), b"", b"", key, 32, b""))
        sent += udp.send(Find(secrets.token_bytes(8), b"", ctx.dice.randbytes(8), key, 32, bytes(300)))
        await udp.silence_or_reply(0.3)
        ctx.notes["factor"] = round(udp.bytes_in / sent, 2)
        return _factor(udp, sent)


@attack("udp_amplify_verify", expects="at most 3 times", once=True, limit_s=15)
async def amplify_verify(ctx: Context) -> str:
    """Pings whose made-up senders the node pings back, three times each: all that comes within five seconds."""
    async with ctx.udp() as udp:
        sent = sum(udp.send(Ping(secrets.token_bytes(8), ctx.dice.randbytes(20), b"")) for _ in range(30))
        await udp.silence_or_reply(5.0)
        ctx.notes["factor"] = round(udp.bytes_in / sent, 2)
        return _factor(udp, sent)


@attack("udp_page_without_token", expects="no records")
async def page_without_token(ctx: Context) -> str:
    """Pages of records, without having shown that we receive at our address."""
    async with ctx.udp() as udp:
        key = ctx.key(parse_uid(ctx.uids["victim"]).prefix)
        reply = await udp.ask(Page(secrets.token_bytes(8), b"", ctx.dice.randbytes(8), key, 0))
        return "no records" if not isinstance(reply, Paged) or not reply.records else "records"


@attack("udp_unasked_replies", expects="no reply", per_s=3)
async def unasked_replies(ctx: Context) -> str:
    """Replies that nobody asked for, with contacts, records and the highest clock."""
    async with ctx.udp() as udp:
        contacts = b"".join(ctx.dice.randbytes(26) for _ in range(8))
        sender = ctx.dice.randbytes(20)
        for reply in (
            Pong(ctx.dice.randbytes(8), sender, bytes(8), ctx.dice.randbytes(6), 2**63 - 1),
            Found(ctx.dice.randbytes(8), sender, bytes(8), contacts, b"", bytes(8), 65535, [bytes(100)]),
            Paged(ctx.dice.randbytes(8), sender, bytes(8), bytes(8), 65535, [bytes(100)]),
            Stored(ctx.dice.randbytes(8), sender, bytes(8), bytes(16)),
        ):
            udp.send(reply)
        return await udp.silence_or_reply()


@attack("udp_store_nonsense_batch", expects="MALFORMED", once=True)
async def store_nonsense_batch(ctx: Context) -> str:
    """Sixteen records of noise in every store, 200 stores a second."""
    async with ctx.udp() as udp:
        token, seen = await udp.token(), ""
        async for _ in ctx.paced(200, burst=4):
            seen = await udp.store(ctx.near_key(), *(ctx.dice.randbytes(60) for _ in range(16)), token=token)
            if seen != "MALFORMED":
                break
        return seen


@attack("udp_signature_flood", expects="silence", once=True)
async def signature_flood(ctx: Context) -> str:
    """Wrong signatures, each of which costs a check: the sender's budget pays, then it is ignored."""
    async with ctx.udp() as udp:
        token, key = await udp.token(), ctx.near_key()
        record = fresh_record(ctx.identity(), key)
        flip = len(record.raw) - 1
        answered = 0
        async for turn in ctx.paced(1500, burst=30):
            raws = [
                record.raw[: flip - at]
                + bytes([record.raw[flip - at] ^ (turn % 255 + 1)])
                + record.raw[flip - at + 1 :]
                for at in range(5)
            ]
            udp.send(Store(secrets.token_bytes(8), b"", token, key, raws))
        await udp.silence_or_reply(0.2)
        answered = len(udp.received)
        ctx.notes["answered"] = answered
        late = await udp.ping()
        return "silence" if late is None or answered < ctx.sent["datagrams"] - 100 else f"{answered} answered"
