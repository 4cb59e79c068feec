"""What a node says of the experts that it hosts: one document for each, and pages of them (`rpc/expert_pages.py`).

Schemas are made into JSON once for each digest: asking costs the same whatever they are, and however many experts
there are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from p2pmoe.errors import SchemaError, UnknownExpertError
from p2pmoe.protocol.nested import nested_flatten
from p2pmoe.protocol.schema import schema_to_json
from p2pmoe.rpc.expert_pages import MAX_PAGE_EXPERTS, MAX_PAGE_SCHEMA_BYTES
from p2pmoe.server.backend import ExpertBackend


@dataclass(frozen=True, slots=True)
class _Schema:
    document: dict[str, Any]
    """`forward_schema`, `outputs_schema`, `keyword_names`."""
    oip: dict[str, Any]
    nbytes: int


class ExpertListing:
    """Documents of experts that do not come and go.

    Args:
        backends: the experts by uid.
        peer_id: named in every document.
        requests: how many calls to an expert were answered.

    Raises:
        SchemaError: a schema is so large that no caller would read it.
    """

    def __init__(
        self, backends: Mapping[str, ExpertBackend], peer_id: str, requests: Callable[[ExpertBackend], int]
    ) -> None:
        self._backends, self._peer_id, self._requests = backends, peer_id, requests
        self._order = sorted(backends)
        self._schemas: dict[str, _Schema] = {}
        for uid, backend in backends.items():
            if backend.schema_digest not in self._schemas:
                self._schemas[backend.schema_digest] = _describe(uid, backend)

    def __repr__(self) -> str:
        return f"<ExpertListing: {len(self._order)} experts, {len(self._schemas)} schemas>"

    def backend(self, uid: str) -> ExpertBackend:
        """Raises UnknownExpertError."""
        backend = self._backends.get(uid)
        if backend is None:
            raise UnknownExpertError(f"this node does not host {uid[:128]!r}; look it up again, it may have moved")
        return backend

    def expert(self, uid: str) -> dict[str, Any]:
        """Info of one expert. Raises UnknownExpertError."""
        backend = self.backend(uid)
        schema = self._schemas[backend.schema_digest]
        return {
            "uid": uid,
            "peer_id": self._peer_id,
            **schema.document,
            "repeatable": list(backend.get_info()["repeatable"]),
            "draws": sorted(backend.findings.draws),
            "incarnation": backend.get_info()["incarnation"],
            **self._counts(backend),
            "oip": {"name": uid, **schema.oip},
        }

    def page(self, after: str = "", limit: int = MAX_PAGE_EXPERTS) -> dict[str, Any]:
        """Up to `limit` experts behind a uid, in the order of their uids as texts."""
        start = bisect_right(self._order, after)
        experts: dict[str, Any] = {}
        schemas: dict[str, Any] = {}
        nbytes = 0
        for uid in self._order[start : start + min(limit, MAX_PAGE_EXPERTS)]:
            backend = self._backends[uid]
            digest = backend.schema_digest
            if digest not in schemas:
                nbytes += self._schemas[digest].nbytes
                if experts and nbytes > MAX_PAGE_SCHEMA_BYTES:
                    break
                schemas[digest] = self._schemas[digest].document
            experts[uid] = self._counts(backend)
        end = start + len(experts)
        return {
            "peer_id": self._peer_id,
            "total": len(self._order),
            "experts": experts,
            "schemas": schemas,
            "next": self._order[end - 1] if experts and end < len(self._order) else None,
        }

    def _counts(self, backend: ExpertBackend) -> dict[str, Any]:
        return {
            "schema_digest": backend.schema_digest,
            "updates": backend.get_info()["updates"],
            "requests": self._requests(backend),
        }


def _describe(uid: str, backend: ExpertBackend) -> _Schema:
    """Raises SchemaError."""
    backend_info = backend.get_info()
    forward, outputs = backend_info["forward_schema"], backend_info["outputs_schema"]
    document = {
        "forward_schema": schema_to_json(forward),
        "outputs_schema": schema_to_json(outputs),
        "keyword_names": list(backend_info["keyword_names"]),
    }
    oip = {
        "versions": ["1"],
        "platform": "p2pmoe",
        "inputs": _oip_tensors(nested_flatten(forward)),
        "outputs": _oip_tensors(nested_flatten(outputs)),
    }
    nbytes = len(msgspec.json.encode((document, oip)))
    if nbytes > MAX_PAGE_SCHEMA_BYTES:
        raise SchemaError(
            f"{uid}: its schemas take {nbytes} bytes as JSON, more than the {MAX_PAGE_SCHEMA_BYTES} that callers are "
            f"sent; let it take and give fewer tensors"
        )
    return _Schema(document, oip, nbytes)


def _oip_tensors(protos: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [
        {"name": str(index), "datatype": proto.datatype, "shape": [-1, *proto.sized(-1)]}
        for index, proto in enumerate(protos)
    ]
