"""Who serves which expert, how far away, and what it takes: the DHT's records beside the nodes' own words.

Knows nothing of tables, and nothing of torch: schemas stay the JSON that nodes send.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.directory import ExpertDirectory, ExpertRecord
from p2pmoe.protocol.schema_digest import digest_of_json
from p2pmoe.rpc.http.documents import HttpDocuments
from p2pmoe.types import WIRE_VERSION, Endpoint, PeerId

MAX_DEPTH: Final = 32
MAX_SHOWN_TENSORS: Final = 8
MAX_SCHEMAS: Final = 4096
CONCURRENT_NODES: Final = 32


@dataclass(frozen=True, slots=True)
class Sighting:
    """One expert at one node. `schema` and `round_trip_ms` are None where the node did not answer."""

    record: ExpertRecord
    schema: dict[str, Any] | None
    round_trip_ms: float | None
    seen_at: float
    """Seconds since 1970."""
    providers: tuple[PeerId, ...] = ()
    """Everybody who serves this uid."""

    @property
    def age_s(self) -> float:
        """Since the node last declared it."""
        return max(0.0, self.seen_at - self.record.declared_at)

    @property
    def expires_in_s(self) -> float:
        """Until the record is gone, unless the node declares it again."""
        return max(0.0, self.record.expires_at - self.seen_at)

    def to_json(self) -> dict[str, Any]:
        """Plain values for programs."""
        public_key = self.record.endpoint.public_key
        return {
            "uid": self.record.uid,
            "peer_id": self.record.peer_id,
            "endpoint": self.record.endpoint.url,
            "schema_digest": self.record.schema_digest,
            "schema": self.schema,
            "age_s": round(self.age_s, 3),
            "expires_at": self.record.expires_at,
            "expires_in_s": round(self.expires_in_s, 3),
            "signature": self.record.signature,
            "delegated_scope": self.record.scope,
            "public_key": public_key.hex() if public_key else None,
            "providers": list(self.providers),
            "round_trip_ms": None if self.round_trip_ms is None else round(self.round_trip_ms, 3),
        }


class Survey:
    """Looks patterns up, again and again if wanted. Schemas are asked for once per digest."""

    def __init__(
        self, directory: ExpertDirectory, documents: HttpDocuments, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._directory, self._documents, self._clock = directory, documents, clock
        self._schemas: dict[str, dict[str, Any]] = {}
        self._stated: dict[str, dict[Endpoint, dict[str, Any]]] = {}
        """Schemas whose digest is another than the node says, by that digest."""
        self._slots = asyncio.Semaphore(CONCURRENT_NODES)

    def __repr__(self) -> str:
        return f"<Survey: {len(self._schemas)} schemas known>"

    async def names(self) -> list[str]:
        """The names in front of uids, those that most nodes use first. Raises as `ExpertDirectory.find_names`."""
        found = await self._directory.find_names()
        return sorted(found, key=lambda name: (-len(found[name]), name))

    async def look(self, pattern: str) -> list[Sighting]:
        """Every expert and provider that a pattern matches now. Raises as `ExpertDirectory.find_experts`."""
        self._directory.invalidate()
        records = await self._directory.find_experts(pattern)
        nodes: dict[Endpoint, dict[str, str]] = {}
        for record in records:
            nodes.setdefault(record.endpoint, {}).setdefault(record.schema_digest, record.uid)
        visits = await asyncio.gather(*(self._visit(endpoint, uids) for endpoint, uids in nodes.items()))
        round_trips = dict(zip(nodes, visits, strict=True))
        now = self._clock()
        providers: dict[str, list[PeerId]] = {}
        for record in records:
            providers.setdefault(record.uid, []).append(record.peer_id)
        return [
            Sighting(
                record,
                self._schema_at(record),
                round_trips[record.endpoint],
                now,
                tuple(providers[record.uid]),
            )
            for record in records
        ]

    @property
    def forged_records(self) -> int:
        """Records with a wrong signature that were read so far, and left out."""
        return self._directory.forged_records

    @property
    def undelegated_records(self) -> int:
        """In a closed swarm: records without the owner's delegation that were read so far, and left out."""
        return self._directory.undelegated_records

    def _schema_at(self, record: ExpertRecord) -> dict[str, Any] | None:
        """What is proved, else what the node says, else, for a node that is silent, what another one says."""
        stated = self._stated.get(record.schema_digest, {})
        any_stated = next(iter(stated.values()), None)
        return self._schemas.get(record.schema_digest) or stated.get(record.endpoint) or any_stated

    async def _visit(self, endpoint: Endpoint, uids: dict[str, str]) -> float | None:
        """The round trip in milliseconds; learns the schemas of `uids` (digest -> uid) on the way."""
        async with self._slots:
            try:
                # The first request opens the connection, which is no part of the round trip.
                for digest, uid in uids.items():
                    await self._learn(endpoint, digest, uid)
                await self._documents.get_json(endpoint, "/v2/health/live")
                started = time.perf_counter()
                await self._documents.get_json(endpoint, "/v2/health/live")
            except P2PMoEError:
                return None
            return 1e3 * (time.perf_counter() - started)

    async def _learn(self, endpoint: Endpoint, digest: str, uid: str) -> None:
        if digest in self._schemas or endpoint in self._stated.get(digest, ()):
            return
        document = await self._documents.get_json(endpoint, f"/p2pmoe/v{WIRE_VERSION}/experts/{uid}")
        if not isinstance(document, dict) or document.get("schema_digest") != digest:
            return
        schema = {"forward": document.get("forward_schema"), "outputs": document.get("outputs_schema")}
        if len(self._schemas) + len(self._stated) >= MAX_SCHEMAS:  # strangers may announce any number
            self._schemas.clear()
            self._stated.clear()
        if _adds_up(schema, digest):
            self._schemas[digest] = schema
        else:
            self._stated.setdefault(digest, {})[endpoint] = schema


