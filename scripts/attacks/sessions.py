"""Attacks on the handshake of callers: who one is, and that one is it now, at this node."""

from __future__ import annotations

import json

from attacks.context import EXCHANGE, Context
from attacks.registry import attack
from p2pmoe.identity import Identity
from p2pmoe.types import WIRE_VERSION

NONCE = f"/p2pmoe/v{WIRE_VERSION}/session/nonce"
SESSION = f"/p2pmoe/v{WIRE_VERSION}/session"


async def _nonce(ctx: Context) -> bytes:
    reply = await ctx.request("POST", NONCE)
    if reply.status != 200:
        raise ConnectionError(f"no nonce: {reply.seen}")
    return bytes.fromhex(json.loads(reply.body)["nonce"])


def _signed(node_key: bytes, client_key: bytes, nonce: bytes) -> bytes:
    return b"p2pmoe-session-1\0" + node_key + client_key + nonce


async def _open(ctx: Context, public_key: bytes, nonce: bytes, signature: bytes) -> str:
    document = {"public_key": public_key.hex(), "nonce": nonce.hex(), "signature": signature.hex()}
    return (await ctx.request("POST", SESSION, json.dumps(document).encode())).seen


def _proof(ctx: Context, identity: Identity, nonce: bytes) -> bytes:
    return identity.sign(_signed(ctx.public_key, identity.public_key, nonce))


@attack("session_forged_signature", expects="401", needs="sessions", per_s=4)
async def forged_signature(ctx: Context) -> str:
    """A signature at random under somebody's public key."""
    return await _open(ctx, ctx.identity().public_key, await _nonce(ctx), ctx.dice.randbytes(64))


@attack("session_stolen_identity", expects="401", needs="sessions", per_s=4)
async def stolen_identity(ctx: Context) -> str:
    """The node's own public key, signed for by another."""
    identity, nonce = ctx.identity(), await _nonce(ctx)
    return await _open(ctx, ctx.public_key, nonce, identity.sign(_signed(ctx.public_key, ctx.public_key, nonce)))


@attack("session_small_order_key", expects="401", needs="sessions", per_s=4)
async def small_order_key(ctx: Context) -> str:
    """A public key that needs no private one."""
    return await _open(ctx, b"\1" + bytes(31), await _nonce(ctx), b"\1" + bytes(63))


@attack("session_made_up_nonce", expects="401", needs="sessions", per_s=4)
async def made_up_nonce(ctx: Context) -> str:
    """A nonce that the node never gave."""
    identity, nonce = ctx.identity(), ctx.dice.randbytes(32)
    return await _open(ctx, identity.public_key, nonce, _proof(ctx, identity, nonce))


@attack("session_replayed", expects="401", needs="sessions", per_s=4)
async def replayed(ctx: Context) -> str:
    """A right handshake, sent twice."""
    identity, nonce = ctx.identity(), await _nonce(ctx)
    proof = _proof(ctx, identity, nonce)
    if (first := await _open(ctx, identity.public_key, nonce, proof)) != "200":
        return f"{first} for the right one"
    return await _open(ctx, identity.public_key, nonce, proof)


@attack("session_of_another_node", expects="401", needs="sessions", per_s=4)
async def of_another_node(ctx: Context) -> str:
    """A signature that was made for another node, relayed to this one."""
    identity, nonce = ctx.identity(), await _nonce(ctx)
    proof = identity.sign(_signed(ctx.identity().public_key, identity.public_key, nonce))
    return await _open(ctx, identity.public_key, nonce, proof)


@attack("session_malformed", expects="400 or 413", needs="sessions")
async def malformed(ctx: Context) -> str:
    """Handshakes that are no JSON, too long, of wrong lengths or types."""
    body = ctx.dice.choice(
        (
            b"{",
            b"[]",
            b"null",
            b'{"public_key":1,"nonce":2,"signature":3}',
            json.dumps({"public_key": "zz" * 32, "nonce": "00" * 32, "signature": "00" * 64}).encode(),
            json.dumps({"public_key": "00" * 31, "nonce": "00" * 32, "signature": "00" * 64}).encode(),
            b" " * 100_000,
            b"[" * 4000,
        )
    )
    return (await ctx.request("POST", SESSION, body)).seen


@attack("session_forged_token", expects="401", needs="sessions")
async def forged_token(ctx: Context) -> str:
    """Calls with tokens that nobody issued."""
    token = ctx.dice.choice(("a" * 140, "null", "../../etc/passwd", "=" * 8, "A" * 5000))
    return (await ctx.request("POST", EXCHANGE, ctx.call(), {"Authorization": f"Bearer {token}"})).seen


@attack("session_altered_token", expects="401", needs="sessions", per_s=4)
async def altered_token(ctx: Context) -> str:
    """A right token with one character changed: another name, a later end."""
    identity, nonce = ctx.identity(), await _nonce(ctx)
    document = {
        "public_key": identity.public_key.hex(),
        "nonce": nonce.hex(),
        "signature": _proof(ctx, identity, nonce).hex(),
    }
    reply = await ctx.request("POST", SESSION, json.dumps(document).encode())
    if reply.status != 200:
        return f"{reply.seen} for the right one"
    token = json.loads(reply.body)["token"]
    place = ctx.dice.randrange(len(token) - 4)
    token = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
    return (await ctx.request("POST", EXCHANGE, ctx.call(), {"Authorization": f"Bearer {token}"})).seen


@attack("session_flood", expects="429", needs="sessions", once=True)
async def flood(ctx: Context) -> str:
    """Handshakes of one address, 200 a second: each would cost the node a signature."""
    seen = ""
    async for _ in ctx.paced(200):
        reply = await ctx.request(
            "POST", SESSION, json.dumps({"public_key": "11" * 32, "nonce": "00" * 32, "signature": "00" * 64}).encode()
        )
        seen = reply.seen
        if seen == "429":
            break
    return seen


@attack("admin_by_proxy", expects="401 or 403", needs="sessions")
async def admin_by_proxy(ctx: Context) -> str:
    """What only this machine may see, asked for through a proxy or under a foreign name."""
    headers = ctx.dice.choice(
        (
            {"X-Forwarded-For": "127.0.0.1"},
            {"Forwarded": "for=127.0.0.1"},
            {"Host": "mallory.example"},
            {"Via": "1.1 x"},
        )
    )
    return (await ctx.request("GET", "/metrics", headers=headers)).seen
