"""Declares experts in the DHT and finds them. Knows nothing of torch, HTTP or what an expert computes.

Under the key of a prefix (`ffn.`, `ffn.3.`) every node keeps one signed bundle that lists its own children there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import ClosedError, EncodeError, P2PMoEError, PeerUnreachableError
from p2pmoe.experts.bundles import pack_bundles, tombstone
from p2pmoe.experts.cache import ChildrenCache
from p2pmoe.experts.children import NO_CHILDREN, Children, Provider, children_of
from p2pmoe.experts.uid import ExpertUid, UidPattern, parse_prefix, parse_uid, prefix_of
from p2pmoe.protocol.records import MAX_PARTS
from p2pmoe.types import Endpoint, PeerId

__all__ = ["Children", "ExpertDirectory", "ExpertRecord", "Provider"]

log = logging.getLogger(__name__)

CACHE_S: Final = 10.0
NEGATIVE_CACHE_S: Final = 3.0
REFRESH_AHEAD: Final = 0.6
"""A cached prefix that is used after this share of its life is read again in the background."""
MAX_PREFIXES_PER_SEARCH: Final = 65_536
MAX_REFRESHES: Final = 1024


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """One expert at one provider. Times are seconds since 1970; `schema_digest` is hex."""

    uid: str
    peer_id: PeerId
    endpoint: Endpoint
    schema_digest: str
    expires_at: float
    declared_at: float


@dataclass(slots=True)
class _Declared:
    """What we have said under one prefix: until when which child with which schema, and how many parts it took."""

    children: dict[tuple[int, str], float] = field(default_factory=dict)
    parts: int = 0
    endpoint: Endpoint | None = None


class ExpertDirectory:
    """Experts by uid, over a DHT node. Every method may be used from any thread or event loop.

    One directory per identity declares: a second one would overwrite the first one's bundles.
    """

    def __init__(
        self,
        dht: DHTNode,
        *,
        clock: Callable[[], float] = time.time,
        cache_s: float = CACHE_S,
        negative_cache_s: float = NEGATIVE_CACHE_S,
    ) -> None:
        self.dht = dht
        self.network_reads = 0
        """Prefixes read over the network so far."""
        self._clock = clock
        self._cache = ChildrenCache(clock, max_age_s=cache_s, negative_s=negative_cache_s)
        self._declared: dict[str, _Declared] = {}
        self._declaring: asyncio.Lock | None = None
        self._reads: dict[str, asyncio.Task[Children]] = {}
        self._refreshing: set[str] = set()

    # --- declaring --------------------------------------------------------------------------------------------

    async def declare(self, schemas: Mapping[str, str], endpoint: Endpoint, ttl_s: float | None = None) -> None:
        """Announce experts for `ttl_s` seconds; call it again before that to keep them announced.

        Args:
            schemas: Uid to the hex digest of its schema (1 to 32 bytes).
            endpoint: Where they are called. Its `public_key` is ours, whatever it says.
            ttl_s: `config.ttl_s` when it is left out.

        Raises:
            InvalidUidError: a uid breaks the grammar.
            EncodeError: a digest or endpoint cannot be written, or a prefix has too many children or schemas.
            BootstrapError, PeerUnreachableError: nobody took some of the records; the rest is announced.
            ClosedError: the DHT node is not running.
        """
        wanted = _by_prefix(schemas)
        ttl = self.dht.config.ttl_s if ttl_s is None else ttl_s
        await self.dht.call(lambda: self._declare(wanted, endpoint, ttl))

    async def withdraw(self, uids: Iterable[str]) -> None:
        """Announce that these are gone. Raises as `declare`; uids that were never declared are ignored."""
        gone = [parse_uid(uid) for uid in uids]
        await self.dht.call(lambda: self._withdraw(gone))

    @property
    def declared_uids(self) -> list[str]:
        """What we announce now."""
        now = self._clock()
        return [
            f"{prefix}{child}"
            for prefix, declared in tuple(self._declared.items())
            for (child, digest), until in tuple(declared.children.items())
            if digest and until > now
        ]

    # --- finding ----------------------------------------------------------------------------------------------

    async def get_prefixes(self, prefixes: Sequence[str]) -> dict[str, Children]:
        """The children of each prefix (`ffn.`, `ffn.3.`), from the cache where it is fresh.

        Raises:
            InvalidUidError: no such prefix.
            BootstrapError: no peer is known.
            ClosedError: the DHT node is not running.
        """
        found = {prefix: self.cached_prefix(prefix) for prefix in prefixes}
        missing = [prefix for prefix, children in found.items() if children is None]
        if missing:
            for prefix in missing:
                parse_prefix(prefix)
            found.update(await self.dht.call(lambda: self._read_all(missing)))
        return {prefix: children or NO_CHILDREN for prefix, children in found.items()}

    def cached_prefix(self, prefix: str) -> Children | None:
        """The children of a prefix if they are in the cache and fresh; None otherwise. No I/O, microseconds.

        An entry that is used late in its life is read again in the background, so that it stays fresh.
        """
        children = self._cache.get(prefix)
        if children is not None and self._cache.is_ageing(prefix, REFRESH_AHEAD):
            self._refresh_ahead(prefix)
        return children

    async def find_experts(self, pattern: str) -> list[ExpertRecord]:
        """Every live expert that a uid, prefix or glob means, one record per provider, in the order of uids.

        Raises:
            InvalidUidError: no such pattern, or it reaches over more than 65,536 prefixes.
            BootstrapError, ClosedError: as `get_prefixes`.
        """
        wanted = UidPattern.parse(pattern)
        level = [wanted.root]
        records: list[ExpertRecord] = []
        visited = 0
        while level:
            visited += len(level)
            if visited > MAX_PREFIXES_PER_SEARCH:
                log.warning("%s reaches over more than %d prefixes; the rest is left out", pattern, visited)
                break
            found = await self.get_prefixes(level)
            level = []
            for prefix, children in found.items():
                _, start = parse_prefix(prefix)
                for child, providers in children.items():
                    uid = ExpertUid(wanted.name, (*start, child))
                    if wanted.matches(uid):
                        records.extend(_record(str(uid), provider) for provider in providers if provider.schema_digest)
                    is_prefix = any(not provider.schema_digest for provider in providers)
                    if is_prefix and wanted.may_contain(uid.name, uid.coordinates):
                        level.append(prefix_of(uid.name, uid.coordinates))
        return sorted(records, key=lambda record: (parse_uid(record.uid), record.peer_id))

    async def find_providers(self, uid: str) -> tuple[Provider, ...]:
        """Who serves an expert now, most recently declared first; empty when nobody does. Raises as `get_prefixes`."""
        parsed = parse_uid(uid)
        children = (await self.get_prefixes([parsed.prefix]))[parsed.prefix]
        providers = [provider for provider in children.get(parsed.suffix, ()) if provider.schema_digest]
        return tuple(sorted(providers, key=lambda provider: -provider.sequence))

    async def first_k_active(self, uids: Sequence[str], k: int) -> dict[str, tuple[Provider, ...]]:
        """The first `k` of these uids that somebody serves, in their order. Raises as `get_prefixes`."""
        parsed = [parse_uid(uid) for uid in uids]
        found = await self.get_prefixes(list(dict.fromkeys(uid.prefix for uid in parsed)))
        active: dict[str, tuple[Provider, ...]] = {}
        for uid in parsed:
            providers = tuple(p for p in found[uid.prefix].get(uid.suffix, ()) if p.schema_digest)
            if providers:
                active[str(uid)] = providers
            if len(active) >= k:
                break
        return active

    def mark_unreachable(self, peer_id: PeerId, for_s: float) -> None:
        """Leave a peer out of every answer, cached ones too, for `for_s` seconds."""
        self._cache.mark_unreachable(peer_id, for_s)

    def mark_reachable(self, peer_id: PeerId) -> None:
        """Take back `mark_unreachable`."""
        self._cache.mark_reachable(peer_id)

    def invalidate(self, prefix: str | None = None) -> None:
        """Forget what was read of one prefix, or of all."""
        self._cache.invalidate(prefix)

    # --- on the DHT's loop ------------------------------------------------------------------------------------

    async def _declare(self, wanted: Mapping[str, Sequence[tuple[int, str]]], endpoint: Endpoint, ttl_s: float) -> None:
        async with self._lock():
            until = self._clock() + ttl_s
            before = {prefix: dict(d.children) for prefix, d in self._declared.items() if prefix in wanted}
            for prefix, children in wanted.items():
                declared = self._declared.setdefault(prefix, _Declared())
                declared.endpoint = endpoint
                # A child has one schema at a time: the new one takes the old one's place.
                numbers = {(child, bool(digest)) for child, digest in children}
                declared.children = {
                    (child, digest): expiry
                    for (child, digest), expiry in declared.children.items()
                    if (child, bool(digest)) not in numbers
                }
                declared.children.update(dict.fromkeys(children, until))
            try:
                await self._publish(wanted, ttl_s)
            except EncodeError:
                for prefix in wanted:
                    self._declared[prefix].children = before.get(prefix, {})
                raise

    async def _withdraw(self, gone: Sequence[ExpertUid]) -> None:
        async with self._lock():
            touched = {}
            for uid in gone:
                touched.update(dict.fromkeys(self._forget(uid)))
            if touched:
                await self._publish(touched, self.dht.config.ttl_s)

    def _forget(self, uid: ExpertUid) -> list[str]:
        """Take a uid out of what we declare, and parent prefixes that have nothing left below them."""
        touched = []
        expert = True
        name, coordinates = uid
        while coordinates:
            prefix, child = prefix_of(name, coordinates[:-1]), coordinates[-1]
            declared = self._declared.get(prefix)
            if declared is None:
                break
            slots = [slot for slot in declared.children if slot[0] == child and bool(slot[1]) == expert]
            for slot in slots:
                del declared.children[slot]
            if slots:
                touched.append(prefix)
            if not slots or declared.children:
                break
            coordinates, expert = coordinates[:-1], False
        return touched

    async def _publish(self, prefixes: Iterable[str], ttl_s: float) -> None:
        now = self._clock()
        values: dict[str, dict[int, bytes]] = {}
        for prefix in prefixes:
            declared = self._declared[prefix]
            declared.children = {slot: until for slot, until in declared.children.items() if until > now}
            assert declared.endpoint is not None
            parts = pack_bundles(declared.endpoint, declared.children)
            # Parts that are no longer needed are overwritten, or they would be believed until they expire.
            parts += [tombstone(declared.endpoint)] * (declared.parts - len(parts))
            values[prefix] = dict(enumerate(parts[:MAX_PARTS]))
        taken = await self.dht.put_many(values, ttl_s)
        for prefix, parts_by_number in values.items():
            self._declared[prefix].parts = max(self._declared[prefix].parts, len(parts_by_number))
            self._cache.invalidate(prefix)
        refused = [prefix for prefix, count in taken.items() if not count]
        if refused:
            raise PeerUnreachableError(
                f"nobody took our records of {', '.join(refused[:5])}{' …' if len(refused) > 5 else ''}; they are "
                f"tried again with the next declaration: check that peers are reachable and the clock is right"
            )

    async def _read_all(self, prefixes: Sequence[str]) -> dict[str, Children]:
        found = await asyncio.gather(*(self._read(prefix) for prefix in prefixes))
        return {prefix: self._cache.filtered(each) for prefix, each in zip(prefixes, found, strict=True)}

    async def _read(self, prefix: str) -> Children:
        """One network read per prefix, however many ask at the same time."""
        task = self._reads.get(prefix)
        if task is None:
            task = self._reads[prefix] = asyncio.create_task(self._read_network(prefix))
            task.add_done_callback(lambda _: self._reads.pop(prefix, None))
        # One caller that gives up does not end the read of the others.
        return await asyncio.shield(task)

    async def _read_network(self, prefix: str) -> Children:
        self.network_reads += 1
        children = children_of(await self.dht.get(prefix))
        self._cache.put(prefix, children)
        return children

    def _refresh_ahead(self, prefix: str) -> None:
        if prefix in self._refreshing or len(self._refreshing) >= MAX_REFRESHES:
            return
        self._refreshing.add(prefix)
        try:
            self.dht.submit(lambda: self._refresh(prefix))
        except ClosedError:
            self._refreshing.discard(prefix)

    async def _refresh(self, prefix: str) -> None:
        try:
            await self._read(prefix)
        except P2PMoEError as error:
            log.debug("refreshing %s failed: %s", prefix, error)
        finally:
            self._refreshing.discard(prefix)

    def _lock(self) -> asyncio.Lock:
        # Made on the DHT's loop, where alone it is used.
        if self._declaring is None:
            self._declaring = asyncio.Lock()
        return self._declaring

    def __repr__(self) -> str:
        return f"<ExpertDirectory {self._cache!r}, {self.network_reads} network reads>"


def _by_prefix(schemas: Mapping[str, str]) -> dict[str, list[tuple[int, str]]]:
    """Experts and the prefixes above them, under the prefix that lists them."""
    wanted: dict[str, dict[tuple[int, str], None]] = {}
    for text, digest in schemas.items():
        uid = parse_uid(text)
        if not digest:
            raise EncodeError(f"{text} needs the digest of its schema, in hex")
        wanted.setdefault(uid.prefix, {})[uid.suffix, digest.lower()] = None
        for depth in range(1, len(uid.coordinates)):
            prefix = prefix_of(uid.name, uid.coordinates[: depth - 1])
            wanted.setdefault(prefix, {})[uid.coordinates[depth - 1], ""] = None
    return {prefix: list(children) for prefix, children in wanted.items()}


def _record(uid: str, provider: Provider) -> ExpertRecord:
    return ExpertRecord(
        uid,
        provider.peer_id,
        provider.endpoint,
        provider.schema_digest,
        provider.expires_at,
        provider.sequence / 1e6,
    )