def _adds_up(schema: dict[str, Any], digest: str) -> bool:
    """Whether a schema is the one that a digest stands for: else it is one node's word, and stands for no other's."""
    try:
        return digest_of_json(schema["forward"], schema["outputs"]) == digest
    except ValueError:
        return False


def format_schema(schema: dict[str, Any] | None) -> str:
    """`FP32[64] → FP32[64]`, the batch left out. Only names and numbers get through: a stranger wrote it."""
    if schema is None:
        return "?"
    return " → ".join(_format_tensors(schema[side]) for side in ("forward", "outputs"))


def _format_tensors(node: Any) -> str:
    tensors = list(_tensors(node))
    shown = ", ".join(tensors[:MAX_SHOWN_TENSORS])
    return f"{shown}, … {len(tensors)} tensors" if len(tensors) > MAX_SHOWN_TENSORS else shown or "nothing"


def _tensors(node: Any, depth: int = 0) -> Iterator[str]:
    """The tensors of a nested schema in wire order: dicts by key, lists and tuples as they stand."""
    if not isinstance(node, dict) or depth > MAX_DEPTH:
        return
    items = node.get("items")
    if node.get("type") == "tensor":
        yield _format_tensor(node.get("datatype"), node.get("shape"))
    elif isinstance(items, dict):
        for key in sorted(items):
            yield from _tensors(items[key], depth + 1)
    elif isinstance(items, list):
        for item in items:
            yield from _tensors(item, depth + 1)


def _format_tensor(datatype: Any, shape: Any) -> str:
    if not isinstance(datatype, str) or not re.fullmatch(r"[A-Z0-9]{1,8}", datatype) or not isinstance(shape, list):
        return "?"
    sizes = ["any" if size is None else str(size) if type(size) is int else "?" for size in shape[:MAX_SHOWN_TENSORS]]
    return f"{datatype}[{', '.join(sizes)}]"
