"""Whom to believe: evidence of lies by peer, how it fades, who is asked first. No I/O; the clock is handed in.

Rules:
1. Evidence adds up to a score, which halves every `HALF_LIFE_S`. From `LAST_AT` on a peer is asked last, from `SHUN_AT`
   on not at all for `SHUN_S`, twice as long each time that it comes to that again.
2. A reply that breaks the wire format or the schema, or that nobody asked for, is proof: no honest node sends one.
   So is the answer that two others contradict. Non-finite numbers count half: an expert may have diverged.
3. Of two peers that contradict each other nobody knows which one lies. Both lose a little, once for each opponent
   however often they meet: an honest peer beside one liar stays good, a liar beside many honest ones sinks.
4. Contradictions alone never shun: providers that were trained apart contradict each other and are honest.
5. Honest answers buy nothing back, only time does: otherwise a liar would lie every tenth time.
6. The table is bounded; the peers with the least evidence are forgotten first, so that new names push out no proof.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from p2pmoe import forks
from p2pmoe.experts.directory import Provider
from p2pmoe.types import PeerId

Evidence = Literal["broken_reply", "non_finite", "outvoted"]
Verdict = Literal["good", "last", "shunned"]

WEIGHTS: Final[dict[Evidence, float]] = {"broken_reply": 1.0, "non_finite": 0.5, "outvoted": 1.0}
CONTRADICTION: Final = 0.3
"""What one opponent costs; below LAST_AT, see rule 3."""
MAX_CONTRADICTIONS: Final = 2.0
"""What all opponents together cost at most; below SHUN_AT, see rule 4."""
LAST_AT: Final = 0.4
SHUN_AT: Final = 2.4
MAX_SCORE: Final = 6.0
HALF_LIFE_S: Final = 600.0
SHUN_S: Final = 60.0
MAX_SHUN_S: Final = 3600.0
MAX_PEERS: Final = 4096
MAX_OPPONENTS: Final = 16
_FORGOTTEN_BELOW: Final = 0.05


@dataclass(slots=True)
class _Entry:
    score: float = 0.0
    noted_at: float = 0.0
    shunned_until: float = float("-inf")
    shuns: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    opponents: dict[PeerId, float] = field(default_factory=dict)
    """Who contradicted it, and when last."""


@dataclass(frozen=True, slots=True)
class PeerStanding:
    """What is held against one peer. `counts` by kind of evidence; `shunned_for_s` is 0 unless it is shunned."""

    peer_id: PeerId
    verdict: Verdict
    score: float
    shunned_for_s: float
    counts: dict[str, int]


class Standing:
    """Evidence by peer. Any thread; `order` and `verdict` take no lock and cost nothing while nobody has lied."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        forks.tell(self)
        self._entries: dict[PeerId, _Entry] = {}

    def __repr__(self) -> str:
        shunned = sum(each.verdict == "shunned" for each in self.snapshot())
        return f"<Standing: evidence against {len(self._entries)} peers, {shunned} shunned>"

    def became_a_child(self) -> None:
        """See `forks`: another thread may have held the lock."""
        self._lock = threading.Lock()

    # -- asking

    def verdict(self, peer_id: PeerId) -> Verdict:
        """How a peer is to be treated now."""
        entry = self._entries.get(peer_id)
        return "good" if entry is None else _verdict(entry, self._clock())

    def shunned_for_s(self, peer_id: PeerId) -> float:
        """Seconds until a shunned peer may be asked again; 0 for all others."""
        entry = self._entries.get(peer_id)
        return 0.0 if entry is None else max(0.0, entry.shunned_until - self._clock())

    def order(self, providers: tuple[Provider, ...]) -> tuple[Provider, ...]:
        """The good ones, then those to be asked last, each in the order given; shunned ones are left out."""
        if not self._entries:
            return providers
        verdicts = [self.verdict(provider.peer_id) for provider in providers]
        return tuple(
            provider
            for wanted in ("good", "last")
            for provider, verdict in zip(providers, verdicts, strict=True)
            if verdict == wanted
        )

    def snapshot(self) -> list[PeerStanding]:
        """Everybody against whom there is evidence, worst first."""
        with self._lock:
            now = self._clock()
            known = [
                PeerStanding(
                    peer_id,
                    _verdict(entry, now),
                    _total(entry, now),
                    max(0.0, entry.shunned_until - now),
                    dict(entry.counts),
                )
                for peer_id, entry in self._entries.items()
            ]
        return sorted(known, key=lambda each: (-each.shunned_for_s, -each.score))

    # -- noting

    def note(self, peer_id: PeerId, evidence: Evidence) -> Verdict:
        """A peer lied. The verdict from now on."""
        with self._lock:
            now = self._clock()
            entry = self._entry(peer_id, now)
            entry.score = min(MAX_SCORE, _faded(entry.score, now - entry.noted_at) + WEIGHTS[evidence])
            entry.noted_at = now
            return self._count(entry, evidence, now)

    def note_contradiction(self, first: PeerId, second: PeerId) -> None:
        """Two peers answered the same question differently, and nobody can tell who is right."""
        with self._lock:
            now = self._clock()
            for peer_id, opponent in ((first, second), (second, first)):
                entry = self._entry(peer_id, now)
                others = [(known, at) for known, at in entry.opponents.items() if known != opponent]
                # A new dictionary: readers without the lock may be counting the old one.
                entry.opponents = dict([*others[-(MAX_OPPONENTS - 1) :], (opponent, now)])
                self._count(entry, "contradiction", now)

    def forget(self, peer_id: PeerId) -> None:
        """Hold nothing against a peer any more."""
        with self._lock:
            self._entries.pop(peer_id, None)

    # -- private, under the lock

    def _entry(self, peer_id: PeerId, now: float) -> _Entry:
        entry = self._entries.get(peer_id)
        if entry is None:
            if len(self._entries) >= MAX_PEERS:
                self._make_room(now)
            entry = self._entries[peer_id] = _Entry(noted_at=now)
        return entry

    def _count(self, entry: _Entry, evidence: str, now: float) -> Verdict:
        entry.counts[evidence] = entry.counts.get(evidence, 0) + 1
        if now >= entry.shunned_until and _total(entry, now) >= SHUN_AT:
            entry.shunned_until = now + min(MAX_SHUN_S, SHUN_S * 2.0 ** min(entry.shuns, 16))
            entry.shuns += 1
        return _verdict(entry, now)

    def _make_room(self, now: float) -> None:
        def weight(peer_id: PeerId) -> tuple[bool, float]:
            entry = self._entries[peer_id]
            return entry.shunned_until > now, _total(entry, now)

        faded = [peer_id for peer_id in self._entries if weight(peer_id) < (False, _FORGOTTEN_BELOW)]
        # An eighth at a time, so that a flood of new names is no search through the table for each.
        for peer_id in faded or heapq.nsmallest(max(1, MAX_PEERS // 8), self._entries, key=weight):
            del self._entries[peer_id]


def _faded(score: float, age_s: float) -> float:
    return score * math.exp2(-max(0.0, age_s) / HALF_LIFE_S)


def _total(entry: _Entry, now: float) -> float:
    contradictions = sum(_faded(CONTRADICTION, now - at) for at in entry.opponents.values())
    return _faded(entry.score, now - entry.noted_at) + min(MAX_CONTRADICTIONS, contradictions)


def _verdict(entry: _Entry, now: float) -> Verdict:
    if now < entry.shunned_until:
        return "shunned"
    return "last" if _total(entry, now) >= LAST_AT else "good"
