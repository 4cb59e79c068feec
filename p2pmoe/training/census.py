"""What the experts of a swarm say about themselves: updates and requests. Knows nothing of training."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final, TypedDict

from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.directory import ExpertRecord
from p2pmoe.rpc.expert_pages import ListedExpert, follow_pages
from p2pmoe.types import Endpoint

_ASK_S: Final = 5.0
_UNKNOWN: Final = ListedExpert()


class ExpertCount(TypedDict):
    """One expert at one node, counted since that node started. None where the node did not say."""

    uid: str
    peer_id: str
    updates: int | None
    requests: int | None


def count_experts(swarm: Swarm, pattern: str, schema_digest: str | None = None) -> list[ExpertCount]:
    """Ask every node that serves an expert of the pattern, once. Nodes that do not answer stay in the list.

    With a digest only experts of that schema count: anybody may announce others below the same name.

    Raises what `Swarm.find_experts` raises.
    """
    records = [each for each in swarm.find_experts(pattern) if schema_digest in (None, each.schema_digest)]
    answers = swarm.run(_ask_all(swarm, list(dict.fromkeys(record.endpoint for record in records))))
    return [_count(record, answers[record.endpoint]) for record in records]


async def _ask_all(swarm: Swarm, endpoints: list[Endpoint]) -> dict[Endpoint, dict[str, ListedExpert]]:
    answers = await asyncio.gather(*(_ask(swarm, endpoint) for endpoint in endpoints))
    return dict(zip(endpoints, answers, strict=True))


async def _ask(swarm: Swarm, endpoint: Endpoint) -> dict[str, ListedExpert]:
    """What the node says of its experts, as far as it came in time."""
    stated: dict[str, ListedExpert] = {}
    try:
        async with asyncio.timeout(_ASK_S):
            async for page in follow_pages(partial(swarm.transport.get_json, endpoint)):
                stated.update(page)
    except (P2PMoEError, TimeoutError):
        pass
    return stated


def _count(record: ExpertRecord, answer: dict[str, ListedExpert]) -> ExpertCount:
    stated = answer.get(record.uid, _UNKNOWN)
    return {
        "uid": record.uid,
        "peer_id": record.peer_id,
        "updates": stated.updates,
        "requests": stated.requests,
    }
