"""Finiteness and scale of tensors: what the gate in front of the optimizer decides with. Knows only torch and floats.

What the norm gate tells and what it does not (docs/adr/0007-gradient-gate.md; what follows from it is `clipping.py`):
1. It tells gradients over `factor` times the running median of the norms that one expert was sent. Each call moves
   the median by one small step, whatever its size: while most calls are honest, the median stays in their range.
2. Norms further than `factor` from the median, on either side, hardly move it. When nothing else comes any more, they
   move it faster and faster, so that an expert whose first callers were hostile or whose trainers changed recovers.
3. A caller alone with an expert for some hundred calls sets its scale. Then clipping and `StepGuard` still hold.
4. Gradients of an honest size in a wrong direction pass. No norm can tell them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from p2pmoe.protocol.finite import norms_at_once, quick_norm, small_and_alike

_STEP = 0.005  # nats; 460 calls to follow a drift of one decade
_FAR_SHARE = 0.125  # of a step, for a norm further than `factor` away: it takes eight of them to outweigh one near
_FAR_CALLS = 64  # far norms in a row that double their steps
_MAX_STREAK = 16 * _FAR_CALLS
_TEAM_FROM = 1 << 20  # elements
_TEAM_UP_TO = 1 << 31


def holds_floats(tensor: torch.Tensor) -> bool:
    """Whether a tensor can hold NaN or infinity at all."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def quick_norms(tensors: Sequence[torch.Tensor]) -> list[float]:
    """`quick_norm` of each, in few steps where they are small: each step lets the event loop's thread in between."""
    if len(tensors) > 1 and small_and_alike(tensors):
        return norms_at_once(tensors)
    return [quick_norm(tensor) for tensor in tensors]


def norm_after_pass(tensor: torch.Tensor) -> float:
    """`quick_norm` by torch's team of threads, which is awake just after a pass: half the time for a large tensor."""
    suits = tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous()
    if suits and _TEAM_FROM <= tensor.numel() < _TEAM_UP_TO:
        flat = tensor.detach().view(-1)
        return math.sqrt(torch.dot(flat, flat).item())
    return quick_norm(tensor)


def exact_norm(tensor: torch.Tensor) -> float:
    """The 2-norm of a floating tensor; infinity exactly when a value is NaN or infinite (or float64 cannot hold it)."""
    tensor = tensor.detach()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    if not tensor.numel():
        return 0.0
    if not bool(torch.isfinite(tensor).all()):
        return math.inf
    wide = tensor.double()
    largest = float(wide.abs().max())
    return largest * float(torch.linalg.vector_norm(wide / largest)) if largest else 0.0


def norm_of(tensor: torch.Tensor, quick: float | None = None) -> float:
    """The 2-norm; infinity exactly when a value is NaN or infinite. `quick` is its `quick_norm` where that is known."""
    norm = quick_norm(tensor) if quick is None else quick
    return norm if math.isfinite(norm) else exact_norm(tensor)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; integers never are."""
    return not holds_floats(tensor) or math.isfinite(norm_after_pass(tensor)) or bool(torch.isfinite(tensor).all())


def count_non_finite(tensor: torch.Tensor) -> int:
    """How many values are NaN or infinite."""
    return int(torch.isfinite(tensor).logical_not().sum())


def magnitude(tensors: Iterable[torch.Tensor]) -> float:
    """The largest absolute value of some finite tensors, 1 at least: what is smaller does no harm."""
    sizes = [float(each.detach().abs().max()) for each in tensors if each.numel() and holds_floats(each)]
    return max([1.0, *sizes])


def split_by_magnitude(magnitudes: Sequence[float]) -> tuple[list[int], list[int]]:
    """Indices of the mild and of the extreme half of at least two calls, each in its order; neither is empty.

    Calls are parted at the geometric mean of the smallest and the largest magnitude, so that one call of 1e30 among
    many of 1 is found at once; calls of about the same magnitude are parted in the middle.
    """
    logs = [math.log(each) for each in magnitudes]
    low, high = min(logs), max(logs)
    if high - low > math.log(2.0):
        bound = (low + high) / 2
        mild = [index for index, each in enumerate(logs) if each <= bound]
        extreme = [index for index, each in enumerate(logs) if not each <= bound]
        if mild and extreme:  # infinities would leave one of them empty, and its caller without an end
            return mild, extreme
    half = len(magnitudes) // 2
    return list(range(half)), list(range(half, len(magnitudes)))


class NormGate:
    """Tells norms far over the usual ones of one expert. One thread writes it.

    Args:
        factor: how many times the running median a norm may be.
        warmup_calls: norms that the median begins with; until then nothing is far over it.
    """

    def __init__(self, *, factor: float, warmup_calls: int) -> None:
        self._reach = math.log(factor)
        self._warmup_calls = warmup_calls
        self._first: list[float] = []
        self._center: float | None = None
        self._streak = 0  # far norms in a row, negative when they are far below

    def __repr__(self) -> str:
        if self._center is None:
            return f"<NormGate: {len(self._first)} of {self._warmup_calls} norms seen>"
        return f"<NormGate: usual {self.usual:.3g}, at most {self.limit:.3g}>"

    @property
    def usual(self) -> float:
        """The running median; 0 until enough norms were seen."""
        return 0.0 if self._center is None else _exp(self._center)

    @property
    def limit(self) -> float:
        """The largest norm that passes now."""
        return math.inf if self._center is None else _exp(self._center + self._reach)

    def admits(self, norm: float) -> bool:
        """Whether a finite norm ≥ 0 passes; the estimate learns from it. Zeros carry nothing: they pass unseen."""
        if norm <= 0.0:
            return True
        value = math.log(norm)
        if self._center is None:
            self._begin(value)
            return True
        distance = value - self._center
        self._learn(distance)
        return distance <= self._reach

    def get_state(self) -> dict[str, Any]:
        """What it has learnt, as JSON."""
        return {"first": list(self._first), "center": self._center, "streak": self._streak}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what another one has learnt. Raises KeyError, TypeError, ValueError for no such state."""
        first, center, streak = [*map(_number, state["first"])], state["center"], int(state["streak"])
        self._first = first[: self._warmup_calls]
        self._center = None if center is None else _number(center)
        self._streak = max(-_MAX_STREAK, min(_MAX_STREAK, streak))

    # -- private

    def _begin(self, value: float) -> None:
        self._first.append(value)
        if len(self._first) >= self._warmup_calls:
            self._center = median(self._first)
            self._first.clear()

    def _learn(self, distance: float) -> None:
        assert self._center is not None
        if abs(distance) <= self._reach:
            self._streak = 0
            size = _STEP
        else:
            side = 1 if distance > 0 else -1
            self._streak = self._streak + side if self._streak * side > 0 else side
            size = _STEP * _FAR_SHARE * 2.0 ** (min(abs(self._streak), _MAX_STREAK) / _FAR_CALLS)
        self._center += math.copysign(min(size, abs(distance)), distance)


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no norm's logarithm")
    return number


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
