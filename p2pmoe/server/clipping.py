"""How far the gradients of one call are scaled down, and which are refused. Knows floats and callers' keys only.

Rules (docs/adr/0017-outliers-are-clipped.md); a norm is the root mean square over the rows of one call:
1. Up to `factor` times the expert's usual norm (`gate.NormGate`) gradients are left alone, whoever sends them.
2. Over it they are scaled down to that limit, those of a newcomer too. More keys give nobody more.
3. A caller whose own usual norm is over the limit (another loss, another scale of it) is scaled by its own history, so
   that its calls keep their proportions and do not drown the others': the further over, the less of the limit is his.
4. Refused is a norm over `LARGEST`, and one that is `factor` squared times over whatever its caller usually sends, over
   the expert's usual norm and over 1, and only of a caller with a key of its own and a history of `warmup_calls`.
   `NEW_SCALE_AFTER` of them in a row are the caller's new scale: it begins again as a newcomer.

Scaling is by powers of two: what is scaled back afterwards is, bit for bit, what it would have been.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from p2pmoe.server.gate import NormGate

LARGEST: Final = 1e36
"""No loss has gradients of this norm; products and sums of them overflow float32."""
NEW_SCALE_AFTER: Final = 3
"""Refusals in a row after which a caller's history begins anew."""
MAX_CALLERS: Final = 64
"""Whose history one expert keeps; who was silent longest is forgotten first, and is a newcomer again."""
_LEAST_REFUSED: Final = 1.0  # times the factor squared: smaller norms are refused to nobody
_STEP: Final = 0.005  # nats, as in NormGate, once a history is long
_FIRST_STEPS: Final = 4.0  # nats, divided by the number of calls: a short history follows quickly


class CallerScale:
    """The running median of one caller's norms, as a logarithm."""

    __slots__ = ("calls", "center", "refusals")

    def __init__(self) -> None:
        self.calls = 0
        self.center = 0.0
        self.refusals = 0  # in a row

    def __repr__(self) -> str:
        return f"<CallerScale: {self.calls} calls, usual {self.usual:.3g}>"

    @property
    def usual(self) -> float:
        return math.exp(self.center) if self.calls else 0.0

    def learn(self, value: float) -> None:
        """One more call, by the logarithm of its norm."""
        self.calls += 1
        distance = value - self.center
        if self.calls == 1:
            self.center = value
        else:
            self.center += math.copysign(min(max(_STEP, _FIRST_STEPS / self.calls), abs(distance)), distance)


class Extreme:
    """Why a call is refused."""

    __slots__ = ("forgiven_after", "limit", "usual")

    def __init__(self, limit: float, usual: float, forgiven_after: int | None) -> None:
        self.limit = limit
        self.usual = usual
        """Of its caller."""
        self.forgiven_after = forgiven_after
        """So many more in a row; None: never."""


class GradientLimit:
    """What becomes of the calls of one expert. One thread uses it.

    Args:
        norms: the expert's usual norm; it learns here.
        factor: how far over it gradients are left alone.
        warmup_calls: a caller's calls before any of its is refused by its history.
        least: no call is scaled down below this norm; what its numbers could not hold would be lost.
    """

    def __init__(self, norms: NormGate, *, factor: float, warmup_calls: int, least: float = 1e-36) -> None:
        self._norms = norms
        self._refused_from = factor * factor
        self._least = math.log(least)
        self._warmup_calls = warmup_calls
        self._callers: OrderedDict[str, CallerScale] = OrderedDict()

    def __repr__(self) -> str:
        return f"<GradientLimit: {self._norms}, {len(self._callers)} callers>"

    def judge(self, caller: str, norm: float, *, is_one: bool) -> int | Extreme:
        """How often the gradients of a call must be halved (0: not at all), or why it is refused.

        Args:
            caller: whose history it is told by.
            norm: finite, ≥ 0. Zeros carry nothing: they pass unseen.
            is_one: the key is one trainer's own; an address may stand for many, whose scales differ.
        """
        if norm <= 0.0:
            return 0
        if norm > LARGEST:
            return Extreme(LARGEST, self._scale_of(caller).usual, None)
        passes = self._norms.admits(norm)
        own = self._scale_of(caller)
        if not passes and is_one and (extreme := self._extreme(own, norm)) is not None:
            return extreme
        own.refusals = 0
        value = math.log(norm)
        own.learn(value)
        return 0 if passes else self._halvings(value, own.center)

    def get_state(self) -> dict[str, Any]:
        """What it has learnt of the expert and of its callers, as JSON."""
        callers = [[key, own.calls, own.center, own.refusals] for key, own in self._callers.items()]
        return {"norms": self._norms.get_state(), "callers": callers}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what another one has learnt. Raises KeyError, TypeError, ValueError for no such state."""
        callers: OrderedDict[str, CallerScale] = OrderedDict()
        for key, calls, center, refusals in state["callers"][-MAX_CALLERS:]:
            own = callers[str(key)] = CallerScale()
            own.calls, own.center, own.refusals = int(calls), float(center), int(refusals)
            if not math.isfinite(own.center):
                raise ValueError(f"{center} is no norm's logarithm")
        self._norms.set_state(state["norms"])
        self._callers = callers

    # -- private

    def _scale_of(self, caller: str) -> CallerScale:
        callers = self._callers
        own = callers.get(caller)
        if own is None:
            own = callers[caller] = CallerScale()
            if len(callers) > MAX_CALLERS:
                callers.popitem(last=False)
        else:
            callers.move_to_end(caller)
        return own

    def _extreme(self, own: CallerScale, norm: float) -> Extreme | None:
        if own.calls < self._warmup_calls:
            return None
        limit = self._refused_from * max(own.usual, self._norms.usual, _LEAST_REFUSED)
        if norm <= limit:
            return None
        own.refusals += 1
        if own.refusals > NEW_SCALE_AFTER:
            own.calls = own.refusals = 0
            return None
        return Extreme(limit, own.usual, NEW_SCALE_AFTER - own.refusals)

    def _halvings(self, value: float, own: float) -> int:
        """All are logarithms: products of small norms could not be told from zero."""
        usual, limit = math.log(self._norms.usual), math.log(self._norms.limit)
        own = max(own, limit)
        share = max((usual + limit) / 2, 2 * limit - own)  # what a usual call of this caller becomes
        target = max(min(limit, value + share - own), self._least)
        return max(0, math.ceil((value - target) / math.log(2.0)))
