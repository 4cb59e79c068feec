"""What the records of one prefix say: which children it has and who provides them. No I/O and no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from p2pmoe.errors import DecodeError
from p2pmoe.experts.bundles import Bundle, decode_bundle
from p2pmoe.identity import peer_id_of
from p2pmoe.protocol.delegations import child_towards
from p2pmoe.protocol.records import Record
from p2pmoe.types import Endpoint, PeerId


@dataclass(frozen=True, slots=True)
class Provider:
    """A peer that says it has a child. `schema_digest` is hex, and empty for a child that is only a prefix."""

    peer_id: PeerId
    endpoint: Endpoint
    schema_digest: str
    expires_at: float
    """Seconds since 1970."""
    sequence: int
    """Microseconds since 1970 when it was declared; larger is newer."""
    scope: str | None = None
    """In a closed swarm: the prefix that the owner's delegation covers, empty for all; None in an open one."""


Children = Mapping[int, tuple[Provider, ...]]
NO_CHILDREN: Final[Children] = MappingProxyType({})


def children_of(records: Iterable[Record], prefix: str = "") -> Children:
    """Merge a prefix's records: of two bundles of one peer that list a child, the newer one counts.

    A child with a schema is an expert, one without is a prefix; a peer may provide both under one number.
    Records whose value is no bundle are left out, and in a closed swarm children outside the signer's scope:
    above its scope a member may name only the next prefix on the way there.
    """
    newest: dict[int, dict[tuple[PeerId, bool], Provider]] = {}
    for record in records:
        try:
            bundle = decode_bundle(record.value, record.public_key)
        except DecodeError:
            continue
        peer_id = peer_id_of(record.public_key)
        provider = Provider(
            peer_id, bundle.endpoint, bundle.schema_digest, record.expires_at, record.sequence, record.scope
        )
        for child in _in_scope(bundle, record.scope, prefix):
            providers = newest.setdefault(child, {})
            known = providers.get((peer_id, bool(bundle.schema_digest)))
            if known is None or known.sequence < provider.sequence:
                providers[peer_id, bool(bundle.schema_digest)] = provider
    # Sorted, so that two readers of the same records agree on the order.
    return MappingProxyType(
        {
            child: tuple(sorted(newest[child].values(), key=lambda each: (each.peer_id, each.schema_digest)))
            for child in sorted(newest)
        }
    )


def _in_scope(bundle: Bundle, scope: str | None, prefix: str) -> Iterable[int]:
    if scope is None or prefix.startswith(scope):
        return bundle.children
    towards = child_towards(scope, prefix)
    return [child for child in bundle.children if child == towards and not bundle.schema_digest]


def first_expiry(children: Children) -> float:
    """When the first provider expires, in seconds since 1970; infinity when there is none."""
    return min((p.expires_at for providers in children.values() for p in providers), default=float("inf"))
