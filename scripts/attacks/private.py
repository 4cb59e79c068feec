"""Attacks on a node of a private swarm, by somebody who has not its key, or has only what others sent."""

from __future__ import annotations

import json
import secrets

from attacks.context import EXCHANGE, Context
from attacks.http_wire import Reply
from attacks.registry import attack
from p2pmoe.dht.sealing import Sealer
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.protocol.datagrams import Find, Ping, encode_datagram
from p2pmoe.protocol.sessions import SessionNonce, make_session_request
from p2pmoe.rpc.http.sessions import NONCE_PATH, SESSION_PATH


async def _nonce(ctx: Context) -> SessionNonce:
    reply = await ctx.request("POST", NONCE_PATH)
    if reply.status != 200:
        raise ConnectionError(f"no nonce: {reply.seen}")
    return SessionNonce(**json.loads(reply.body))


async def _ask(
    ctx: Context, identity: Identity, swarm_key: SwarmKey | None, *, proof_for: SessionNonce | None = None
) -> Reply:
    """A handshake that is right but for the swarm key, or whose proof is for another nonce."""
    nonce = await _nonce(ctx)
    request = make_session_request(identity, ctx.public_key, nonce, swarm_key)
    proof = request.proof
    if proof_for is not None:
        proof = make_session_request(identity, ctx.public_key, proof_for, swarm_key).proof
    document = {"public_key": request.public_key, "nonce": request.nonce, "signature": request.signature}
    if proof is not None:
        document["proof"] = proof
    return await ctx.request("POST", SESSION_PATH, json.dumps(document).encode())


async def open_session(ctx: Context, identity: Identity, swarm_key: SwarmKey) -> str:
    """A member's handshake: the header that its calls carry. Raises ConnectionError."""
    reply = await _ask(ctx, identity, swarm_key)
    if reply.status != 200:
        raise ConnectionError(f"the node refuses a member: {reply.seen}")
    return f"Bearer {json.loads(reply.body)['token']}"


def _key(ctx: Context) -> SwarmKey:
    assert ctx.target.swarm_key is not None, "needs=private"
    return ctx.target.swarm_key


def _ping(ctx: Context) -> bytes:
    return encode_datagram(ctx.header, Ping(secrets.token_bytes(8), b"", bytes(200)))


@attack("private_unsealed_datagrams", expects="no reply", needs="private", per_s=4)
async def unsealed_datagrams(ctx: Context) -> str:
    """Pings and look-ups in the clear, with the swarm's right name."""
    async with ctx.udp() as udp:
        udp.send(_ping(ctx))
        udp.send(Find(secrets.token_bytes(8), b"", b"", ctx.near_key(), 8, bytes(344)))
        return await udp.silence_or_reply()


@attack("private_other_swarm_key", expects="no reply", needs="private", per_s=4)
async def other_swarm_key(ctx: Context) -> str:
    """A right ping, sealed with the key of another swarm."""
    async with ctx.udp() as udp:
        udp.send(Sealer(SwarmKey.generate(), ctx.header).seal(_ping(ctx)))
        return await udp.silence_or_reply()


@attack("private_replayed_datagram", expects="no reply", needs="private", per_s=2)
async def replayed_datagram(ctx: Context) -> str:
    """A member's ping, recorded on the line and sent again: it was answered once, from whatever address it comes."""
    recorded = Sealer(_key(ctx), ctx.header).seal(_ping(ctx))
    async with ctx.udp() as member, ctx.udp() as observer:
        member.send(recorded)
        if await member.silence_or_reply() == "no reply":
            return "a member's ping is not answered"
        member.send(recorded)
        observer.send(recorded)
        seen = {await member.silence_or_reply(), "no reply" if not observer.received else "the observer is answered"}
    return " + ".join(sorted(seen))


@attack("private_changed_datagram", expects="no reply", needs="private", per_s=4)
async def changed_datagram(ctx: Context) -> str:
    """A member's datagram with one bit changed on the line: in its salt, counter, contents or tag; or cut short."""
    sealed = bytearray(Sealer(_key(ctx), ctx.header).seal(_ping(ctx)))
    sealed[ctx.dice.randrange(len(sealed))] ^= 1 << ctx.dice.randrange(8)
    async with ctx.udp() as udp:
        udp.send(bytes(sealed))
        udp.send(bytes(sealed[: ctx.dice.randrange(len(sealed))]))
        return await udp.silence_or_reply()


@attack("private_call_without_session", expects="401", needs="private")
async def call_without_session(ctx: Context) -> str:
    """Right calls, forward and backward, without a session or with a made-up token."""
    headers = ctx.dice.choice(({}, {"Authorization": f"Bearer {'a' * 140}"}, {"Authorization": "Basic YTpi"}))
    call = ctx.call(direction=ctx.dice.choice(("forward", "backward")))
    return (await ctx.request("POST", EXCHANGE, call, headers)).seen


@attack("private_inference_without_session", expects="401", needs="private")
async def inference_without_session(ctx: Context) -> str:
    """The same by the Open Inference Protocol."""
    return (await ctx.infer({"inputs": ctx.tensors(ctx.uids["victim"], "forward")})).seen


@attack("private_session_without_proof", expects="403", needs="private", per_s=4)
async def session_without_proof(ctx: Context) -> str:
    """A right handshake of somebody who has not the swarm key."""
    return (await _ask(ctx, ctx.identity(), None)).seen


@attack("private_wrong_proof", expects="403", needs="private", per_s=4)
async def wrong_proof(ctx: Context) -> str:
    """A handshake with the proof of another swarm's key."""
    return (await _ask(ctx, ctx.identity(), SwarmKey.generate())).seen


@attack("private_old_proof", expects="403", needs="private", per_s=2)
async def old_proof(ctx: Context) -> str:
    """A member's own proof, made for an earlier nonce."""
    return (await _ask(ctx, ctx.identity(), _key(ctx), proof_for=await _nonce(ctx))).seen
