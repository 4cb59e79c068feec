"""Children by prefix, kept while they are fresh, without those who are left out for a while. No I/O.

Read from the user's thread and filled from the DHT's loop: every method is thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from p2pmoe import forks
from p2pmoe.experts.children import NO_CHILDREN, Children, first_expiry
from p2pmoe.experts.left_out import Absence, LeftOut
from p2pmoe.types import Endpoint, PeerId

MAX_PREFIXES: Final = 65_536


@dataclass(slots=True)
class _Entry:
    children: Children
    read_at: float
    fresh_until: float
    shown: Children
    shown_version: int


class ChildrenCache:
    """At most `max_age_s` old, less when a provider expires before; empty answers live `negative_s`."""

    def __init__(self, clock: Callable[[], float], *, max_age_s: float, negative_s: float) -> None:
        self._clock = clock
        self._max_age_s = max_age_s
        self._negative_s = negative_s
        self._lock = threading.Lock()
        forks.tell(self)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._unreachable = LeftOut()  # replaced as a whole: readers without the lock see the old one or the new one
        self._version = 0

    def became_a_child(self) -> None:
        """See `forks`: another thread may have held the lock."""
        self._lock = threading.Lock()

    def get(self, prefix: str) -> Children | None:
        """What is known and fresh, or None. A dictionary look-up when nothing has changed."""
        entry = self._entries.get(prefix)
        now = self._clock()
        if entry is None or now >= entry.fresh_until:
            return None
        return self._shown(prefix, entry, now)

    def filtered(self, children: Children, prefix: str = "") -> Children:
        """Without those who are left out now."""
        self._let_return(self._clock())
        return self._unreachable.applied(children, prefix)

    def announced(self, prefix: str) -> Children | None:
        """What is known and fresh, those who are left out among it."""
        entry = self._entries.get(prefix)
        return None if entry is None or self._clock() >= entry.fresh_until else entry.children

    def read_at(self, prefix: str) -> float:
        """When what is known of a prefix was read; long ago when nothing is."""
        entry = self._entries.get(prefix)
        return float("-inf") if entry is None else entry.read_at

    def put(self, prefix: str, children: Children) -> None:
        now = self._clock()
        age_s = self._max_age_s if children else self._negative_s
        fresh_until = min(now + age_s, first_expiry(children))
        entry = _Entry(children or NO_CHILDREN, now, fresh_until, NO_CHILDREN, -1)
        with self._lock:
            self._entries[prefix] = entry
            self._entries.move_to_end(prefix)
            while len(self._entries) > MAX_PREFIXES:
                self._entries.popitem(last=False)

    def is_ageing(self, prefix: str, share: float) -> bool:
        """True when a fresh entry has lived this share of its time, so that reading ahead pays."""
        entry = self._entries.get(prefix)
        return entry is not None and self._clock() >= entry.read_at + share * (entry.fresh_until - entry.read_at)

    def invalidate(self, prefix: str | None = None) -> None:
        with self._lock:
            if prefix is None:
                self._entries.clear()
            else:
                self._entries.pop(prefix, None)

    def mark_unreachable(
        self,
        peer_id: PeerId,
        for_s: float,
        *,
        endpoint: Endpoint | None = None,
        uid: str | None = None,
        sequence: int | None = None,
    ) -> None:
        """Leave out a peer, or one address or expert of it; see `Absence`."""
        with self._lock:
            absence = Absence(peer_id, endpoint, uid, sequence)
            self._unreachable = self._unreachable.with_one(absence, self._clock() + for_s)
            self._version += 1

    def mark_reachable(self, peer_id: PeerId) -> None:
        with self._lock:
            self._unreachable = self._unreachable.without(peer_id)
            self._version += 1

    def _shown(self, prefix: str, entry: _Entry, now: float) -> Children:
        self._let_return(now)
        version = self._version
        if entry.shown_version != version:
            shown = self._unreachable.applied(entry.children, prefix)
            with self._lock:
                entry.shown, entry.shown_version = shown, version
            return shown
        return entry.shown

    def _let_return(self, now: float) -> None:
        if now < self._unreachable.first_end:
            return
        with self._lock:
            self._unreachable = self._unreachable.after(now)
            self._version += 1

    def __repr__(self) -> str:
        return f"<ChildrenCache {len(self._entries)} prefixes, {len(self._unreachable)} left out>"
