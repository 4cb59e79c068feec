"""Optimizer steps that cannot spoil parameters, and clipping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swarm_kit import same_bits
from torch import nn

from p2pmoe.config import OptimizerConfig
from p2pmoe.errors import NonFiniteResultError
from p2pmoe.server.gate import is_finite
from p2pmoe.server.optimizers import OPTIMIZERS, make_optimizer
from p2pmoe.server.step_guard import SAFE_NORM, guard_steps


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, gradient: float) -> None:
    parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_changes_nothing_and_does_not_stay(name: str, clip: float | None, bad: float) -> None:
    parameter, quiet = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    config = OptimizerConfig(name=name, clip_grad_norm=clip, warmup_steps=4)
    optimizer, twin = make_optimizer([parameter], config), make_optimizer([quiet], config)
    for value in (0.5, -0.3, 0.2):
        parameter.grad = torch.tensor([0.1, bad, 0.1])
        with pytest.raises(NonFiniteResultError, match="not taken"):
            optimizer.step()
        assert parameter.grad is None
        step(parameter, optimizer, value)
        step(quiet, twin, value)
    assert all(map(same_bits, state_of(optimizer), state_of(twin)))
    assert optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(
    gradients=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=20),
    clip=st.sampled_from([None, 1.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    lr=st.sampled_from([1e-3, 1.0, 1e3]),
    odd=st.booleans(),
)
def test_no_sequence_of_gradients_makes_parameters_or_state_non_finite(
    name: str, gradients: list[float], clip: float | None, dtype: torch.dtype, lr: float, odd: bool
) -> None:
    options: dict[str, Any] = {}
    if odd:
        options = {"rmsprop": {"centered": True}, "sgd": {"momentum": 0.9, "weight_decay": 0.1}}.get(name, {"eps": 0.0})
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
    config = OptimizerConfig(name=name, lr=lr, clip_grad_norm=clip, options=options)
    optimizer = make_optimizer([parameter], config)
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient, 1.0]).to(dtype)
        try:
            optimizer.step()
        except NonFiniteResultError:
            assert parameter.grad is None
        assert all(map(is_finite, state_of(optimizer)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_decay_that_makes_parameters_grow_stops_before_infinity(dtype: torch.dtype) -> None:
    """A learning rate of 1,000 with a decay of 0.1 multiplies parameters by -99 at every step, gradients or none."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
    config = OptimizerConfig(name="sgd", lr=1e3, options={"momentum": 0.9, "weight_decay": 0.1})
    optimizer = make_optimizer([parameter], config)
    refused = 0
    for _ in range(60):
        try:
            step(parameter, optimizer, 0.0)
        except NonFiniteResultError:
            refused += 1
        assert all(map(is_finite, state_of(optimizer)))
    assert refused


def test_a_step_that_overflows_is_undone_to_the_bit() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=1e4, momentum=0.5)
    guard_steps(optimizer)
    step(parameter, optimizer, 0.5)
    before = state_of(optimizer)
    with pytest.raises(NonFiniteResultError, match="as they were before"):
        step(parameter, optimizer, 60.0)
    assert all(map(same_bits, before, state_of(optimizer)))
    step(parameter, optimizer, 0.25)
    assert is_finite(parameter)


class WithoutOptions(torch.optim.Optimizer):
    """What the least of a user's own optimizers has: no learning rate, no state."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= parameter.grad


def test_an_optimizer_without_a_learning_rate_steps() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = WithoutOptions([parameter])
    guard_steps(optimizer)
    step(parameter, optimizer, 0.25)
    assert torch.equal(parameter.detach(), torch.full((3,), 0.75))


@pytest.mark.parametrize("options", [{"lr": 1e30}, {"lr": 0.1, "momentum": 1e6}])
def test_options_that_run_away_stop_before_infinity(options: dict[str, float]) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], **options)
    guard_steps(optimizer)

    def many_steps() -> None:
        for _ in range(20):
            step(parameter, optimizer, 1e11)

    with pytest.raises(NonFiniteResultError, match="as they were before"):
        many_steps()
    assert all(map(is_finite, state_of(optimizer)))


def test_an_optimizer_of_the_users_own_is_guarded_once() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([parameter], OptimizerConfig(name="sgd", lr=1.0, clip_grad_norm=0.5))
    guard_steps(optimizer)
    step(parameter, optimizer, 5.0)
    assert parameter.item() == pytest.approx(-0.5), "the guard it was made with clips; a second would not"
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_a_norm_that_float32_cannot_square_is_clipped_exactly() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer([parameter], OptimizerConfig(name="sgd", lr=1.0, clip_grad_norm=5.0))
    parameter.grad = torch.tensor([3e30, 4e30])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-3.0, -4.0])


def test_without_clipping_a_norm_that_could_overflow_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    guard_steps(optimizer)
    with pytest.raises(NonFiniteResultError, match=r"total norm is 2e\+12"):
        step(parameter, optimizer, SAFE_NORM * 2)
    step(parameter, optimizer, SAFE_NORM / 2)
    assert parameter.item() == pytest.approx(-SAFE_NORM / 2)


def test_gradients_under_the_limit_keep_their_bits() -> None:
    gradient = torch.randn(7)
    parameter, quiet = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    optimizer = make_optimizer([parameter], OptimizerConfig(name="sgd", clip_grad_norm=100.0))
    twin = torch.optim.SGD([quiet], lr=1e-3)
    parameter.grad, quiet.grad = gradient.clone(), gradient.clone()
    optimizer.step()
    twin.step()
    assert same_bits(parameter, quiet)


def test_sparse_gradients_are_looked_at_too() -> None:
    table = nn.Embedding(10, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    guard_steps(optimizer)
    before = table.weight.detach().clone()
    table(torch.tensor([3])).sum().backward()
    optimizer.step()
    assert not same_bits(before, table.weight)
    before = table.weight.detach().clone()
    (table(torch.tensor([3])) * math.inf).sum().backward()
    with pytest.raises(NonFiniteResultError):
        optimizer.step()
    assert same_bits(before, table.weight)
