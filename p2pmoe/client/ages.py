"""What replies say of the age of experts, and when one is suddenly younger. No I/O; any thread.

A reply's parameters may have `incarnation` (128 random bits at the expert's birth, kept through restores), `run`
(random at each start of its node) and `updates` (so many its parameters have seen). Peers are strangers: it is what
they say.

Rules:
1. An incarnation that is new for a uid which had another one before is a *rebirth*: its learning is lost, or another
   node hosts another expert of that name. The incarnations of a uid that were seen last are remembered, so that two
   nodes that host one uid are told of once, not at each reply.
2. Fewer updates than before, said by another run of the same incarnation, are a *setback*: the node went on from a
   checkpoint. Within one run replies may overtake each other; that is none.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeGuard

from p2pmoe.errors import ExpertRebornError
from p2pmoe.seldom import Seldom

logger = logging.getLogger(__name__)

OnRebirth = Literal["log", "raise"]
MAX_EXPERTS: Final = 16_384
MAX_INCARNATIONS: Final = 4
_MAX_CHARS: Final = 64
_MAX_UPDATES: Final = 2**62


@dataclass(slots=True)
class Age:
    """Of one incarnation of one expert."""

    incarnation: str
    run: str
    updates: int


@dataclass(slots=True)
class _Known:
    last: Age
    others: dict[str, Age] = field(default_factory=dict)
    """Of further incarnations, the one seen longest ago first."""


class Ages:
    """Of the experts that one swarm object calls.

    Args:
        on_rebirth: "raise" lets the next call end with ExpertRebornError, once for each rebirth or setback.
    """

    def __init__(self, on_rebirth: OnRebirth = "log") -> None:
        self._raises = on_rebirth == "raise"
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._seldom = Seldom(10.0)
        self._untold: ExpertRebornError | None = None
        self.rebirths = 0
        """How often an expert was another one than before."""
        self.setbacks = 0
        """How often an expert had lost updates."""
        self.updates_lost = 0
        """In all setbacks together."""

    def __repr__(self) -> str:
        return f"<Ages: {len(self._known)} experts, {self.rebirths} rebirths, {self.setbacks} setbacks>"

    def of(self, uid: str) -> Age | None:
        """What the last reply of an expert said; None when none has said anything."""
        known = self._known.get(uid)
        return None if known is None else known.last

    def note(self, uid: str, parameters: Mapping[str, Any]) -> None:
        """A reply came with these parameters."""
        incarnation, run, updates = (parameters.get(key) for key in ("incarnation", "run", "updates"))
        known = self._known.get(uid)
        if known is not None:  # in nearly all cases
            last = known.last
            if last.incarnation == incarnation and last.run == run and type(updates) is int:
                if last.updates < updates <= _MAX_UPDATES:
                    last.updates = updates
                return
        if _is_text(incarnation) and _is_text(run) and type(updates) is int and 0 <= updates <= _MAX_UPDATES:
            with self._lock:
                self._look(uid, Age(incarnation, run, updates))

    def forget(self, prefix: str) -> None:
        """Experts below are known to be others than before: that is no news any more."""
        with self._lock:
            for uid in [uid for uid in self._known if uid.startswith(prefix)]:
                del self._known[uid]

    def raise_if_reborn(self) -> None:
        """Raises ExpertRebornError where `on_rebirth` says so and nobody was told yet."""
        if self._untold is not None:
            with self._lock:
                error, self._untold = self._untold, None
            if error is not None:
                raise error

    # -- private, with the lock held

    def _look(self, uid: str, age: Age) -> None:
        known = self._known.get(uid)
        if known is None:
            self._known[uid] = _Known(age)
            if len(self._known) > MAX_EXPERTS:
                self._known.popitem(last=False)
            return
        before = known.last if known.last.incarnation == age.incarnation else known.others.pop(age.incarnation, None)
        if known.last.incarnation != age.incarnation:
            known.others[known.last.incarnation] = known.last
            if len(known.others) >= MAX_INCARNATIONS:
                del known.others[next(iter(known.others))]
        if before is None:
            self.rebirths += 1
            self._tell(
                f"{uid} is another expert than before: it had {known.last.updates} updates, and this one has "
                f"{age.updates}; what it had learnt is gone, or another node serves that uid now"
            )
        elif before.run != age.run and before.updates > age.updates:
            self.setbacks += 1
            self.updates_lost += before.updates - age.updates
            self._tell(f"{uid} went on from a checkpoint: it had {before.updates} updates, and has {age.updates} now")
        elif before.run == age.run:
            age.updates = max(age.updates, before.updates)
        known.last = age

    def _tell(self, what: str) -> None:
        if self._raises:
            self._untold = ExpertRebornError(what)
        if (note := self._seldom.note()) is not None:
            logger.warning("%s%s", what, note)


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= _MAX_CHARS and value.isascii() and value.isalnum()
