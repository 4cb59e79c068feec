"""One look-up of the nodes nearest to a key, as a state machine. Knows no clock, no socket and no records.

Who drives it asks `next_to_ask()`, sends, and reports `answered`, `slow`, `late` or `failed`, until `done`.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterable
from typing import Final

from p2pmoe.protocol.datagrams import Contact

MAX_CANDIDATES: Final = 512
MAX_ASKED: Final = 192
MAX_ADDRESSES_PER_ID: Final = 2
MIN_ANSWERS: Final = 2


class State(enum.Enum):
    """What has become of a candidate."""

    NEW = "new"
    ASKED = "asked"
    SLOW = "slow"
    LATE = "late"
    GIVEN_UP = "given up"
    """Late, and it has missed requests before."""
    ANSWERED = "answered"
    FAILED = "failed"


_AWAITED: Final = frozenset({State.NEW, State.ASKED, State.SLOW})
_DISAPPOINTING: Final = frozenset({State.SLOW, State.LATE, State.GIVEN_UP, State.FAILED})
_OVERDUE: Final = frozenset({State.LATE, State.GIVEN_UP})
_IN_VIEW: Final = frozenset({State.NEW, State.ASKED, State.ANSWERED})
"""What counts towards the `width` candidates worth asking: others are asked in the place of a slow one."""


class _Candidate:
    __slots__ = ("contact", "doubtful", "hop", "state")

    def __init__(self, contact: Contact, *, doubtful: bool, hop: int) -> None:
        self.contact = contact
        self.doubtful = doubtful
        self.hop = hop
        self.state = State.NEW


class Lookup:
    """Looks for the `width` nodes nearest to `target`, with `alpha` requests under way at any time.

    A pipeline, not rounds: every answer may start the next request. A slow request frees its place, so that the
    next candidate is asked meanwhile; a late one is no longer waited for, once two others have answered.
    """

    def __init__(self, target: int, seeds: Iterable[Contact], *, width: int, alpha: int, own_id: bytes = b"") -> None:
        self.target = target
        self.width = width
        self.alpha = alpha
        self.asked = 0
        self._own_id = own_id
        self._under_way = 0
        self._disappointed = 0
        self._candidates: dict[Contact, _Candidate] = {}
        self._order: list[tuple[int, Contact]] = []
        self._addresses: dict[bytes, int] = {}
        for contact in seeds:
            self.add(contact)

    def add(self, contact: Contact, *, doubtful: bool = False, hop: int = 1) -> None:
        """A further candidate. `doubtful`: it missed a request before; slow counts as late then, and late as given up.

        `hop` counts the requests on the way to it: 1 for those that we knew before.
        """
        known_addresses = self._addresses.get(contact.node_id, 0)
        if contact in self._candidates or contact.node_id == self._own_id:
            return
        # A liar may give a good node's id with a dead address; a second address of that id gets its chance too.
        if known_addresses >= MAX_ADDRESSES_PER_ID or len(self._candidates) >= MAX_CANDIDATES:
            return
        self._addresses[contact.node_id] = known_addresses + 1
        self._candidates[contact] = _Candidate(contact, doubtful=doubtful, hop=hop)
        bisect.insort(self._order, (int.from_bytes(contact.node_id, "big") ^ self.target, contact))

    def next_to_ask(self) -> list[Contact]:
        """The candidates to send a request to now. They count as asked."""
        chosen: list[Contact] = []
        in_view = 0
        # As many spares as have disappointed so far: where one in three is dead, some of the next are dead too.
        wanted = self.width + min(self._disappointed, self.width)
        for _, contact in self._order:
            if self._under_way >= self.alpha or self.asked >= MAX_ASKED or in_view >= wanted:
                break
            candidate = self._candidates[contact]
            in_view += candidate.state in _IN_VIEW
            if candidate.state is State.NEW:
                candidate.state = State.ASKED
                self._under_way += 1
                self.asked += 1
                chosen.append(contact)
        return chosen

    def answered(self, contact: Contact, found: Iterable[Contact] = ()) -> None:
        """It answered, and knows of these."""
        candidate = self._candidates[contact]
        self._leave(candidate, State.ANSWERED)
        for each in found:
            self.add(each, hop=candidate.hop + 1)

    def slow(self, contact: Contact) -> None:
        """Its answer takes longer than most."""
        candidate = self._candidates[contact]
        if candidate.state is State.ASKED:
            self._leave(candidate, State.LATE if candidate.doubtful else State.SLOW)

    def late(self, contact: Contact) -> None:
        """Its answer takes longer than a retransmission timeout."""
        candidate = self._candidates[contact]
        if candidate.state in {State.ASKED, State.SLOW, State.LATE}:
            self._leave(candidate, State.GIVEN_UP if candidate.doubtful else State.LATE)

    def failed(self, contact: Contact) -> None:
        """It will not answer."""
        self._leave(self._candidates[contact], State.FAILED)

    @property
    def done(self) -> bool:
        """True when the `width` nearest of those that live have all answered, or nobody is left to ask."""
        in_front = 0
        for _, contact in self._order:
            state = self._candidates[contact].state
            if state in _AWAITED:
                return self.asked >= MAX_ASKED and not self._under_way
            in_front += state is State.ANSWERED
            if in_front >= self.width:
                return True
        # In a swarm smaller than the width a dead node must not hold up every look-up until it is given up.
        states = {candidate.state for candidate in self._candidates.values()}
        if State.LATE in states:
            return in_front >= MIN_ANSWERS
        # Where nobody has answered, even those given up are worth waiting for: it may be us who are slow.
        return in_front > 0 or State.GIVEN_UP not in states

    @property
    def is_hasty(self) -> bool:
        """True when most of the nearest have not had their say yet: too few to believe that there is nothing."""
        nearest = [self._candidates[contact].state for _, contact in self._order[: self.width]]
        return 2 * sum(state in _OVERDUE for state in nearest) > len(nearest)

    def nearest(self, count: int | None = None) -> list[Contact]:
        """Those that answered, nearest first."""
        found = [c for _, c in self._order if self._candidates[c].state is State.ANSWERED]
        return found[:count]

    @property
    def hops(self) -> int:
        """How many requests one after the other it took to reach the farthest of the `width` nearest; 0 for nobody."""
        return max((self._candidates[contact].hop for contact in self.nearest(self.width)), default=0)

    def _leave(self, candidate: _Candidate, state: State) -> None:
        if candidate.state is State.ASKED:
            self._under_way -= 1
        self._disappointed += (state in _DISAPPOINTING) - (candidate.state in _DISAPPOINTING)
        candidate.state = state

    def __repr__(self) -> str:
        states = [candidate.state for candidate in self._candidates.values()]
        counts = ", ".join(f"{states.count(state)} {state.value}" for state in State)
        return f"<Lookup {self.target:040x}: {counts}>"
