"""Which of our experts may be announced, when others announce the same uids. Synchronous; knows no DHT and no socket.

A *twin* is the same uid with the same schema at another peer: it would draw calls and updates away from the expert that
was there first. (The same uid with another schema is no twin: callers choose one of the two schemas.) The rules:

1. Before a uid is announced for the first time somebody looks. If a twin is alive, the uid waits; it is announced when
   none is left. A restart of our own key is no twin.
2. A uid that was announced, and was then seen to have no twin, is *held*. A held uid is announced whatever turns up:
   others were there later, or are on the other side of a partition, and neither their clocks nor their words are
   evidence of the opposite.
3. A uid that is announced and not held yet, when a twin is seen: both may have looked before either was there. The
   larger peer id yields at once. The smaller one looks twice more, in which time the other has yielded if it came at
   the same time; if it has not, it was there before or does not keep these rules, and the smaller one yields.
4. A twin counts as alive until it is known to be gone: its records have ended, or whoever answers at its endpoint is
   another peer, or does not host the uid, or the port is closed (twice in a row where the uid waits already: it may be
   restarting), or nobody has answered three times in a row.

Nobody needs a clock that others agree with for any of this, and no record says how old an expert is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from p2pmoe.experts.directory import Provider
from p2pmoe.types import PeerId

Answer = Literal["hosts", "gone", "refused", "silent"]
"""What came of asking a twin: it hosts the uid; it certainly does not; its port is closed; nothing came in time."""

LOOKS_OF_THE_SMALLER: Final = 3
SILENCES: Final = 3
REFUSALS: Final = 2
MAX_DOUBTS: Final = 4096


@dataclass(slots=True)
class _Doubt:
    """How often in a row a twin did not answer."""

    refused: int = 0
    silent: int = 0


@dataclass(slots=True)
class _Uid:
    announced: bool = False
    held: bool = False
    twin_looks: int = 0
    """Looks that showed a twin since it was announced."""


@dataclass(slots=True)
class Verdict:
    """What follows from one look. `by_uid` names a live twin of each uid that waits or has yielded."""

    announce: list[str] = field(default_factory=list)
    """New ones."""
    yielded: list[str] = field(default_factory=list)
    by_uid: dict[str, Provider] = field(default_factory=dict)


class Twins:
    """The state of each of our uids.

    Args:
        peer_id: our own.
        uids: everything that this node hosts.
    """

    def __init__(self, peer_id: PeerId, uids: Collection[str]) -> None:
        self._peer_id = peer_id
        self._uids = {uid: _Uid() for uid in uids}
        self._doubts: dict[PeerId, _Doubt] = {}

    def __repr__(self) -> str:
        return f"<Twins: {len(self.announced)} of {len(self._uids)} uids announced, {len(self.waiting)} wait>"

    @property
    def announced(self) -> list[str]:
        """What is to be declared."""
        return [uid for uid, state in self._uids.items() if state.announced]

    @property
    def waiting(self) -> list[str]:
        """What somebody else serves."""
        return [uid for uid, state in self._uids.items() if not state.announced]

    @property
    def held(self) -> list[str]:
        """What stays announced whatever turns up."""
        return [uid for uid, state in self._uids.items() if state.held]

    @property
    def undecided(self) -> list[str]:
        """What is not held: its twins have to be asked whether they are there."""
        return [uid for uid, state in self._uids.items() if not state.held]

    def look(self, twins: Mapping[str, Collection[Provider]], answers: Mapping[PeerId, Answer]) -> Verdict:
        """Take note of one look: every twin of each uid, and what became of asking those of undecided uids."""
        for peer_id, answer in answers.items():
            self._note_answer(peer_id, answer)
        verdict = Verdict()
        for uid, state in self._uids.items():
            alive = [each for each in twins.get(uid, ()) if self._is_alive(each.peer_id, answers, state)]
            if state.held:
                continue
            if not alive:
                state.held, state.twin_looks = state.announced, 0
                if not state.announced:
                    state.announced = True
                    verdict.announce.append(uid)
                continue
            verdict.by_uid[uid] = alive[0]
            state.twin_looks += 1
            smaller = all(self._peer_id < each.peer_id for each in alive)
            if state.announced and (not smaller or state.twin_looks >= LOOKS_OF_THE_SMALLER):
                state.announced, state.twin_looks = False, 0
                verdict.yielded.append(uid)
        return verdict

    def _note_answer(self, peer_id: PeerId, answer: Answer) -> None:
        doubt = self._doubts.get(peer_id, _Doubt())
        if answer == "hosts":
            self._doubts.pop(peer_id, None)
            return
        doubt.refused = doubt.refused + 1 if answer == "refused" else 0
        doubt.silent = doubt.silent + 1 if answer in ("refused", "silent") else 0
        if peer_id not in self._doubts and len(self._doubts) >= MAX_DOUBTS:
            self._doubts.clear()
        self._doubts[peer_id] = doubt

    def _is_alive(self, peer_id: PeerId, answers: Mapping[PeerId, Answer], state: _Uid) -> bool:
        answer = answers.get(peer_id)
        if answer is None:  # not asked
            return True
        if answer in ("hosts", "gone"):
            return answer == "hosts"
        doubt = self._doubts[peer_id]
        was_waiting = not state.announced and state.twin_looks > 0
        return doubt.silent < SILENCES and doubt.refused < (REFUSALS if was_waiting else 1)
