"""Where autograd is easily cut or wrong: no rows, no gradients, odd layouts, gradients that are kept or change."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swarm_kit import WAIT_S, Gate, World, grid_backends, make_backend, open_world, run_threads, same_bits
from torch import nn

from p2pmoe import BatchTensorProto as P
from p2pmoe.errors import SchemaError, TorchModeError

D = 4


class Pair(nn.Module):
    """Two outputs; an input that is not used; keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, *, options: Any, unused: torch.Tensor) -> Any:
        return {"out": x * self.weight + options["shift"], "sums": [x.sum(1)]}


PAIR = {
    "args_schema": (P(D),),
    "kwargs_schema": {"options": {"shift": P(D)}, "unused": P(2)},
}


@pytest.fixture
def world(carrier: str) -> Iterator[World]:
    backends = [*grid_backends([0, 1], lr=0.0), make_backend("pair.0", Pair(), lr=0.0, **PAIR)]
    with open_world({"alice": backends}, carrier=carrier) as world:
        yield world


def awaited(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, WAIT_S))


# ---------------------------------------------------------------------------------------------- no rows


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_rows_stay_in_the_graph(world: World, asynchronous: bool) -> None:
    expert = world.swarm.expert("ffn.0.0")
    layer = nn.Linear(D, D)
    x = torch.zeros(0, D, requires_grad=True)
    y = awaited(expert.acall(layer(x))) if asynchronous else expert(layer(x))
    assert (y.shape, y.dtype, y.requires_grad) == ((0, D), torch.float32, True)
    y.sum().backward()
    assert same_bits(x.grad, torch.zeros(0, D))
    assert same_bits(layer.weight.grad, torch.zeros(D, D))
    assert world.swarm.dispatcher.exchanges == 0
    assert world.backend("ffn.0.0").update_count == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_rows_of_nested_and_keyword_arguments(world: World, asynchronous: bool) -> None:
    expert = world.swarm.expert("pair.0")
    x, shift, unused = (torch.zeros(0, size, dtype=torch.float64, requires_grad=True) for size in (D, D, 2))
    arguments = {"options": {"shift": shift}, "unused": unused}
    outputs = awaited(expert.acall(x, **arguments)) if asynchronous else expert(x, **arguments)
    assert [outputs["out"].shape, outputs["sums"][0].shape] == [(0, D), (0,)]
    assert outputs["out"].dtype is torch.float64
    (outputs["out"].sum() + outputs["sums"][0].sum()).backward()
    for leaf in (x, shift, unused):
        assert same_bits(leaf.grad, torch.zeros_like(leaf))
    assert world.swarm.dispatcher.exchanges == 0


def test_no_rows_that_need_no_gradient_may_be_trained_through(world: World) -> None:
    moe = world.mixture()
    moe.requires_grad_(False)
    for layer in (moe, world.swarm.expert("ffn.0.0")):
        layer(torch.zeros(0, D)).sum().backward()
        with torch.no_grad():
            assert not layer(torch.zeros(0, D)).requires_grad
        with torch.inference_mode():
            assert layer(torch.zeros(0, D)).shape == (0, D)


