"""What follows from a peer's failure or lie: who is left out of searches, for how long, and who is asked first.

Joins the table of evidence (`standing.py`) with the directory, which leaves peers out of its answers, and with the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from p2pmoe.client.acquaintance import Acquaintance
from p2pmoe.client.directory import Directory
from p2pmoe.client.standing import Evidence, Standing
from p2pmoe.errors import (
    AccessDeniedError,
    AuthenticationError,
    DeadlineError,
    DecodeError,
    DrainingError,
    NonFiniteReplyError,
    P2PMoEError,
    PeerUnreachableError,
)
from p2pmoe.experts.directory import Provider
from p2pmoe.types import Endpoint, PeerId

log = logging.getLogger(__name__)

_LEFT_OUT: Final = (PeerUnreachableError, DeadlineError, DrainingError, AuthenticationError, AccessDeniedError)
UNREACHABLE_S: Final = 5.0
"""How long an address that did not answer is left out of searches; the next failure renews it."""
LOG_EVERY_S: Final = 10.0


class Trust:
    """One for each swarm. Any thread.

    `proves` says of an endpoint whether what comes from there can be nobody's but its peer's.
    """

    def __init__(
        self,
        directory: Directory,
        clock: Callable[[], float] = time.monotonic,
        *,
        proves: Callable[[Endpoint], bool] = lambda endpoint: True,  # noqa: ARG005
    ) -> None:
        self.standing = Standing(clock)
        self.acquaintance = Acquaintance(clock)
        self._directory = directory
        self._proves = proves
        self._clock = clock
        self._logged_at = float("-inf")
        self._unlogged = 0

    def __repr__(self) -> str:
        return f"<Trust: {self.standing}>"

    def order(self, providers: tuple[Provider, ...], uid: str | None = None) -> tuple[Provider, ...]:
        """In which order providers of a uid are to be asked: good ones before doubtful ones, those known longest first.

        Those that are shunned are left out.
        """
        return self.standing.order(self.acquaintance.order(providers), uid)

    def note_failure(self, provider: Provider, error: P2PMoEError, *uids: str) -> None:
        """Calls of these experts failed with this.

        A silent address is left out of searches for a while: not its key, which may be back elsewhere. A reply that no
        honest expert gives is held against these experts of that peer; what proves a peer's lie is noted where it is
        read, once for each exchange.
        """
        if isinstance(error, DrainingError) and error.retry_after_s is not None:
            return  # it had no memory for this call; other calls of ours, of other threads, go on
        if isinstance(error, _LEFT_OUT):
            self._directory.mark_unreachable(
                provider.peer_id, UNREACHABLE_S, endpoint=provider.endpoint, sequence=provider.sequence
            )
        elif isinstance(error, NonFiniteReplyError):
            if error.is_evidence:
                proven = self._proves(provider.endpoint)
                self._note_experts(provider.peer_id, uids, "non_finite", str(error), is_proven=proven)
        elif isinstance(error, DecodeError) and not error.is_proof:
            self._note_experts(provider.peer_id, uids, "broken_reply", str(error))

    def note_lie(self, peer_id: PeerId, evidence: Evidence, reason: str) -> None:
        """A peer answered what it must not."""
        was_shunned = self.standing.verdict(peer_id) == "shunned"
        self.standing.note(peer_id, evidence)
        self._leave_out(peer_id, reason, was_shunned=was_shunned)

    def note_contradiction(self, first: PeerId, second: PeerId, reason: str) -> None:
        """Two peers answered the same question differently; nobody knows who is right."""
        were_shunned = {each: self.standing.verdict(each) == "shunned" for each in (first, second)}
        self.standing.note_contradiction(first, second)
        for peer_id, was_shunned in were_shunned.items():
            self._leave_out(peer_id, reason, was_shunned=was_shunned)

    def pardon(self, peer_id: PeerId) -> None:
        """Hold nothing against a peer any more and let it back into searches."""
        self.standing.forget(peer_id)
        self._directory.mark_reachable(peer_id)

    def _note_experts(
        self, peer_id: PeerId, uids: Sequence[str], evidence: Evidence, reason: str, *, is_proven: bool = False
    ) -> None:
        was_shunned = self.standing.verdict(peer_id) == "shunned"
        were_shunned = {uid: self.standing.verdict(peer_id, uid) == "shunned" for uid in uids}
        self.standing.note_experts(peer_id, uids, evidence, is_proven=is_proven)
        if self.standing.verdict(peer_id) == "shunned":
            self._leave_out(peer_id, reason, was_shunned=was_shunned)
            return
        for uid, was_shunned in were_shunned.items():
            if self.standing.verdict(peer_id, uid) != "shunned":
                continue
            for_s = self.standing.shunned_for_s(peer_id, uid)
            self._directory.mark_unreachable(peer_id, for_s, uid=uid)
            if not was_shunned:
                self._log(peer_id, for_s, reason, about=f" about {uid}")

    def _leave_out(self, peer_id: PeerId, reason: str, *, was_shunned: bool) -> None:
        shunned_for_s = self.standing.shunned_for_s(peer_id)
        if not shunned_for_s:
            return
        self._directory.mark_unreachable(peer_id, shunned_for_s)
        if not was_shunned:
            self._log(peer_id, shunned_for_s, reason)

    def _log(self, peer_id: PeerId, shunned_for_s: float, reason: str, *, about: str = "") -> None:
        now = self._clock()
        if now - self._logged_at < LOG_EVERY_S:  # one line, however many nodes lie
            self._unlogged += 1
            return
        self._logged_at, unlogged, self._unlogged = now, self._unlogged, 0
        more = f" ({unlogged} more since the last line)" if unlogged else ""
        log.warning(
            "%s is not asked for %.0f s%s, its replies are wrong%s: %s", peer_id, shunned_for_s, about, more, reason
        )
