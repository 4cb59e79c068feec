"""Lying peers: ids that are not theirs, contacts that lead nowhere or inwards, answers from the wrong place."""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from attacks.context import Context
from attacks.dht_wire import Udp
from attacks.registry import attack
from p2pmoe.config import parse_host_port
from p2pmoe.protocol.datagrams import Find, Found, Message, Page, Paged, Ping, Pong, Store, Stored, unpack_contacts


async def _is_contact(ctx: Context, node_id: bytes, port: int | None = None) -> bool:
    """Whether the node tells others of that id (at that port)."""
    async with ctx.udp() as udp:
        found = await udp.find(node_id, await udp.token())
        contacts = unpack_contacts(found.v4, found.v6) if found else []
        return any(each.node_id == node_id and port in {None, each.port} for each in contacts)


@attack("peer_never_answers", expects="not entered", per_s=2)
async def never_answers(ctx: Context) -> str:
    """Thirty made-up ids ask for things and never answer: they must not fill the table."""
    ids = [ctx.dice.randbytes(20) for _ in range(30)]
    async with ctx.udp() as udp:
        for node_id in ids:
            udp.send(Find(secrets.token_bytes(8), node_id, b"", ctx.near_key(), 8, bytes(344)))
        await asyncio.sleep(0.1)
    entered = [node_id for node_id in ids[:3] if await _is_contact(ctx, node_id)]
    return f"{len(entered)} entered" if entered else "not entered"


@attack("peer_answers_from_elsewhere", expects="not entered", per_s=2)
async def answers_from_elsewhere(ctx: Context) -> str:
    """The node's ping goes to one address, the answer comes from another, with the right id."""
    node_id = ctx.dice.randbytes(20)
    async with ctx.udp() as asker, ctx.udp() as other:

        def answer_elsewhere(message: Message) -> None:
            if isinstance(message, Ping):
                other.send(Pong(message.id, node_id, bytes(8), bytes(6), 0))

        asker.on_message = answer_elsewhere
        asker.send(Ping(secrets.token_bytes(8), node_id, bytes(16)))
        await asyncio.sleep(0.15)
        return "entered" if await _is_contact(ctx, node_id) else "not entered"


@attack("peer_wrong_reply_kind", expects="not entered", per_s=2)
async def wrong_reply_kind(ctx: Context) -> str:
    """A ping is answered with another kind of reply, or with a wrong id."""
    node_id = ctx.dice.randbytes(20)
    async with ctx.udp() as udp:

        def answer(message: Message) -> Message | None:
            if not isinstance(message, Ping):
                return None
            udp.send(Pong(secrets.token_bytes(8), node_id, bytes(8), bytes(6), 0))
            return Stored(message.id, node_id, bytes(8), b"")

        udp.on_message = answer
        udp.send(Ping(secrets.token_bytes(8), node_id, bytes(16)))
        await asyncio.sleep(0.15)
        return "entered" if await _is_contact(ctx, node_id) else "not entered"


@attack("peer_claims_the_nodes_id", expects="not entered", per_s=2)
async def claims_the_nodes_id(ctx: Context) -> str:
    """A stranger with the node's own id, who answers its pings."""
    async with _liar(ctx, ctx.node_id) as udp:
        await udp.ping(sender=ctx.node_id)
        await asyncio.sleep(0.1)
        return "entered" if await _is_contact(ctx, ctx.node_id) else "not entered"


@attack("peer_takes_a_live_id", expects="not entered", per_s=2, needs="own")
async def takes_a_live_id(ctx: Context) -> str:
    """A stranger with the bootstrap's id, who answers: the live one keeps its place."""
    bootstrap = parse_host_port(ctx.target.initial_peers[0])
    async with Udp(bootstrap, ctx.header, ctx.sent, ctx.dice) as asker:
        pong = await asker.ping()
    if pong is None:
        return "the bootstrap is silent"
    async with _liar(ctx, pong.sender) as udp:
        for _ in range(5):
            await udp.ping(sender=pong.sender)
            await asyncio.sleep(0.05)
        return "not entered" if await _is_contact(ctx, pong.sender, bootstrap[1]) else "entered"


def _liar(ctx: Context, node_id: bytes, contacts: bytes = b"") -> Udp:
    """A peer that answers everything: it holds nothing, and knows whomever it likes."""
    udp = ctx.udp()

    def answer(message: Message) -> Message | None:
        if isinstance(message, Ping):
            return Pong(message.id, node_id, bytes(8), bytes(6), 2**62)
        if isinstance(message, Find):
            return Found(message.id, node_id, bytes(8), contacts, b"", secrets.token_bytes(8), 65535, [])
        if isinstance(message, Page):
            return Paged(message.id, node_id, bytes(8), secrets.token_bytes(8), 65535, [secrets.token_bytes(300)])
        if isinstance(message, Store):
            return Stored(message.id, node_id, bytes(8), bytes([255]) * len(message.records))
        return None

    udp.on_message = answer
    return udp


IMPOSSIBLE = (
    bytes([127, 0, 0, 1]) + bytes(2),  # port 0
    bytes(4) + b"\x1f\x90",  # 0.0.0.0
    bytes([255] * 4) + b"\x1f\x90",
    bytes([224, 0, 0, 1]) + b"\x1f\x90",  # multicast
    bytes([240, 1, 2, 3]) + b"\x1f\x90",
    bytes([192, 168, 1, 1]) + b"\x00\x35",  # a router's DNS
    bytes([169, 254, 169, 254]) + b"\x00\x50",  # a cloud's metadata
    bytes([127, 0, 0, 1]) + b"\x00\x16",  # ssh
)


@attack("peer_impossible_contacts", expects="still answers", once=True, limit_s=15)
async def impossible_contacts(ctx: Context) -> str:
    """A peer near the node answers its look-ups with contacts at impossible addresses and made-up digests."""
    ends_at = ctx.ends_at + 2.4  # a round of renewals
    packed = b"".join(ctx.dice.randbytes(20) + each for each in IMPOSSIBLE)
    node_id = ctx.node_id[:17] + ctx.dice.randbytes(3)
    async with _liar(ctx, node_id, packed) as udp:
        while asyncio.get_running_loop().time() < ends_at:
            await udp.ping(sender=node_id)
            await asyncio.sleep(0.2)
        asked = sum(isinstance(message, Find) for _, message in udp.received)
        ctx.notes["look_ups_misled"] = asked
        return "still answers" if await udp.ping() is not None else "silent"


@attack("peer_crowd_of_ids", expects="the bootstrap stays", once=True, limit_s=20, needs="own")
async def crowd_of_ids(ctx: Context) -> str:
    """Sixty ids that all answer, from as many sockets, to push the honest peer out of the table."""
    async with Udp(parse_host_port(ctx.target.initial_peers[0]), ctx.header, ctx.sent, ctx.dice) as asker:
        pong = await asker.ping()
    async with contextlib.AsyncExitStack() as stack:
        liars = []
        for _ in range(60):
            node_id = ctx.dice.randbytes(20)
            liars.append((await stack.enter_async_context(_liar(ctx, node_id)), node_id))
        async for turn in ctx.paced(120):
            udp, node_id = liars[turn % len(liars)]
            udp.send(Ping(secrets.token_bytes(8), node_id, bytes(16)))
        stays = pong is not None and await _is_contact(ctx, pong.sender)
    return "the bootstrap stays" if stays else "the bootstrap is pushed out"
