"""Which backward calls an expert's parameters have seen: what its next checkpoint says of them. Any thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from p2pmoe.server.replay import MAX_IDS, WINDOW_S

MAX_KEPT_IDS: Final = 10_000
"""Of one expert in one checkpoint, the newest."""


class AppliedCalls:
    """Ids of the last `WINDOW_S` seconds, `MAX_IDS` of all experts together, as `ReplayWindow` has them."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._order: deque[str] = deque()  # the uid of each, oldest first
        self._calls: dict[str, deque[tuple[str, float]]] = {}

    def __repr__(self) -> str:
        return f"<AppliedCalls: {len(self._order)} ids of {len(self._calls)} experts>"

    def add(self, uid: str, call_ids: Iterable[str]) -> None:
        """These were applied just now."""
        now = self._clock()
        with self._lock:
            for call_id in call_ids:
                self._append(uid, call_id, now)
            self._prune(now)

    def restore(self, applied: Iterable[tuple[str, str, float]]) -> None:
        """Ids, uids and ages in seconds that checkpoints told of."""
        now = self._clock()
        with self._lock:
            for call_id, uid, age_s in sorted(applied, key=lambda each: -each[2]):
                self._append(uid, call_id, now - age_s)
            self._prune(now)

    def of(self, uid: str) -> list[tuple[str, float]]:
        """The newest ids of an expert with their ages in seconds, oldest first."""
        now = self._clock()
        with self._lock:
            calls = list(self._calls.get(uid, ()))
        return [(call_id, now - at) for call_id, at in calls[-MAX_KEPT_IDS:] if now - at < WINDOW_S]

    # -- private, with the lock held

    def _append(self, uid: str, call_id: str, at: float) -> None:
        self._order.append(uid)
        self._calls.setdefault(uid, deque()).append((call_id, at))

    def _prune(self, now: float) -> None:
        while self._order:
            calls = self._calls[self._order[0]]
            if len(self._order) <= MAX_IDS and now - calls[0][1] < WINDOW_S:
                break
            calls.popleft()
            if not calls:
                del self._calls[self._order[0]]
            self._order.popleft()
