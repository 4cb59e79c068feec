"""Since when this client has seen each peer: the only age of a peer that nobody can forge. No I/O.

Of two providers of one expert the one that we have seen longer is asked first, so that a twin that turns up in the
middle of a training run does not draw calls and updates away from the expert that was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from p2pmoe.experts.children import Provider
from p2pmoe.types import PeerId

MAX_PEERS: Final = 65_536
FIRST_LOOK_S: Final = 10.0
"""Whoever is seen within this time of the first peer counts as there from the beginning."""


class Acquaintance:
    """When each peer was first seen. Any thread: an entry is written once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first_seen: dict[PeerId, float] = {}
        self._begun: float | None = None

    def __repr__(self) -> str:
        return f"<Acquaintance with {len(self._first_seen)} peers>"

    def meet(self, peer_id: PeerId) -> float:
        """When this peer was first seen, perhaps just now; the same for all that were there from the beginning."""
        seen = self._first_seen.get(peer_id)
        if seen is None:
            now = self._clock()
            if self._begun is None:
                self._begun = now
            seen = self._begun if now - self._begun < FIRST_LOOK_S else now
            if len(self._first_seen) < MAX_PEERS:  # a flood of new names must not make the old ones look new
                seen = self._first_seen.setdefault(peer_id, seen)
        return seen

    def seen_for_s(self, peer_id: PeerId) -> float:
        """How long it has been known; 0 for a peer that was not met."""
        seen = self._first_seen.get(peer_id)
        return 0.0 if seen is None else self._clock() - seen

    def order(self, providers: tuple[Provider, ...]) -> tuple[Provider, ...]:
        """Those known longest first, equals in the order given. All of them are met by that."""
        if len(providers) < 2:
            for provider in providers:
                self.meet(provider.peer_id)
            return providers
        met = [self.meet(provider.peer_id) for provider in providers]
        if min(met) == max(met):
            return providers
        places = sorted(range(len(met)), key=met.__getitem__)
        return tuple(providers[place] for place in places)