def test_sequences_of_no_length(carrier: str) -> None:
    """Rows there are, but without any number: experts that take [0, D] a row, and mixtures of them."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(1)[:, :2] + self.bias

    backends = [make_backend(f"ffn.0.{i}", Sum(), lr=0.0, args_schema=(P(0, D),)) for i in range(2)]
    with open_world({"alice": backends}, carrier=carrier) as world:
        for layer in (world.swarm.expert("ffn.0.0"), world.mixture(grid_size=(1, 2))):
            x = torch.zeros(3, 0, D, requires_grad=True)
            y = layer(x)
            assert same_bits(y, torch.ones(3, 2))
            y.sum().backward()
            assert same_bits(x.grad, torch.zeros(3, 0, D))
        assert world.backend("ffn.0.0").update_count == 2


# ------------------------------------------------------------------------------------- gradients and graphs


def test_the_gate_learns_where_the_input_needs_no_gradient(world: World) -> None:
    moe = world.mixture(k_best=4)
    moe(torch.randn(3, D)).square().sum().backward()
    assert moe.gate.proj.weight.grad.abs().sum() > 0


def test_unused_outputs_and_inputs(world: World) -> None:
    expert = world.swarm.expert("pair.0")
    x, shift, unused = (torch.randn(3, size, requires_grad=True) for size in (D, D, 2))
    outputs = expert(x, options={"shift": shift}, unused=unused)
    given = torch.autograd.grad(outputs["sums"][0].sum(), (x, shift, unused), retain_graph=True)
    assert [
        same_bits(a, b) for a, b in zip(given, (torch.ones(3, D), torch.zeros(3, D), torch.zeros(3, 2)), strict=True)
    ]
    for _ in range(2):
        (given_x,) = torch.autograd.grad(outputs["out"].sum(), (x,), retain_graph=True)
        assert same_bits(given_x, torch.ones(3, D))


def test_sparse_gradients_of_outputs_arrive_dense(world: World) -> None:
    """Outputs used as a table that is looked up with `sparse=True`."""
    expert, x = world.swarm.expert("ffn.0.0"), torch.randn(5, D, requires_grad=True)
    looked_up = torch.tensor([1, 3, 3])
    dense = torch.autograd.grad(expert(x)[looked_up].sum(), x)[0]
    table = nn.functional.embedding(looked_up, expert(x), sparse=True)
    assert same_bits(torch.autograd.grad(table.sum(), x)[0], dense)


def test_hooks_see_what_they_would_see_locally(world: World) -> None:
    expert = world.swarm.expert("ffn.0.0")
    seen: list[Any] = []
    expert.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    expert.register_full_backward_hook(lambda module, inputs, outputs: seen.append((inputs[0].shape, outputs[0].shape)))
    x = torch.randn(3, D, requires_grad=True)
    x.register_hook(lambda gradient: gradient * 2)
    expert(x).sum().backward()
    assert seen == [(3, D), ((3, D), (3, D))]
    expected = torch.autograd.grad(world.backend("ffn.0.0").expert(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)  # grad() runs the hook too


def test_odd_memory(world: World) -> None:
    """Expanded, overlapping, negative and strided inputs and gradients go by value."""
    base = torch.randn(3, D)
    overlapping = torch.randn(6).unfold(0, D, 1)
    inputs = [
        base[:1].expand(3, D),
        overlapping,
        base.t().contiguous().t(),
        torch.randn(3, 2 * D)[:, ::2],
        base.flip(0),
    ]
    for layer in (world.swarm.expert("ffn.0.0"), world.mixture(k_best=4)):
        for x in inputs:
            plain, odd = x.clone().requires_grad_(), x.detach().requires_grad_()
            y, z = layer(plain), layer(odd)
            torch.testing.assert_close(y, z)  # a local gate rounds strided inputs otherwise
            gradient = torch.randn(1, D).expand(3, D)
            y.backward(gradient.contiguous())
            z.backward(gradient)
            torch.testing.assert_close(plain.grad, odd.grad)


def test_an_input_changed_in_place_before_backward_raises_as_torch_does(world: World) -> None:
    for layer in (world.swarm.expert("ffn.0.0"), world.mixture(k_best=4)):
        x = torch.randn(3, D)
        y = layer(x)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        if layer.__class__.__name__ == "RemoteExpert":
            assert world.backend("ffn.0.0").update_count == 0, "nothing was sent"


def test_outputs_may_be_changed_in_place_and_viewed(world: World) -> None:
    for layer in (world.swarm.expert("ffn.0.0"), world.mixture(k_best=4)):
        x, z = (torch.ones(3, D).requires_grad_() for _ in range(2))
        layer(x).mul_(2.0).view(-1)[:5].relu_().sum().backward()
        (layer(z) * 2.0).view(-1)[:5].relu().sum().backward()
        assert same_bits(x.grad, z.grad)


def test_an_input_changed_while_an_awaited_call_is_under_way_is_noticed() -> None:
    """What was sent and what backward would send are not the same numbers."""
    gate = Gate()
    with open_world({"alice": [make_backend("gate.0", gate)]}) as world:
        expert = world.swarm.expert("gate.0")
        expert.info  # noqa: B018
        x = torch.ones(2, D)
        gate.armed = True

        def change() -> None:
            assert gate.begun.wait(WAIT_S)
            x.add_(1.0)
            gate.go.set()

        def call() -> None:
            with pytest.raises(TorchModeError, match="while the call was under way"):
                awaited(expert.acall(x))

        run_threads([call, change])
        gate.armed = False
        assert same_bits(awaited(expert.acall(x)), x)


def test_arguments_that_are_no_tensors_are_typed_errors_of_the_mixture(world: World) -> None:
    moe = world.mixture()
    for wrong in (None, 1.0, [[1.0] * D], "x"):
        with pytest.raises(SchemaError, match="takes"):
            moe(wrong)


@pytest.mark.parametrize("grid_size", [4, "44", (2.0, 2), (2, None)])
def test_grid_sizes_that_are_none(world: World, grid_size: Any) -> None:
    with pytest.raises(SchemaError, match="whole numbers"):
        world.mixture(grid_size=grid_size)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_rows_of_any_length_stay_in_the_graph(asynchronous: bool) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    backends = [make_backend(f"ffn.0.{i}", Mean(), args_schema=(P(None, D),)) for i in range(2)]
    with open_world({"alice": backends}) as world:
        for layer in (world.swarm.expert("ffn.0.0"), world.mixture(grid_size=(1, 2))):
            x = torch.zeros(0, 7, D, dtype=torch.bfloat16, requires_grad=True)
            y = awaited(layer.acall(x)) if asynchronous else layer(x)
            assert (y.shape, y.dtype) == ((0, 7, D), torch.bfloat16)
            y.sum().backward()
            assert same_bits(x.grad, torch.zeros(0, 7, D, dtype=torch.bfloat16))
        assert world.swarm.dispatcher.exchanges == 0
