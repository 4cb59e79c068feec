"""What we say we have, as the bundles to publish. Synchronous; knows no DHT; time is passed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pmoe.errors import ConfigError, DelegationError, EncodeError
from p2pmoe.experts.bundles import MAX_CHILDREN, pack_bundles, tombstone
from p2pmoe.experts.uid import ExpertUid, parse_uid, prefix_of
from p2pmoe.protocol.records import MAX_PARTS, MAX_VALUE_BYTES
from p2pmoe.types import Endpoint

Child = tuple[int, str]
"""A child's number and its schema digest in hex, empty for a child that is only a prefix."""
Values = dict[str, dict[int, bytes]]
"""Record values by prefix and part."""
ANY_DIGEST: Final = "00" * 8
"""Stands for a digest that is not known yet."""
_LONGEST: Final = Endpoint("255.255.255.255", 65535, "https")


@dataclass(slots=True)
class _Declared:
    endpoint: Endpoint
    children: dict[Child, float] = field(default_factory=dict)
    """Until when each is declared."""
    parts: int = 0
    published_until: float = 0.0


class Declarations:
    """Everything declared and not yet withdrawn or expired, by prefix.

    `max_value_bytes` says how long a record's value may be now; where it raises, nothing can be published.
    """

    def __init__(self, max_value_bytes: Callable[[], int] = lambda: MAX_VALUE_BYTES) -> None:
        self._max_value_bytes = max_value_bytes
        self._by_prefix: dict[str, _Declared] = {}

    def add(self, wanted: Mapping[str, Sequence[Child]], endpoint: Endpoint, now: float, ttl_s: float) -> Values:
        """Declare children (see `by_prefix`) for `ttl_s`; returns what to publish.

        Raises EncodeError or DelegationError, with everything as it was before, when a prefix cannot be written.
        """
        before = dict(self._by_prefix)
        for prefix, children in wanted.items():
            old = before.get(prefix) or _Declared(endpoint)
            # A child has one schema at a time: the new one takes the old one's place.
            replaced = {(child, bool(digest)) for child, digest in children}
            kept = {child: until for child, until in old.children.items() if (child[0], bool(child[1])) not in replaced}
            kept.update(dict.fromkeys(children, now + ttl_s))
            self._by_prefix[prefix] = _Declared(endpoint, kept, old.parts, old.published_until)
        try:
            return self._values(wanted, now, ttl_s)
        except (EncodeError, DelegationError):
            self._by_prefix = before
            raise

    def remove(self, uids: Iterable[ExpertUid], now: float, ttl_s: float) -> tuple[Values, float]:
        """Withdraw experts; returns what to publish and for how long.

        The bundles without them must outlive those with them, or a holder that missed the withdrawal brings them back.
        """
        touched = {prefix: None for uid in uids for prefix in self._forget(uid)}
        for prefix in touched:
            ttl_s = max(ttl_s, self._by_prefix[prefix].published_until - now)
        return self._values(touched, now, ttl_s), ttl_s

    def uids(self, now: float) -> list[str]:
        """The experts that are declared now."""
        return [
            f"{prefix}{child}"
            for prefix, declared in tuple(self._by_prefix.items())
            for (child, digest), until in tuple(declared.children.items())
            if digest and until > now
        ]

    def _forget(self, uid: ExpertUid) -> list[str]:
        """Take a uid out, and parent prefixes that have nothing left below them."""
        touched = []
        is_expert = True
        name, coordinates = uid
        while coordinates:
            prefix, child = prefix_of(name, coordinates[:-1]), coordinates[-1]
            declared = self._by_prefix.get(prefix)
            gone = (
                [each for each in declared.children if each[0] == child and bool(each[1]) == is_expert]
                if declared
                else []
            )
            if declared is None or not gone:
                break
            for each in gone:
                del declared.children[each]
            touched.append(prefix)
            if declared.children:
                break
            coordinates, is_expert = coordinates[:-1], False
        return touched

    def _values(self, prefixes: Iterable[str], now: float, ttl_s: float) -> Values:
        values: Values = {}
        max_bytes = self._max_value_bytes()
        for prefix in prefixes:
            declared = self._by_prefix[prefix]
            declared.children = {child: until for child, until in declared.children.items() if until > now}
            parts = pack_bundles(declared.endpoint, declared.children, max_bytes)
            # Parts that are no longer needed are overwritten, or they would be believed until they expire.
            parts += [tombstone(declared.endpoint)] * (declared.parts - len(parts))
            values[prefix] = dict(enumerate(parts[:MAX_PARTS]))
        for prefix, parts_by_number in values.items():
            declared = self._by_prefix[prefix]
            declared.parts = max(declared.parts, len(parts_by_number))
            declared.published_until = max(declared.published_until, now + ttl_s)
        return values

    def __repr__(self) -> str:
        count = sum(len(declared.children) for declared in self._by_prefix.values())
        return f"<Declarations {count} children under {len(self._by_prefix)} prefixes>"


def check_announceable(
    schemas: Mapping[str, str], endpoint: Endpoint = _LONGEST, max_value_bytes: int = MAX_VALUE_BYTES
) -> None:
    """Whether these experts (uid to schema digest) can be announced at all, before anybody is asked.

    Raises:
        ConfigError: a prefix would take more records than a node may have there, or the endpoint cannot be written.
        InvalidUidError: a uid breaks the grammar.
    """
    for prefix, children in by_prefix(schemas).items():
        try:
            pack_bundles(endpoint, children, max_value_bytes)
        except EncodeError as error:
            raise ConfigError(
                f"experts below {prefix} cannot be announced: {error}; a grid with one more dimension, such as "
                f"{prefix}[0:64].[0:64], has fewer below each prefix"
                if len(children) > MAX_CHILDREN
                else f"experts below {prefix} cannot be announced: {error}"
            ) from error


def by_prefix(schemas: Mapping[str, str]) -> dict[str, list[Child]]:
    """Experts and the prefixes above them, under the prefix that lists them.

    Raises InvalidUidError for a uid that is none and EncodeError for a digest that is empty.
    """
    wanted: dict[str, dict[Child, None]] = {}
    for text, digest in schemas.items():
        uid = parse_uid(text)
        if not digest:
            raise EncodeError(f"{text} needs the digest of its schema, in hex")
        wanted.setdefault(uid.prefix, {})[uid.suffix, digest.lower()] = None
        for depth in range(1, len(uid.coordinates)):
            prefix = prefix_of(uid.name, uid.coordinates[: depth - 1])
            wanted.setdefault(prefix, {})[uid.coordinates[depth - 1], ""] = None
    return {prefix: list(children) for prefix, children in wanted.items()}
