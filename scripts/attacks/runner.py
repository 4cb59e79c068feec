"""Runs attacks one after the other: a window each, an honest client beside it, the node's state after it."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from attacks.client import HonestClient, honest_client
from attacks.context import Context
from attacks.private import open_session
from attacks.registry import Attack
from attacks.state import State
from attacks.target import Target
from p2pmoe.config import DHTConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.experts.bundles import decode_bundle
from p2pmoe.experts.uid import parse_uid
from p2pmoe.identity import Identity, peer_id_of
from p2pmoe.rpc.expert_pages import EXPERTS_PATH, follow_pages

WINDOW_S: Final = 0.6
QUIET_S: Final = 2.0
WARM_UP_S: Final = 3.0
MAX_RATIO: Final = 3.0


@dataclass
class Result:
    """What became of one attack."""

    name: str
    theme: str
    sent: dict[str, int]
    expected: str
    seen: str
    refused: bool
    p50_quiet_ms: float
    p50_ms: float | None
    p99_ms: float | None
    ratio: float | None
    honest_calls: int
    honest_errors: int
    state_ok: bool
    lost: list[str]
    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        calm = self.ratio is not None and self.ratio <= MAX_RATIO and not self.honest_errors
        return self.refused and self.state_ok and calm

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


async def run_attacks(target: Target, attacks: Sequence[Attack], seed: int) -> AsyncIterator[Result | dict[str, Any]]:
    """A Result for each attack, then the summary. Raises RuntimeError when the target is not fit to be attacked."""
    every_uid = [uid async for page in follow_pages(target.get_json) for uid in page]
    if not every_uid:
        raise RuntimeError(f"{target.endpoint} hosts no experts; there is nothing to call")
    uids = {"honest": every_uid[0], "victim": every_uid[len(every_uid) // 2], "untouched": every_uid[-1]}
    documents = {uid: await target.get_json(f"{EXPERTS_PATH}/{uid}") for uid in uids.values()}
    config = DHTConfig(initial_peers=target.initial_peers, swarm_id=target.swarm_id)
    async with DHTNode(Identity.generate(), config, client_mode=True, swarm_key=target.swarm_key) as dht:
        public_key = await _find_public_key(dht, every_uid, documents[every_uid[0]]["peer_id"])
        state = State(target, uids, every_uid, public_key, dht)

        member = None
        if target.swarm_key is not None:
            visitor = Context(target, uids, documents, public_key, random.Random(seed), 0.0)
            member = await open_session(visitor, Identity.generate(), target.swarm_key)

        def new_context(name: str, ends_at: float = 0.0) -> Context:
            dice = random.Random(f"{seed} {name}")
            if name == "quiet":
                return Context(target, uids, documents, public_key, dice, ends_at, authorization=member)
            return Context(target, uids, documents, public_key, dice, ends_at, _stranger(target, dice))

        async with honest_client(
            initial_peers=target.initial_peers,
            swarm_id=target.swarm_id,
            honest_uid=uids["honest"],
            untouched_uid=uids["untouched"],
            swarm_key_path=target.swarm_key_path and str(target.swarm_key_path),
            seed=seed,
        ) as client:
            await client.measure(WARM_UP_S)
            quiet = min([(await client.measure(QUIET_S / 2))["p50_ms"] for _ in range(2)])
            await state.remember(client, new_context("quiet"))
            results = []
            for each in attacks:
                result = await _run_one(each, client, state, new_context, quiet)
                results.append(result)
                yield result
            quiet_after = (await client.measure(QUIET_S))["p50_ms"]
    yield _summary(results, quiet, quiet_after, seed)


async def _run_one(each: Attack, client: HonestClient, state: State, new_context: Any, quiet_ms: float) -> Result:
    began = time.monotonic()
    ctx = new_context(each.name, began + WINDOW_S)
    await client.begin()
    seen = await _attack(each, ctx)
    await asyncio.sleep(max(0.0, ctx.ends_at - time.monotonic()))
    figures, sent = await client.end(), dict(ctx.sent)
    lost = await state.losses(client, ctx, new_context("quiet"))
    p50_ms = figures["p50_ms"]
    if figures["errors"]:
        ctx.notes["honest_error"] = figures["error"]
    return Result(
        name=each.name,
        theme=each.theme,
        sent=sent,
        expected=each.expects,
        seen=seen,
        refused=each.is_refused(seen),
        p50_quiet_ms=quiet_ms,
        p50_ms=p50_ms,
        p99_ms=figures["p99_ms"],
        ratio=None if p50_ms is None else round(p50_ms / quiet_ms, 2),
        honest_calls=figures["calls"],
        honest_errors=figures["errors"],
        state_ok=not lost,
        lost=lost,
        seconds=round(time.monotonic() - began, 2),
        notes=ctx.notes,
    )


async def _attack(each: Attack, ctx: Context) -> str:
    """What was seen: of the first repetition that was not refused as expected, else of the last."""
    try:
        async with asyncio.timeout(each.limit_s):
            if each.once:
                return await each.run(ctx)
            seen = ""
            async for _ in ctx.paced(each.per_s):
                ctx.sent["attacks"] += 1
                seen = await each.run(ctx)
                if not each.is_refused(seen):
                    break
            return seen
    except TimeoutError:
        return "hung"
    except OSError as error:
        return f"unreachable: {type(error).__name__}"


def _stranger(target: Target, dice: random.Random) -> str | None:
    """Another address of this machine for each attack, as limits are by address; Linux alone has the whole of 127/8."""
    if target.host != "127.0.0.1" or not sys.platform.startswith("linux"):
        return None
    return f"127.{dice.randrange(1, 255)}.{dice.randrange(1, 255)}.{dice.randrange(1, 255)}"


async def _find_public_key(dht: DHTNode, uids: Sequence[str], peer_id: str) -> bytes:
    """The node's key, from its own records: those whose signer has its peer id."""
    for prefix in {parse_uid(uid).prefix for uid in uids}:
        for record in await dht.get(prefix):
            if peer_id_of(record.public_key) == peer_id and decode_bundle(record.value, record.public_key).children:
                return record.public_key
    raise RuntimeError(f"no DHT record of node {peer_id} is found; is --dht-address one of its swarm?")


def _summary(results: Sequence[Result], quiet_ms: float, quiet_after_ms: float, seed: int) -> dict[str, Any]:
    ratios = [result.ratio for result in results if result.ratio is not None]
    failed = [result.name for result in results if not result.passed]
    back = quiet_after_ms / quiet_ms <= MAX_RATIO
    return {
        "summary": True,
        "attacks": len(results),
        "refused": sum(result.refused for result in results),
        "state_lost": sum(not result.state_ok for result in results),
        "p50_quiet_ms": quiet_ms,
        "p50_quiet_after_ms": quiet_after_ms,
        "worst_ratio": max(ratios, default=None),
        "honest_calls": sum(result.honest_calls for result in results),
        "honest_errors": sum(result.honest_errors for result in results),
        "failed": failed,
        "passed": not failed and bool(results) and back,
        "seed": seed,
    }


def merge_summaries(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One summary of the runs against several nodes: sums, and of latencies the largest."""
    merged = dict(summaries[0])
    for each in summaries[1:]:
        for key in ("attacks", "refused", "state_lost", "honest_calls", "honest_errors", "failed"):
            merged[key] += each[key]
        for key in ("p50_quiet_ms", "p50_quiet_after_ms", "worst_ratio"):
            merged[key] = max((value for value in (merged[key], each[key]) if value is not None), default=None)
        merged["passed"] = merged["passed"] and each["passed"]
    return merged
