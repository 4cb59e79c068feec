"""Keeps an optimizer's parameters and state finite, whatever gradients it is given. Knows only torch.

1. A step is refused before it begins when a gradient is NaN or infinite, or their total norm, clipped or not, is over
   `SAFE_NORM`.
2. Under it the optimizers of `optimizers.py` cannot overflow float32 or bfloat16, and nothing more is read: squares
   stay under 1e24, and a sum of increments stops growing at 2^25 times the largest of them.
3. Where that does not hold (float16, options that can divide by zero or run away) parameters and state are copied,
   looked at after the step, and put back when it spoilt them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from p2pmoe.errors import NonFiniteResultError
from p2pmoe.server.gate import exact_norm, is_finite, norm_after_pass

SAFE_NORM = 1e12
"""Gradients of a larger total norm, after clipping, are not stepped with."""
_LARGE_RATE = 1e12  # times SAFE_NORM, and 2^25 times that in a sum (rule 2), it is still under float32's 3e38
_WIDE = (torch.float32, torch.float64, torch.bfloat16)

_Saved = tuple[
    list[tuple[torch.Tensor, torch.Tensor]],
    dict[torch.Tensor, dict[str, Any]],
    list[tuple[dict[str, Any], dict[str, Any]]],
]


class StepGuard:
    """Hooks around `optimizer.step()`; `guard_steps` makes it.

    Args:
        optimizer: whose steps are guarded, also when other code than ours calls them.
        max_norm: gradients are scaled down to this total norm; None leaves them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> None:
        self._max_norm = max_norm
        self._verifies = _may_divide_by_zero(optimizer) or any(
            parameter.dtype not in _WIDE for parameter in _parameters(optimizer)
        )
        self._saved: _Saved | None = None
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    # -- private

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._saved = None
        gradients = _gather(optimizer)
        try:
            self._scale_down(gradients)
        except NonFiniteResultError:
            optimizer.zero_grad(set_to_none=True)  # whoever called step may not: the next one would be refused too
            raise
        if self._verifies or _runs_away(optimizer):
            self._saved = _save(optimizer)

    def _scale_down(self, gradients: list[torch.Tensor]) -> None:
        norm = require_finite(gradients)
        if self._max_norm is not None and norm > self._max_norm:
            for gradient in gradients:
                gradient.mul_(self._max_norm / norm)
            norm = self._max_norm
        if norm > SAFE_NORM:
            raise NonFiniteResultError(f"the gradients' total norm is {norm:.3g}; over {SAFE_NORM:g} no step is taken")

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        saved, self._saved = self._saved, None
        _gather_state(optimizer)
        if saved is None or all(is_finite(_numbers(each)) for each in _trained(optimizer)):
            return
        _restore(optimizer, saved)
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteResultError("the optimizer's step overflowed; parameters and optimizer are as they were before")


_guards: WeakKeyDictionary[torch.optim.Optimizer, StepGuard] = WeakKeyDictionary()


def guard_steps(optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> None:
    """Guard an optimizer's steps from now on; one that is guarded already keeps its guard."""
    if optimizer not in _guards:
        _guards[optimizer] = StepGuard(optimizer, max_norm)


def require_finite(gradients: Iterable[torch.Tensor]) -> float:
    """The total norm of gradients. Raises NonFiniteResultError when one of them holds NaN or infinity."""
    dense = list(map(_numbers, gradients))
    total = math.hypot(*map(norm_after_pass, dense))
    if not math.isfinite(total):
        total = math.hypot(*map(exact_norm, dense))
    if not math.isfinite(total):
        raise NonFiniteResultError("the gradients of the parameters overflowed; the optimizer's step was not taken")
    return total


def _gather(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The gradients of a step. A sparse one names a row as often as a batch did: one entry a row is what it means.

    Fused steps take no sparse gradients: a group that has one is stepped without fusing from then on.
    """
    gradients: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (gradient := parameter.grad) is None:
                continue
            if gradient.layout is torch.sparse_coo:
                _opt_out_of_checks()
                gradient = parameter.grad = gradient.coalesce()
                if group.get("fused"):
                    group["fused"] = False
            gradients.append(gradient)
    return gradients


def _opt_out_of_checks() -> None:
    """Say that what torch does by default is meant; else it warns when an optimizer makes a sparse tensor."""
    checks = torch.sparse.check_sparse_tensor_invariants
    if not checks.is_enabled():
        checks.disable()


def _gather_state(optimizer: torch.optim.Optimizer) -> None:
    """Momentum of sparse gradients is sparse, and grows with every step unless its entries are gathered."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.layout is torch.sparse_coo and not value.is_coalesced():
                state[key] = value.coalesce()


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor stores, each place of it once."""
    if tensor.layout is torch.strided:
        return tensor
    return tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.to_dense()


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _trained(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """What a step writes: the parameters and their state."""
    yield from _parameters(optimizer)
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _may_divide_by_zero(optimizer: torch.optim.Optimizer) -> bool:
    """`centered` subtracts two averages that rounding can leave below zero, and takes the root."""
    return any(group.get("eps", 1.0) <= 0.0 or bool(group.get("centered")) for group in optimizer.param_groups)


def _runs_away(optimizer: torch.optim.Optimizer) -> bool:
    """Whether options can carry parameters to infinity from gradients that are in order.

    Weight decay times learning rate from 1 on, and a momentum over 1, can make them larger with every step; a learning
    rate that large, in one. An optimizer of the user's own need not have any of these.
    """
    for group in optimizer.param_groups:
        rate, decay = float(group.get("lr", 1.0)), float(group.get("weight_decay") or 0.0)
        if rate >= _LARGE_RATE or rate * decay >= 1.0 or float(group.get("momentum") or 0.0) > 1.0:
            return True
    return False


def _save(optimizer: torch.optim.Optimizer) -> _Saved:
    parameters = [(parameter, parameter.detach().clone()) for parameter in _parameters(optimizer)]
    state = {
        parameter: {key: _copy(value) for key, value in each.items()} for parameter, each in optimizer.state.items()
    }
    groups = [
        (group, {key: _copy(value) for key, value in group.items() if key != "params"})
        for group in optimizer.param_groups
    ]
    return parameters, state, groups


@torch.no_grad()
def _restore(optimizer: torch.optim.Optimizer, saved: _Saved) -> None:
    parameters, state, groups = saved
    for parameter, value in parameters:
        parameter.copy_(value)
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, values in groups:
        group.update(values)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
