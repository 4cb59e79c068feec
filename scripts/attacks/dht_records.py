"""Records that are forged, stolen, moved, stale or too many. A signer writes its own slots, now, under its key."""

from __future__ import annotations

import time

import msgspec

from attacks.context import Context
from attacks.dht_wire import Udp, fresh_record
from attacks.registry import attack
from p2pmoe.experts.uid import parse_uid
from p2pmoe.protocol.records import Record, decode_record


async def _stolen(ctx: Context, udp: Udp) -> tuple[bytes, Record]:
    """The node's own record under the prefix of an expert, read like anybody reads it."""
    key = ctx.key(parse_uid(ctx.uids["victim"]).prefix)
    found = await udp.find(key, await udp.token())
    for raw in found.records if found else ():
        record = decode_record(raw)
        if record.public_key == ctx.public_key:
            return key, record
    raise OSError("the node's own record is not in its first page")


def _newest() -> int:
    """A sequence above that of any record which the node may sign meanwhile, and not too far ahead."""
    return int((time.time() + 10.0) * 1e6)


def _changed(record: Record, **changes: object) -> bytes:
    """The record's bytes with fields replaced and the signature as it was."""
    fields = ["version", "part", "value", "sequence", "expires_at", "public_key", "signature"]
    values = msgspec.msgpack.decode(record.raw)
    for name, value in changes.items():
        values[fields.index(name)] = value
    return msgspec.msgpack.encode(values)


@attack("dht_store_without_token", expects="BAD_TOKEN")
async def store_without_token(ctx: Context) -> str:
    """A store with no token, as from a forged address."""
    async with ctx.udp() as udp:
        key = ctx.near_key()
        return await udp.store(key, fresh_record(ctx.identity(), key), token=b"")


@attack("dht_store_foreign_token", expects="BAD_TOKEN")
async def store_foreign_token(ctx: Context) -> str:
    """A store with the token that another address was given."""
    async with ctx.udp() as other, ctx.udp() as udp:
        key = ctx.near_key()
        return await udp.store(key, fresh_record(ctx.identity(), key), token=await other.token())


@attack("dht_token_guessing", expects="BAD_TOKEN", once=True)
async def token_guessing(ctx: Context) -> str:
    """Tokens at random, 500 a second."""
    async with ctx.udp() as udp:
        key = ctx.near_key()
        record = fresh_record(ctx.identity(), key)
        seen = ""
        async for _ in ctx.paced(500, burst=5):
            seen = await udp.store(key, record, token=ctx.dice.randbytes(8))
            if seen != "BAD_TOKEN":
                break
        return seen


@attack("dht_forged_signature", expects="BAD_SIGNATURE")
async def forged_signature(ctx: Context) -> str:
    """A record in the node's name, signed by nobody."""
    async with ctx.udp() as udp:
        key, record = await _stolen(ctx, udp)
        forged = _changed(record, sequence=_newest(), signature=ctx.dice.randbytes(64))
        return await udp.store(key, forged)


@attack("dht_theft_new_value", expects="BAD_SIGNATURE")
async def theft_new_value(ctx: Context) -> str:
    """The node's record with another endpoint in it: all its callers would come to us."""
    async with ctx.udp() as udp:
        key, record = await _stolen(ctx, udp)
        return await udp.store(key, _changed(record, value=b"http://mallory", sequence=_newest()))


@attack("dht_theft_own_signature", expects="BAD_SIGNATURE")
async def theft_own_signature(ctx: Context) -> str:
    """The node's public key over our signature."""
    async with ctx.udp() as udp:
        key, record = await _stolen(ctx, udp)
        own = fresh_record(ctx.identity(), key, record.value, part=record.part, sequence=_newest())
        return await udp.store(key, _changed(own, public_key=ctx.public_key))


@attack("dht_moved_record", expects="BAD_SIGNATURE")
async def moved_record(ctx: Context) -> str:
    """The node's record under another key, where it never announced anything."""
    async with ctx.udp() as udp:
        _, record = await _stolen(ctx, udp)
        return await udp.store(ctx.near_key(), record.raw)


@attack("dht_moved_part", expects="BAD_SIGNATURE")
async def moved_part(ctx: Context) -> str:
    """The node's record as another of its parts."""
    async with ctx.udp() as udp:
        key, record = await _stolen(ctx, udp)
        return await udp.store(key, _changed(record, part=(record.part + 1) % 8))


@attack("dht_extended_life", expects="BAD_SIGNATURE")
async def extended_life(ctx: Context) -> str:
    """The node's record made to live longer than it said."""
    async with ctx.udp() as udp:
        key, record = await _stolen(ctx, udp)
        longer = _changed(record, expires_at=record.expires_at_ms + 600_000, sequence=_newest())
        return await udp.store(key, longer)


