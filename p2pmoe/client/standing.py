"""Whom to believe: evidence of lies by peer, how it fades, who is asked first. No I/O; the clock is handed in.

Rules:
1. Evidence adds up to a score, which halves every `HALF_LIFE_S`. From `LAST_AT` on a peer is asked last, from `SHUN_AT`
   on not at all for `SHUN_S`, twice as long each time that it comes to that again.
2. A reply that no honest node sends, from whoever is proven to have sent it, is proof (`broken_reply`; answers.py says
   which ones). So is the answer that two others contradict. Non-finite numbers count half.
3. Of two peers that contradict each other nobody knows which one lies. Both lose a little, once for each opponent
   however often they meet: an honest peer beside one liar stays good, a liar beside many honest ones sinks.
4. Contradictions alone never shun: providers that were trained apart contradict each other and are honest.
5. Honest answers buy nothing back, only time does: otherwise a liar would lie every tenth time.
6. What may be one expert's fault, or the way's, is held against that expert of that peer: a score of its own, by the
   same numbers. It is asked last, then left out, and the peer's other experts are asked as before. Non-finite numbers
   are such a fault: an expert may have diverged. Where `SEVERAL` experts of one peer give them, and it is proven that
   the peer sent them, they are held against the peer as well.
7. The tables are bounded; the peers with the least evidence are forgotten first, so that new names push out no proof.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar

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
MAX_EXPERTS: Final = 16_384
MAX_OPPONENTS: Final = 16
SEVERAL: Final = 3
"""As many experts of one honest node do not diverge within `HALF_LIFE_S`."""
_FORGOTTEN_BELOW: Final = 0.05
_SEVERITY: Final[dict[Verdict, int]] = {"good": 0, "last": 1, "shunned": 2}
K = TypeVar("K")


@dataclass(slots=True)
class _Entry:
    score: float = 0.0
    noted_at: float = 0.0
    shunned_until: float = float("-inf")
    shuns: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    opponents: dict[PeerId, float] = field(default_factory=dict)
    """Who contradicted it, and when last."""
    diverged: dict[str, float] = field(default_factory=dict)
    """Of a peer: experts that gave non-finite numbers, and when last; no more than `SEVERAL`."""
    worst: _Entry | None = None
    """Of a peer: the expert against which most is held, as far as is known."""


@dataclass(frozen=True, slots=True)
class PeerStanding:
    """What is held against one peer. `counts` by kind of evidence; `shunned_for_s` is 0 unless it is shunned.

    `experts`: those of it that are not asked, and for how many seconds.
    """

    peer_id: PeerId
    verdict: Verdict
    score: float
    shunned_for_s: float
    counts: dict[str, int]
    experts: dict[str, float] = field(default_factory=dict)


class Standing:
    """Evidence by peer. Any thread; `order` and `verdict` take no lock and cost nothing while nobody has lied."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        forks.tell(self)
        self._entries: dict[PeerId, _Entry] = {}
        self._experts: dict[tuple[PeerId, str], _Entry] = {}

    def __repr__(self) -> str:
        shunned = sum(each.verdict == "shunned" for each in self.snapshot())
        return f"<Standing: evidence against {len(self._entries)} peers, {shunned} shunned>"

    def became_a_child(self) -> None:
        """See `forks`: another thread may have held the lock."""
        self._lock = threading.Lock()

    # -- asking

    def verdict(self, peer_id: PeerId, uid: str | None = None) -> Verdict:
        """How a peer is to be treated now when it is asked for an expert.

        Without a uid the peer itself: "last" also when something is held against any of its experts.
        """
        entry = self._entries.get(peer_id)
        if entry is None:
            return "good"
        now = self._clock()
        verdict = _verdict(entry, now)
        expert = entry.worst if uid is None else self._experts.get((peer_id, uid))
        if expert is None or verdict == "shunned":
            return verdict
        of_expert = _verdict(expert, now)
        if uid is None and of_expert == "shunned":
            of_expert = "last"
        return max(verdict, of_expert, key=_SEVERITY.__getitem__)

    def shunned_for_s(self, peer_id: PeerId, uid: str | None = None) -> float:
        """Seconds until a shunned peer may be asked again; 0 for all others. With a uid: for that expert."""
        now = self._clock()
        entries = [self._entries.get(peer_id), None if uid is None else self._experts.get((peer_id, uid))]
        return max((max(0.0, entry.shunned_until - now) for entry in entries if entry is not None), default=0.0)

    def order(self, providers: tuple[Provider, ...], uid: str | None = None) -> tuple[Provider, ...]:
        """The good ones, then those to be asked last, each in the order given; shunned ones are left out."""
        if not self._entries:
            return providers
        verdicts = [self.verdict(provider.peer_id, uid) for provider in providers]
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
            experts: dict[PeerId, dict[str, float]] = {}
            for (peer_id, uid), entry in self._experts.items():
                if entry.shunned_until > now:
                    experts.setdefault(peer_id, {})[uid] = entry.shunned_until - now
            known = [
                PeerStanding(
                    peer_id,
                    self.verdict(peer_id),
                    _total(entry, now),
                    max(0.0, entry.shunned_until - now),
                    dict(entry.counts),
                    experts.get(peer_id, {}),
                )
                for peer_id, entry in self._entries.items()
            ]
        return sorted(known, key=lambda each: (-each.shunned_for_s, -each.score))

    # -- noting

    def note(self, peer_id: PeerId, evidence: Evidence) -> Verdict:
        """A peer lied. The verdict from now on."""
        with self._lock:
            now = self._clock()
            return self._add(self._entry(peer_id, now), evidence, now)

    def note_experts(
        self, peer_id: PeerId, uids: Iterable[str], evidence: Evidence, *, is_proven: bool = False
    ) -> None:
        """Some experts of a peer answered what they must not: one piece of evidence against each, counted once.

        `is_proven`: nobody but the peer can have sent it; see rule 6.
        """
        with self._lock:
            now = self._clock()
            peer = self._entry(peer_id, now)
            peer.counts[evidence] = peer.counts.get(evidence, 0) + 1
            for uid in uids:
                expert = self._experts.get((peer_id, uid))
                if expert is None:
                    if len(self._experts) >= MAX_EXPERTS:
                        _forget_the_least(self._experts, MAX_EXPERTS, now)
                    expert = self._experts[peer_id, uid] = _Entry(noted_at=now)
                self._add(expert, evidence, now)
                if peer.worst is None or _total(peer.worst, now) <= _total(expert, now):
                    peer.worst = expert
                if is_proven and evidence == "non_finite":
                    _note_diverged(peer, uid, now)
            if is_proven and len(peer.diverged) >= SEVERAL:
                peer.counts[evidence] -= 1  # counted once, whatever it is held against
                self._add(peer, evidence, now)

    def count(self, peer_id: PeerId, evidence: Evidence) -> None:
        """Something odd came from a peer that is held against nobody."""
        with self._lock:
            entry = self._entry(peer_id, self._clock())
            entry.counts[evidence] = entry.counts.get(evidence, 0) + 1

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
            for key in [key for key in self._experts if key[0] == peer_id]:
                del self._experts[key]

    # -- private, under the lock

    def _entry(self, peer_id: PeerId, now: float) -> _Entry:
        entry = self._entries.get(peer_id)
        if entry is None:
            if len(self._entries) >= MAX_PEERS:
                _forget_the_least(self._entries, MAX_PEERS, now)
            entry = self._entries[peer_id] = _Entry(noted_at=now)
        return entry

    def _add(self, entry: _Entry, evidence: Evidence, now: float) -> Verdict:
        entry.score = min(MAX_SCORE, _faded(entry.score, now - entry.noted_at) + WEIGHTS[evidence])
        entry.noted_at = now
        return self._count(entry, evidence, now)

    def _count(self, entry: _Entry, evidence: str, now: float) -> Verdict:
        entry.counts[evidence] = entry.counts.get(evidence, 0) + 1
        if now >= entry.shunned_until and _total(entry, now) >= SHUN_AT:
            entry.shunned_until = now + min(MAX_SHUN_S, SHUN_S * 2.0 ** min(entry.shuns, 16))
            entry.shuns += 1
        return _verdict(entry, now)


