"""What a swarm contains, name by name: `p2pmoe lookup` without a pattern. Reads the DHT and nodes' pages of experts.

Knows nothing of torch. A name that nobody serves any more is left out.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from rich import box
from rich.table import Table

from p2pmoe.cli.survey import CONCURRENT_NODES, Sighting, Survey, format_schema
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.uid import parse_uid, prefix_of
from p2pmoe.rpc.expert_pages import ListedExpert, follow_pages
from p2pmoe.rpc.http.documents import HttpDocuments
from p2pmoe.types import Endpoint

EVERYTHING: Final = "*"
MAX_NAMES: Final = 256
"""Anybody may announce a name; those that most nodes use come first."""
SHOWN_SCHEMAS: Final = 3


@dataclass(frozen=True, slots=True)
class Summary:
    """The experts of one name with as many coordinates. `updates` is None where no node of theirs answered."""

    prefix: str
    grid: tuple[int, ...]
    """How far each coordinate goes: 8 and 8 where `ffn.7.7` is the last one."""
    experts: int
    replicas: int
    """Experts served by several nodes counted once for each."""
    nodes: int
    updates: int | None
    schemas: Mapping[str, int]
    """Records by schema digest, the most frequent first."""

    @property
    def coverage(self) -> float:
        """The share of the grid's places that somebody serves."""
        return self.experts / math.prod(self.grid)

    def to_json(self) -> dict[str, Any]:
        """Plain values for programs."""
        return {
            "prefix": self.prefix,
            "grid": list(self.grid),
            "experts": self.experts,
            "replicas": self.replicas,
            "coverage": round(self.coverage, 4),
            "nodes": self.nodes,
            "updates": self.updates,
            "schemas": dict(self.schemas),
        }


async def survey_swarm(
    survey: Survey, documents: HttpDocuments, timeout_s: float
) -> tuple[list[Summary], list[Sighting]]:
    """Everything that is announced now, as summaries and one by one. Raises as `ExpertDirectory.find_names`."""
    names = await survey.names()
    sightings: list[Sighting] = []
    for name in names[:MAX_NAMES]:
        sightings += await survey.look(prefix_of(name, ()))
    updates = await _count_updates(sightings, documents, timeout_s)
    return summarize(sightings, updates), sightings


def summarize(sightings: Iterable[Sighting], updates: Mapping[tuple[Endpoint, str], int]) -> list[Summary]:
    """One summary for each name and number of coordinates; `updates` by endpoint and uid."""
    groups: dict[tuple[str, int], list[Sighting]] = {}
    for each in sightings:
        uid = parse_uid(each.record.uid)
        groups.setdefault((uid.name, len(uid.coordinates)), []).append(each)
    return [_summarize(name, group, updates) for (name, _), group in sorted(groups.items())]


def _summarize(name: str, group: Sequence[Sighting], updates: Mapping[tuple[Endpoint, str], int]) -> Summary:
    uids = {each.record.uid for each in group}
    counted = [updates[key] for each in group if (key := (each.record.endpoint, each.record.uid)) in updates]
    return Summary(
        prefix=prefix_of(name, ()),
        grid=tuple(max(column) + 1 for column in zip(*(parse_uid(uid).coordinates for uid in uids), strict=True)),
        experts=len(uids),
        replicas=len(group),
        nodes=len({each.record.peer_id for each in group}),
        updates=sum(counted) if counted else None,
        schemas=dict(Counter(each.record.schema_digest for each in group).most_common()),
    )


async def _count_updates(
    sightings: Iterable[Sighting], documents: HttpDocuments, timeout_s: float
) -> dict[tuple[Endpoint, str], int]:
    endpoints = list(dict.fromkeys(each.record.endpoint for each in sightings if each.round_trip_ms is not None))
    slots = asyncio.Semaphore(CONCURRENT_NODES)

    async def ask(endpoint: Endpoint) -> dict[str, ListedExpert]:
        stated: dict[str, ListedExpert] = {}
        try:
            async with slots, asyncio.timeout(timeout_s):
                async for page in follow_pages(partial(documents.get_json, endpoint)):
                    stated.update(page)
        except (P2PMoEError, TimeoutError):
            pass  # what came is counted
        return stated

    answers = dict(zip(endpoints, await asyncio.gather(*map(ask, endpoints)), strict=True))
    return {
        (endpoint, uid): listed.updates
        for endpoint, stated in answers.items()
        for uid, listed in stated.items()
        if listed.updates is not None
    }


def overview_document(swarm_id: str, summaries: Sequence[Summary], sightings: Iterable[Sighting]) -> dict[str, Any]:
    """What --json prints: every schema once, under its digest; null where no node of it answered."""
    sightings = list(sightings)
    return {
        "swarm_id": swarm_id,
        "nodes": len({each.record.peer_id for each in sightings}),
        "experts": sum(each.experts for each in summaries),
        "prefixes": [each.to_json() for each in summaries],
        "schemas": {each.record.schema_digest: each.schema for each in sightings},
    }


def overview_table(swarm_id: str, summaries: Sequence[Summary], sightings: Iterable[Sighting]) -> Table:
    """One row for each name and number of coordinates."""
    schemas = {each.record.schema_digest: each.schema for each in sightings}
    table = Table(title=f"swarm {swarm_id}".replace("[", r"\["), title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("prefix", "grid"):
        table.add_column(column, no_wrap=True)
    for column in ("experts", "coverage", "nodes", "updates"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("schema", overflow="fold")
    for each in summaries:
        shown = [format_schema(schemas.get(digest)) for digest in list(each.schemas)[:SHOWN_SCHEMAS]]
        more = f", … {len(each.schemas)} schemas" if len(each.schemas) > SHOWN_SCHEMAS else ""
        table.add_row(
            each.prefix,
            " × ".join(map(str, each.grid)),
            str(each.experts),
            f"{each.coverage:.0%}",
            str(each.nodes),
            "?" if each.updates is None else str(each.updates),
            (" or ".join(shown) + more).replace("[", r"\["),
        )
    return table