@attack("dht_rollback", expects="STALE")
async def rollback(ctx: Context) -> str:
    """An older record of a signer after its newer one: a withdrawal undone."""
    async with ctx.udp() as udp:
        key, identity = ctx.near_key(), ctx.identity()
        older = fresh_record(identity, key, b"old")
        newer = fresh_record(identity, key, b"new", sequence=older.sequence + 1)
        if (status := await udp.store(key, newer)) != "STORED":
            return f"{status} for the right record"
        return await udp.store(key, older)


@attack("dht_equal_sequence", expects="STALE")
async def equal_sequence(ctx: Context) -> str:
    """Two records of one sequence, to make holders disagree."""
    async with ctx.udp() as udp:
        key, identity = ctx.near_key(), ctx.identity()
        one = fresh_record(identity, key, b"one")
        if (status := await udp.store(key, one)) != "STORED":
            return f"{status} for the right record"
        return await udp.store(key, fresh_record(identity, key, b"two", sequence=one.sequence))


@attack("dht_expired_record", expects="EXPIRED")
async def expired_record(ctx: Context) -> str:
    """A record whose time is over."""
    async with ctx.udp() as udp:
        key = ctx.near_key()
        return await udp.store(key, fresh_record(ctx.identity(), key, expires_in_s=-1))


@attack("dht_immortal_record", expects="EXPIRED")
async def immortal_record(ctx: Context) -> str:
    """Records that would live for a day, or until the year 292278994."""
    async with ctx.udp() as udp:
        key = ctx.near_key()
        life_s = ctx.dice.choice((86_400.0, 3_700.0, 9e15))
        return await udp.store(key, fresh_record(ctx.identity(), key, expires_in_s=life_s))


@attack("dht_future_sequence", expects="STALE")
async def future_sequence(ctx: Context) -> str:
    """A sequence that nobody could ever go beyond."""
    async with ctx.udp() as udp:
        key = ctx.near_key()
        return await udp.store(key, fresh_record(ctx.identity(), key, sequence=2**63 - 1))


@attack("dht_malformed_records", expects="MALFORMED")
async def malformed_records(ctx: Context) -> str:
    """Part 8, part -1, version 2, a value of 1,000 bytes, types that are wrong, bytes that follow, another spelling."""
    async with ctx.udp() as udp:
        key = ctx.near_key()
        good = fresh_record(ctx.identity(), key, b"v" * 40)
        bad = ctx.dice.choice(
            (
                _changed(good, part=8),
                _changed(good, part=-1),
                _changed(good, version=2),
                _changed(good, value="text"),
                _changed(good, sequence=-5),
                _changed(good, expires_at=1.5),
                _changed(good, public_key=b"short"),
                good.raw + b"\0",
                b"\xdc\x00\x07" + good.raw[1:],
                ctx.dice.randbytes(200),
                b"\xdd\xff\xff\xff\xff",
                b"\x91" * 500,
            )
        )
        return await udp.store(key, bad)


@attack("dht_low_order_key", expects="BAD_SIGNATURE")
async def low_order_key(ctx: Context) -> str:
    """Public keys of small order, for which a signature of zeros may verify."""
    weak = (
        bytes(32),
        b"\1" + bytes(31),
        bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    )
    async with ctx.udp() as udp:
        key = ctx.near_key()
        good = fresh_record(ctx.identity(), key)
        signature = ctx.dice.choice((bytes(64), b"\1" + bytes(63)))
        return await udp.store(key, _changed(good, public_key=ctx.dice.choice(weak), signature=signature))


@attack("dht_sybil_crowding", expects="the node's record stays", once=True, limit_s=30)
async def sybil_crowding(ctx: Context) -> str:
    """1,200 made-up signers crowd the key of the node's experts, from one address, past the cap of 1,024 slots."""
    async with ctx.udp() as udp:
        key, _ = await _stolen(ctx, udp)
        token, statuses = await udp.token(), set()
        for _ in range(240):
            records = [fresh_record(ctx.identity(), key, b"", expires_in_s=4) for _ in range(5)]
            statuses.add(await udp.store(key, *records, token=token))
        ctx.sent["records"] += 1200
        ctx.notes["statuses"] = sorted(statuses)
        return await _node_still_listed(ctx, udp, key)


async def _node_still_listed(ctx: Context, udp: Udp, key: bytes) -> str:
    from p2pmoe.protocol.datagrams import Page, Paged

    token = await udp.token()
    found = await udp.find(key, token)
    if found is None:
        return "no reply"
    raws = list(found.records)
    for index in range(1, found.pages):
        reply = await udp.ask(Page(ctx.dice.randbytes(8), b"", token, key, index))
        raws += reply.records if isinstance(reply, Paged) else []
    ctx.notes |= {"records": len(raws), "pages": found.pages}
    signers = {decode_record(raw).public_key for raw in raws}
    return "the node's record stays" if ctx.public_key in signers else "the node is crowded out"