def _forget_the_least(entries: dict[K, _Entry], limit: int, now: float) -> None:
    def weight(key: K) -> tuple[bool, float]:
        entry = entries[key]
        worst = 0.0 if entry.worst is None else _total(entry.worst, now)
        return entry.shunned_until > now, max(worst, _total(entry, now))

    faded = [key for key in entries if weight(key) < (False, _FORGOTTEN_BELOW)]
    # An eighth at a time, so that a flood of new names is no search through the table for each.
    for key in faded or heapq.nsmallest(max(1, limit // 8), entries, key=weight):
        del entries[key]


def _note_diverged(peer: _Entry, uid: str, now: float) -> None:
    recent = {known: at for known, at in peer.diverged.items() if now - at < HALF_LIFE_S and known != uid}
    peer.diverged = dict([*recent.items(), (uid, now)][-SEVERAL:])


def _faded(score: float, age_s: float) -> float:
    return score * math.exp2(-max(0.0, age_s) / HALF_LIFE_S)


def _total(entry: _Entry, now: float) -> float:
    contradictions = sum(_faded(CONTRADICTION, now - at) for at in entry.opponents.values())
    return _faded(entry.score, now - entry.noted_at) + min(MAX_CONTRADICTIONS, contradictions)


def _verdict(entry: _Entry, now: float) -> Verdict:
    if now < entry.shunned_until:
        return "shunned"
    return "last" if _total(entry, now) >= LAST_AT else "good"
