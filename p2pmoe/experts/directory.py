"""Declares experts in the DHT and finds them. Knows nothing of torch, HTTP or what an expert computes.

Under the key of a prefix (`ffn.`, `ffn.3.`) every node keeps one signed bundle that lists its own children there.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from p2pmoe.config import one_or_more
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import ClosedError, P2PMoEError, PeerUnreachableError
from p2pmoe.experts.cache import ChildrenCache
from p2pmoe.experts.children import NO_CHILDREN, Children, Provider, children_of
from p2pmoe.experts.declarations import Child, Declarations, Values, by_prefix, check_announceable
from p2pmoe.experts.names import NAMES_REFRESH_S, NAMES_TTL_S, ROOT, names_of, pack_names
from p2pmoe.experts.own_slots import OwnSlots
from p2pmoe.experts.uid import ExpertUid, UidPattern, parse_prefix, parse_uid, prefix_of
from p2pmoe.faults import unexpected, watch
from p2pmoe.seldom import Seldom
from p2pmoe.types import Endpoint, PeerId

__all__ = ["Children", "ExpertDirectory", "ExpertRecord", "Provider"]

log = logging.getLogger(__name__)

CACHE_S: Final = 10.0
NEGATIVE_CACHE_S: Final = 3.0
REFRESH_AHEAD: Final = 0.6
"""A cached prefix that is used after this share of its life is read again in the background."""
MAX_PREFIXES_PER_SEARCH: Final = 65_536
PREFIXES_AT_ONCE: Final = 256
SEARCH_S: Final = 8.0
"""How long a search goes on reading; what it has found by then is its result."""
MAX_REFRESHES: Final = 1024
READ_AGAIN_S: Final = 0.5
"""How old may be what is read again: many callers of one dead expert are one reader."""


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """One expert at one provider. Times are seconds since 1970; `schema_digest` is hex.

    `signature` is "valid" when the provider's key signed the record that says so: the directory returns no other,
    and counts those it left out (`forged_records`). It is "none" for providers that did not come from records.
    `scope` is None in an open swarm; in a closed one the prefix that the owner's delegation covers, empty for all.
    """

    uid: str
    peer_id: PeerId
    endpoint: Endpoint
    schema_digest: str
    expires_at: float
    declared_at: float
    signature: Literal["valid", "none"] = "none"
    scope: str | None = None


class ExpertDirectory:
    """Experts by uid, over a DHT node. Every method may be used from any thread or event loop.

    One directory per identity declares: a second one would overwrite the first one's bundles. `readdress` gives the
    endpoint to announce in the place of the one declared: peers' reports of our address come in as time goes on.
    """

    def __init__(
        self,
        dht: DHTNode,
        *,
        clock: Callable[[], float] = time.time,
        cache_s: float = CACHE_S,
        negative_cache_s: float = NEGATIVE_CACHE_S,
        readdress: Callable[[Endpoint], Endpoint] = lambda endpoint: endpoint,
        search_s: float = SEARCH_S,
    ) -> None:
        self.dht = dht
        self.network_reads = 0
        """Prefixes read over the network so far."""
        self._clock = clock
        self._readdress = readdress
        self._search_s = search_s
        self._cache = ChildrenCache(clock, max_age_s=cache_s, negative_s=negative_cache_s)
        self._declarations = Declarations(lambda: dht.signer.max_value_bytes)
        self._own_slots = OwnSlots(dht)
        self._too_wide = Seldom()
        self._names: set[str] = set()
        self._names_at = 0.0
        self._name_parts = 0
        self._declaring: asyncio.Lock | None = None
        self._reads: dict[str, asyncio.Task[Children]] = {}
        self._refreshing: set[str] = set()

    @property
    def forged_records(self) -> int:
        """Records with a wrong signature that were read so far, and left out."""
        return self.dht.server.forged

    @property
    def undelegated_records(self) -> int:
        """In a closed swarm: records without the owner's leave that were read so far, and left out."""
        return self.dht.server.undelegated

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
            DelegationError: in a closed swarm, we have no delegation that covers all of them now.
            IdentityError: a second node holds our key, and is the one that goes on.
            BootstrapError, PeerUnreachableError: nobody took some of the records; the rest is announced.
            ClosedError: the DHT node is not running.
        """
        wanted = by_prefix(schemas)
        for uid in schemas:
            self.dht.signer.require_scope(uid)
        ttl = self.dht.config.ttl_s if ttl_s is None else ttl_s
        await self.dht.call(lambda: self._declare(wanted, self._readdress(endpoint), ttl))

    def check(self, schemas: Mapping[str, str]) -> None:
        """Raise what `declare` would raise for good, without asking anybody.

        Raises:
            InvalidUidError: a uid breaks the grammar.
            ConfigError: there are too many below a prefix.
            DelegationError: in a closed swarm, we have no delegation that covers all of them now.
        """
        signer = self.dht.signer
        if schemas:
            check_announceable(schemas, max_value_bytes=signer.max_value_bytes)
        for uid in schemas:
            signer.require_scope(uid)

    async def withdraw(self, uids: str | Iterable[str]) -> None:
        """Announce that these are gone. Raises as `declare`; uids that were never declared are ignored."""
        gone = [parse_uid(uid) for uid in one_or_more(uids)]
        await self.dht.call(lambda: self._withdraw(gone))

    @property
    def declared_uids(self) -> list[str]:
        """What we announce now."""
        return self._declarations.uids(self._clock())

    # --- finding ----------------------------------------------------------------------------------------------

    async def get_prefixes(self, prefixes: Sequence[str], *, fresh: bool = False) -> dict[str, Children]:
        """The children of each prefix (`ffn.`, `ffn.3.`), from the cache where it is fresh; if `fresh`, never from it.

        Raises:
            InvalidUidError: no such prefix.
            BootstrapError: no peer is known.
            ClosedError: the DHT node is not running.
        """
        found = {prefix: None if fresh else self.cached_prefix(prefix) for prefix in prefixes}
        missing = [prefix for prefix, children in found.items() if children is None]
        if missing:
            for prefix in missing:
                parse_prefix(prefix)
            newer_than = math.inf if fresh else None
            found.update(await self.dht.call(lambda: self._read_all(missing, newer_than=newer_than)))
        return {prefix: children or NO_CHILDREN for prefix, children in found.items()}

    def cached_prefix(self, prefix: str) -> Children | None:
        """The children of a prefix if they are in the cache and fresh; None otherwise. No I/O, microseconds.

        An entry that is used late in its life is read again in the background, so that it stays fresh.
        """
        children = self._cache.get(prefix)
        if children is not None and self._cache.is_ageing(prefix, REFRESH_AHEAD):
            self._refresh_ahead(prefix)
        return children

    async def read_again(self, prefixes: Sequence[str]) -> dict[str, Children]:
        """`get_prefixes` from the network, whatever is cached, however many ask: what a peer announced just now counts.

        What was read within the last `READ_AGAIN_S` is not read again. Raises as `get_prefixes`.
        """
        for prefix in prefixes:
            parse_prefix(prefix)
        return await self.dht.call(lambda: self._read_all(prefixes, newer_than=self._clock() - READ_AGAIN_S))

    def announced(self, prefix: str) -> Children:
        """The children of a prefix as they were read last, peers that are left out for a while among them. No I/O."""
        return self._cache.announced(prefix) or NO_CHILDREN

    async def find_experts(self, pattern: str) -> list[ExpertRecord]:
        """Every live expert that a uid, prefix or glob means, one record per provider, in the order of uids.

        Raises:
            InvalidUidError: no such pattern, or it reaches over more than 65,536 prefixes.
            BootstrapError, ClosedError: as `get_prefixes`.
        """
        wanted = UidPattern.parse(pattern)
        level: list[str] = [wanted.root]
        records: list[ExpertRecord] = []
        visited = 0
        until = time.monotonic() + self._search_s
        while level:
            below: dict[str, list[PeerId]] = {}
            room = MAX_PREFIXES_PER_SEARCH - visited
            for start in range(0, min(len(level), room), PREFIXES_AT_ONCE):
                if start and time.monotonic() > until:
                    room = start
                    break
                found = await self.get_prefixes(level[start : min(start + PREFIXES_AT_ONCE, room)])
                for prefix, children in found.items():
                    _gather(wanted, prefix, children, records, below)
            visited += len(level)
            left_out = len(level) - room
            if left_out > 0 and (more := self._too_wide.note()) is not None:
                log.warning("%s reaches over %d prefixes; %d are left out%s", pattern, visited, left_out, more)
            level = _in_turn(below)
        return sorted(records, key=lambda record: (parse_uid(record.uid), record.peer_id))

    async def find_names(self) -> Mapping[str, tuple[PeerId, ...]]:
        """The names in front of the swarm's uids (`ffn`), each with the peers that say so; some may be gone by now.

        Raises BootstrapError or ClosedError as `get_prefixes`.
        """
        self.network_reads += 1
        return names_of(await self.dht.get(ROOT))

    async def find_providers(self, uid: str, *, again: bool = False) -> tuple[Provider, ...]:
        """Who serves an expert now, most recently declared first; empty when nobody does. Raises as `get_prefixes`.

        `again` reads the records anew, see `read_again`.
        """
        parsed = parse_uid(uid)
        read = self.read_again if again else self.get_prefixes
        children = (await read([parsed.prefix]))[parsed.prefix]
        providers = [provider for provider in children.get(parsed.suffix, ()) if provider.schema_digest]
        return tuple(sorted(providers, key=lambda provider: -provider.sequence))

    async def first_k_active(self, uids: str | Sequence[str], k: int) -> dict[str, tuple[Provider, ...]]:
        """The first `k` of these uids that somebody serves, in their order. Raises as `get_prefixes`."""
        parsed = [parse_uid(uid) for uid in one_or_more(uids)]
        found = await self.get_prefixes(list(dict.fromkeys(uid.prefix for uid in parsed)))
        active: dict[str, tuple[Provider, ...]] = {}
        for uid in parsed:
            providers = tuple(p for p in found[uid.prefix].get(uid.suffix, ()) if p.schema_digest)
            if providers:
                active[str(uid)] = providers
            if len(active) >= k:
                break
        return active

    is_fixed: Final = False
    """Somebody may appear whom nobody knows yet."""

    def mark_unreachable(
        self,
        peer_id: PeerId,
        for_s: float,
        *,
        endpoint: Endpoint | None = None,
        uid: str | None = None,
        sequence: int | None = None,
    ) -> None:
        """Leave this peer out of every answer for a while; or only at one endpoint, or with one expert.

        Records that were declared after `sequence` are heeded all the same.
        """
        self._cache.mark_unreachable(peer_id, for_s, endpoint=endpoint, uid=uid, sequence=sequence)

    def mark_reachable(self, peer_id: PeerId) -> None:
        """Take back `mark_unreachable`, in all its forms."""
        self._cache.mark_reachable(peer_id)

    def invalidate(self, prefix: str | None = None) -> None:
        """Forget what was read of one prefix, or of all."""
        self._cache.invalidate(prefix)

    # --- on the DHT's loop ------------------------------------------------------------------------------------

    async def _declare(self, wanted: Mapping[str, Sequence[Child]], endpoint: Endpoint, ttl_s: float) -> None:
        async with self._lock():
            await self._own_slots.require_ours(endpoint)
            await self._publish(self._declarations.add(wanted, endpoint, self._clock(), ttl_s), ttl_s)
            await self._publish_names()

    async def _withdraw(self, gone: Sequence[ExpertUid]) -> None:
        async with self._lock():
            values, ttl_s = self._declarations.remove(gone, self._clock(), self.dht.config.ttl_s)
            if values and not self._own_slots.is_yielding:
                await self._publish(values, ttl_s)
                await self._publish_names()

    async def _publish_names(self) -> None:
        """Only when they have changed or grow old. Whoever misses them can still ask for `ffn.`."""
        names = {parse_uid(uid).name for uid in self._declarations.uids(self._clock())}
        if names == self._names and self._clock() < self._names_at + NAMES_REFRESH_S:
            return
        parts = pack_names(names, self.dht.signer.max_value_bytes)
        parts += [pack_names(())[0]] * (self._name_parts - len(parts))
        taken = await self.dht.put_many({ROOT: dict(enumerate(parts))}, NAMES_TTL_S)
        if taken[ROOT]:
            self._names, self._names_at, self._name_parts = names, self._clock(), len(parts)

    async def _publish(self, values: Values, ttl_s: float) -> None:
        taken = await self.dht.put_many(values, ttl_s)
        self._own_slots.wrote(values)
        for prefix in values:
            self._cache.invalidate(prefix)
        refused = [prefix for prefix, count in taken.items() if not count]
        if refused:
            raise PeerUnreachableError(
                f"nobody took our records of {', '.join(refused[:5])}{' …' if len(refused) > 5 else ''}; they are "
                f"tried again with the next declaration: check that peers are reachable and the clock is right"
            )

    async def _read_all(self, prefixes: Sequence[str], *, newer_than: float | None = None) -> dict[str, Children]:
        found = await asyncio.gather(
            *(
                self._read(prefix, ahead=newer_than is not None and self._cache.read_at(prefix) < newer_than)
                for prefix in prefixes
            )
        )
        return {prefix: self._cache.filtered(each, prefix) for prefix, each in zip(prefixes, found, strict=True)}

    async def _read(self, prefix: str, *, ahead: bool = False) -> Children:
        """One network read per prefix, however many ask at the same time."""
        # Somebody else's read may have ended between the caller's thread and this loop.
        cached = self._cache.get(prefix) if not ahead else None
        if cached is not None:
            return cached
        task = self._reads.get(prefix)
        if task is None:
            task = self._reads[prefix] = asyncio.create_task(self._read_network(prefix))
            task.add_done_callback(lambda _: self._reads.pop(prefix, None))
            watch(task, f"reading {prefix}")  # those who asked may have left
        # One caller that gives up does not end the read of the others.
        return await asyncio.shield(task)

    async def _read_network(self, prefix: str) -> Children:
        self.network_reads += 1
        children = children_of(await self.dht.get(prefix), prefix)
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
            await self._read(prefix, ahead=True)
        except P2PMoEError as error:
            log.debug("refreshing %s failed: %s", prefix, error)
        except Exception as error:  # noqa: BLE001 - nobody waits for a refresh
            unexpected(f"refreshing {prefix}", error)
        finally:
            self._refreshing.discard(prefix)

    def _lock(self) -> asyncio.Lock:
        # Made on the DHT's loop, where alone it is used.
        if self._declaring is None:
            self._declaring = asyncio.Lock()
        return self._declaring

    def __repr__(self) -> str:
        return f"<ExpertDirectory {self._cache!r}, {self.network_reads} network reads>"


def _gather(
    wanted: UidPattern,
    prefix: str,
    children: Children,
    records: list[ExpertRecord],
    below: dict[str, list[PeerId]],
) -> None:
    """Add a prefix's experts to `records`, and to `below` the prefixes there and who says that there is something."""
    _, start = parse_prefix(prefix)
    for child, providers in children.items():
        uid = ExpertUid(wanted.name, (*start, child))
        if wanted.matches(uid):
            records.extend(_record(str(uid), provider) for provider in providers if provider.schema_digest)
        peers = [provider.peer_id for provider in providers if not provider.schema_digest]
        if peers and wanted.may_contain(uid.name, uid.coordinates):
            below[prefix_of(uid.name, uid.coordinates)] = peers


def _in_turn(prefixes: Mapping[str, Sequence[PeerId]]) -> list[str]:
    """Of every peer one prefix after the other: who names thousands of empty ones delays mostly its own."""
    named: Counter[PeerId] = Counter()
    turns: dict[str, int] = {}
    for prefix, peers in prefixes.items():
        turns[prefix] = min(named[peer] for peer in peers)
        named.update(peers)
    return sorted(prefixes, key=turns.__getitem__)


def _record(uid: str, provider: Provider) -> ExpertRecord:
    return ExpertRecord(
        uid,
        provider.peer_id,
        provider.endpoint,
        provider.schema_digest,
        provider.expires_at,
        provider.sequence / 1e6,
        "valid",
        provider.scope,
    )
