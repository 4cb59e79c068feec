"""What the client needs of an expert directory, and what it knows about an expert once it has asked a provider.

`experts.ExpertDirectory` is the real one; `StaticDirectory` serves fixed providers, for tests and for swarms without
a DHT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Protocol

from p2pmoe.errors import DecodeError
from p2pmoe.experts.directory import Children, ExpertRecord, Provider
from p2pmoe.experts.left_out import Absence, LeftOut
from p2pmoe.experts.uid import UidPattern, parse_uid
from p2pmoe.protocol.nested import nested_flatten, nested_packer
from p2pmoe.protocol.schema import BatchTensorProto, schema_digest, schema_from_json
from p2pmoe.types import MODES, Endpoint, PeerId


class Directory(Protocol):
    """Where experts are found."""

    def cached_prefix(self, prefix: str) -> Children | None:
        """Children of a prefix if they are known and fresh; no I/O, any thread."""

    def announced(self, prefix: str) -> Children:
        """The same with those who are left out for a while among them; empty when nothing is known; any thread."""

    async def get_prefixes(self, prefixes: Sequence[str]) -> Mapping[str, Children]:
        """Children of each prefix, from the network where they are not cached."""

    async def read_again(self, prefixes: Sequence[str]) -> Mapping[str, Children]:
        """`get_prefixes` from the network, whatever is cached."""

    async def find_providers(self, uid: str, *, again: bool = False) -> tuple[Provider, ...]:
        """Who hosts a uid; `again` reads from the network, whatever is cached."""

    async def find_experts(self, pattern: str) -> list[ExpertRecord]:
        """Every (uid, provider) that a pattern matches."""

    def mark_unreachable(
        self,
        peer_id: PeerId,
        for_s: float,
        *,
        endpoint: Endpoint | None = None,
        uid: str | None = None,
        sequence: int | None = None,
    ) -> None:
        """Leave this peer out of every answer for a while; or only at one endpoint, or with one expert; any thread.

        Records that were declared after `sequence` are heeded all the same.
        """

    def mark_reachable(self, peer_id: PeerId) -> None:
        """Forget that, in all its forms."""

    @property
    def is_fixed(self) -> bool:
        """Whether nobody can appear who is not known already: then nobody is waited for."""


@dataclass(frozen=True)
class ExpertInfo:
    """Schemas of an expert, as its provider states them and as their digest proves."""

    forward_schema: Any
    outputs_schema: Any
    inputs: tuple[BatchTensorProto, ...]
    outputs: tuple[BatchTensorProto, ...]
    schema_digest: str
    repeatable: frozenset[str] = frozenset(MODES)
    """The modes in which an answer's row depends on its own input row alone: nothing is drawn, nothing mixed."""
    draws: frozenset[str] = frozenset()
    """The modes in which it draws random numbers."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertInfo:
        """Itself: it never changes."""
        return self

    @cached_property
    def takes_plain_args(self) -> bool:
        """Whether the arguments are positional tensors without nesting or keywords."""
        args, kwargs = self.forward_schema
        return not kwargs and all(isinstance(each, BatchTensorProto) for each in args)

    @cached_property
    def pack_outputs(self) -> Callable[[Iterable[Any]], Any]:
        """Puts flat outputs into the structure of the schema."""
        return nested_packer(self.outputs_schema)

    @classmethod
    def from_json(cls, document: Any, *, expected_digest: str) -> ExpertInfo:
        """From the answer of a provider. Raises DecodeError, also when the digest is not the announced one."""
        if not isinstance(document, dict):
            raise DecodeError(f"an info document must be an object, got {type(document).__name__}")
        forward = schema_from_json(document.get("forward_schema"))
        outputs = schema_from_json(document.get("outputs_schema"))
        if not (isinstance(forward, tuple) and len(forward) == 2 and isinstance(forward[0], tuple)):
            raise DecodeError("forward_schema must be a pair of positional and keyword arguments")
        if not isinstance(forward[1], dict):
            raise DecodeError("keyword arguments of a forward_schema must be a dict")
        inputs, flat_outputs = nested_flatten(forward), nested_flatten(outputs)
        if not inputs or not flat_outputs:
            raise DecodeError("an expert takes and gives at least one tensor")
        digest = schema_digest(forward, outputs)
        if digest != expected_digest:
            raise DecodeError(f"the schema's digest is {digest}, the directory announced {expected_digest}")
        repeatable = _modes_of(document, "repeatable", MODES)
        return cls(forward, outputs, inputs, flat_outputs, digest, repeatable, _modes_of(document, "draws", ()))


def _modes_of(document: dict[str, Any], key: str, default: Iterable[str]) -> frozenset[str]:
    stated = document.get(key, default)
    if not isinstance(stated, (list, tuple)):
        raise DecodeError(f"{key} must be a list of modes")
    return frozenset(mode for mode in MODES if mode in stated)


class StaticDirectory:
    """Fixed providers. Peers marked unreachable stay out until they are marked reachable."""

    def __init__(self, providers: Mapping[str, Iterable[Provider]]) -> None:
        self._providers = {uid: tuple(each) for uid, each in providers.items()}
        self._left_out = LeftOut()

    def __repr__(self) -> str:
        return f"<StaticDirectory: {len(self._providers)} experts>"

    def announce(self, uid: str, provider: Provider) -> None:
        """One more provider of a uid."""
        self._providers[uid] = (*self._providers.get(uid, ()), provider)

    def withdraw(self, peer_id: PeerId) -> None:
        """A peer provides nothing any more."""
        self._providers = {
            uid: tuple(each for each in providers if each.peer_id != peer_id)
            for uid, providers in self._providers.items()
        }

    def cached_prefix(self, prefix: str) -> Children | None:
        """See `Directory`."""
        return self._children(prefix, self._left_out)

    def announced(self, prefix: str) -> Children:
        """See `Directory`."""
        return self._children(prefix, LeftOut())

    async def get_prefixes(self, prefixes: Sequence[str]) -> dict[str, Children]:
        """See `Directory`."""
        return {prefix: self.cached_prefix(prefix) or {} for prefix in prefixes}

    async def read_again(self, prefixes: Sequence[str]) -> dict[str, Children]:
        """See `Directory`."""
        return await self.get_prefixes(prefixes)

    async def find_providers(self, uid: str, *, again: bool = False) -> tuple[Provider, ...]:
        """See `Directory`."""
        parse_uid(uid)
        return self._live(uid)

    async def find_experts(self, pattern: str) -> list[ExpertRecord]:
        """See `Directory`."""
        parsed = UidPattern.parse(pattern)
        return [
            ExpertRecord(uid, each.peer_id, each.endpoint, each.schema_digest, each.expires_at, 0.0)
            for uid in sorted(self._providers)
            if parsed.matches(uid)
            for each in self._live(uid)
        ]

    async def find_names(self) -> dict[str, tuple[PeerId, ...]]:
        """The names in front of the uids, each with its peers."""
        names: dict[str, dict[PeerId, None]] = {}
        for uid in self._providers:
            names.setdefault(parse_uid(uid).name, {}).update(dict.fromkeys(each.peer_id for each in self._live(uid)))
        return {name: tuple(peers) for name, peers in names.items() if peers}

    is_fixed: Final = True
    """See `Directory`: whoever announces and withdraws here does not do so while a call waits."""

    def mark_unreachable(
        self,
        peer_id: PeerId,
        for_s: float,
        *,
        endpoint: Endpoint | None = None,
        uid: str | None = None,
        sequence: int | None = None,
    ) -> None:
        """See `Directory`."""
        self._left_out = self._left_out.with_one(Absence(peer_id, endpoint, uid, sequence), math.inf)

    def mark_reachable(self, peer_id: PeerId) -> None:
        """See `Directory`."""
        self._left_out = self._left_out.without(peer_id)

    def _live(self, uid: str) -> tuple[Provider, ...]:
        return self._left_out.live(self._providers.get(uid, ()), uid)

    def _children(self, prefix: str, left_out: LeftOut) -> Children:
        children: dict[int, tuple[Provider, ...]] = {}
        for uid, providers in self._providers.items():
            if uid.startswith(prefix):
                coordinate, _, below = uid[len(prefix) :].partition(".")
                live = left_out.live(providers, uid)
                if below:  # a child that is only a prefix has no schema, as in the DHT
                    named = {each.peer_id for each in children.get(int(coordinate), ()) if not each.schema_digest}
                    live = tuple(replace(each, schema_digest="") for each in live if each.peer_id not in named)
                children[int(coordinate)] = children.get(int(coordinate), ()) + live
        return {coordinate: each for coordinate, each in children.items() if each}
