"""What the experts of a swarm say about themselves: updates and requests. Knows nothing of training."""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.directory import ExpertRecord
from p2pmoe.types import WIRE_VERSION, Endpoint


class ExpertCount(TypedDict):
    """One expert at one node, counted since that node started. None where the node did not say."""

    uid: str
    peer_id: str
    updates: int | None
    requests: int | None


def count_experts(swarm: Swarm, pattern: str) -> list[ExpertCount]:
    """Ask every node that serves an expert of the pattern, once. Nodes that do not answer stay in the list.

    Raises what `Swarm.find_experts` raises.
    """
    records = swarm.find_experts(pattern)
    answers = swarm.run(_ask_all(swarm, list(dict.fromkeys(record.endpoint for record in records))))
    return [_count(record, answers[record.endpoint]) for record in records]


async def _ask_all(swarm: Swarm, endpoints: list[Endpoint]) -> dict[Endpoint, Any]:
    answers = await asyncio.gather(*(_ask(swarm, endpoint) for endpoint in endpoints))
    return dict(zip(endpoints, answers, strict=True))


async def _ask(swarm: Swarm, endpoint: Endpoint) -> Any:
    try:
        async with asyncio.timeout(5.0):
            return await swarm.transport.get_json(endpoint, f"/p2pmoe/v{WIRE_VERSION}/experts")
    except (P2PMoEError, TimeoutError):
        return None


def _count(record: ExpertRecord, answer: Any) -> ExpertCount:
    experts = answer.get("experts") if isinstance(answer, dict) else None
    stated = experts.get(record.uid) if isinstance(experts, dict) else None
    return {
        "uid": record.uid,
        "peer_id": record.peer_id,
        "updates": _number(stated, "updates"),
        "requests": _number(stated, "requests"),
    }


def _number(stated: Any, key: str) -> int | None:
    """A peer's word is checked before it is believed."""
    value = stated.get(key) if isinstance(stated, dict) else None
    return value if type(value) is int and 0 <= value < 2**63 else None
