"""Who is left out of a directory's answers for a while: a peer, one address of it, or one expert of it. No I/O.

An address that does not answer is left out, not the key that announced it: a node that was killed may be back under the
same key elsewhere, and one that announced itself anew after the failure is worth asking again at the same place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from p2pmoe.experts.children import Children, Provider
from p2pmoe.types import Endpoint, PeerId

MAX_UNREACHABLE: Final = 4096


@dataclass(frozen=True, slots=True)
class Absence:
    """Who is left out. Without an endpoint at every address, without a uid with all experts.

    Records that were declared after `sequence` (see `Provider`) are heeded all the same; None heeds none.
    """

    peer_id: PeerId
    endpoint: Endpoint | None = None
    uid: str | None = None
    sequence: int | None = None

    def covers(self, provider: Provider, uid: str) -> bool:
        """Whether this provider of a uid, or of a prefix without its last dot, is left out."""
        return (
            provider.peer_id == self.peer_id
            and (self.endpoint is None or self.endpoint == provider.endpoint)
            and (self.uid is None or self.uid == uid)
            and (self.sequence is None or provider.sequence <= self.sequence)
        )


class LeftOut:
    """Absences and when they end. Never changed: `with_one`, `without` and `after` give another one."""

    def __init__(self) -> None:
        self._until: dict[Absence, float] = {}
        self._of_peer: dict[PeerId, tuple[Absence, ...]] = {}
        self.first_end = float("inf")
        """None ends before."""

    def __len__(self) -> int:
        return len(self._until)

    def __contains__(self, peer_id: PeerId) -> bool:
        return peer_id in self._of_peer

    def with_one(self, absence: Absence, until: float) -> LeftOut:
        """With one more, or one that lasts longer. Of too many the one that ends first is dropped."""
        changed = LeftOut()
        changed._until, changed._of_peer = dict(self._until), dict(self._of_peer)
        for known in self._of_peer.get(absence.peer_id, ()):
            if (known.endpoint, known.uid) == (absence.endpoint, absence.uid):
                until = max(until, self._until[known])
                absence = replace(absence, sequence=_newest(known.sequence, absence.sequence))
                changed._drop(known)
        if len(changed._until) >= MAX_UNREACHABLE:
            changed._drop(min(changed._until, key=changed._until.__getitem__))
        changed._add(absence, until)
        changed.first_end = min(self.first_end, until)
        return changed

    def without(self, peer_id: PeerId) -> LeftOut:
        """With nothing of a peer left out."""
        if peer_id not in self._of_peer:
            return self
        return self._only({each: at for each, at in self._until.items() if each.peer_id != peer_id})

    def after(self, now: float) -> LeftOut:
        """Those that have not ended."""
        return self._only({each: at for each, at in self._until.items() if at > now})

    def applied(self, children: Children, prefix: str) -> Children:
        """The children of a prefix that somebody provides who is not left out."""
        if not self._until:
            return children
        kept = {child: self.live(providers, f"{prefix}{child}") for child, providers in children.items()}
        return MappingProxyType({child: providers for child, providers in kept.items() if providers})

    def live(self, providers: Iterable[Provider], uid: str) -> tuple[Provider, ...]:
        """Those that are not left out."""
        return tuple(
            each
            for each in providers
            if not any(absence.covers(each, uid) for absence in self._of_peer.get(each.peer_id, ()))
        )

    # -- private

    @staticmethod
    def _only(until: dict[Absence, float]) -> LeftOut:
        kept = LeftOut()
        for absence, at in until.items():
            kept._add(absence, at)
        return kept

    def _add(self, absence: Absence, until: float) -> None:
        self._until[absence] = until
        self._of_peer[absence.peer_id] = (*self._of_peer.get(absence.peer_id, ()), absence)
        self.first_end = min(self.first_end, until)

    def _drop(self, absence: Absence) -> None:
        del self._until[absence]
        rest = tuple(each for each in self._of_peer[absence.peer_id] if each != absence)
        if rest:
            self._of_peer[absence.peer_id] = rest
        else:
            del self._of_peer[absence.peer_id]

    def __repr__(self) -> str:
        return f"<LeftOut: {len(self._of_peer)} peers>"


def _newest(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else max(first, second)
