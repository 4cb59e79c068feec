"""Models in bfloat16, float16 and float64 around float32 experts: outputs and gradients come back in their dtype."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swarm_kit import WAIT_S, World, grid_backends, make_backend, open_world, same_bits
from torch import nn

import p2pmoe
from p2pmoe import BatchTensorProto as P
from p2pmoe.client.arguments import give_back
from p2pmoe.client.beam_search import BeamSearch, MaskCache
from p2pmoe.errors import SchemaError

D = 4
DTYPES = [torch.bfloat16, torch.float16, torch.float64]


class Rich(nn.Module):
    """Nested and keyword arguments, several outputs, one of integers, one of another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 3)

    def forward(self, x: torch.Tensor, pair: Any, *, index: torch.Tensor) -> Any:
        y = self.linear(x) + pair["shift"][0]
        return {"out": y, "extra": [y.sum(1), index * 2], "half": y.half()}


RICH = {
    "args_schema": (P(D), {"shift": (P(3),)}),
    "kwargs_schema": {"index": P(2, dtype=torch.int64)},
}


@pytest.fixture
def world() -> Iterator[World]:
    hosts = {
        "alice": [*grid_backends([0], lr=0.0), make_backend("rich.0", Rich(), lr=0.0, **RICH)],
        "bob": grid_backends([1], lr=0.0),
    }
    with open_world(hosts) as world:
        yield world


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_answers_in_the_callers_dtype(world: World, carrier: str, dtype: torch.dtype) -> None:
    with open_world({"alice": [make_backend("ffn.0", lr=0.0)]}, carrier=carrier) as other:
        expert, local = other.swarm.expert("ffn.0"), other.backend("ffn.0").expert
        x = torch.randn(3, D, dtype=dtype, requires_grad=True)
        y = expert(x)
        assert same_bits(y, local(x.float()).to(dtype))
        awaited = asyncio.run(asyncio.wait_for(expert.acall(x), WAIT_S))
        assert same_bits(awaited, y)
        gradient = torch.randn(3, D, dtype=dtype)
        (given,) = torch.autograd.grad(y, x, gradient)
        assert same_bits(given, torch.autograd.grad(local(x.float()).to(dtype), x, gradient)[0])
        nn.Sequential(nn.Linear(D, D), expert, nn.Linear(D, 1)).to(dtype)(x).sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_outputs_and_keywords(world: World, dtype: torch.dtype) -> None:
    expert = world.swarm.expert("rich.0")
    x, shift = torch.randn(3, D, dtype=dtype, requires_grad=True), torch.randn(3, 3, dtype=dtype, requires_grad=True)
    index = torch.randint(9, (3, 2))
    given = expert(x, {"shift": (shift,)}, index=index)
    floats = [given["out"], given["extra"][0], given["half"]]
    assert [each.dtype for each in floats] == [dtype] * 3
    assert torch.equal(given["extra"][1], index * 2)
    (floats[0].sum() + floats[1].sum() + floats[2].sum()).backward()
    assert (x.grad.dtype, shift.grad.dtype) == (dtype, dtype)


def test_outputs_are_the_schemas_where_nothing_was_cast(world: World) -> None:
    given = world.swarm.expert("rich.0")(
        torch.randn(3, D), {"shift": (torch.randn(3, 3),)}, index=torch.ones(3, 2).long()
    )
    assert [given["out"].dtype, given["half"].dtype] == [torch.float32, torch.float16]


def test_the_first_floating_argument_decides(world: World) -> None:
    expert, index = world.swarm.expert("rich.0"), torch.ones(3, 2, dtype=torch.int64)
    x, shift = torch.randn(3, D), torch.randn(3, 3)
    assert expert(x.bfloat16(), {"shift": (shift,)}, index=index)["out"].dtype is torch.bfloat16
    assert expert(x, {"shift": (shift.bfloat16(),)}, index=index)["out"].dtype is torch.float32


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_mixtures_answer_in_the_callers_dtype_whatever_the_gates_is(
    world: World, dtype: torch.dtype, gate_dtype: torch.dtype, rows: int
) -> None:
    options = {"in_features": D, "grid_size": (2, 2), "uid_prefix": "ffn"}
    for layer in (world.mixture(), p2pmoe.RemoteSwitchMixtureOfExperts(world.swarm, **options)):
        layer.to(gate_dtype)
        x = torch.randn(rows, D, dtype=dtype, requires_grad=True)
        y = layer(x)
        if isinstance(y, tuple):
            y, loss = y
            assert loss.dtype is torch.promote_types(gate_dtype, torch.float32)
            loss.backward(retain_graph=True)
        assert (y.dtype, y.shape) == (dtype, (rows, D))
        y.sum().backward()
        assert x.grad.dtype is dtype
        assert layer.gate.proj.weight.grad.dtype is gate_dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixture_of_another_dtype_is_as_near_as_its_dtype_allows(world: World, dtype: torch.dtype) -> None:
    """Weights and sums are float32: the only roundings are those of the input, of the gate and of the output."""
    moe = world.mixture(k_best=4)
    x = torch.randn(64, D).to(dtype)
    with torch.no_grad():
        expected = moe(x.float())
        given = moe(x)
    if dtype is torch.float64:
        torch.testing.assert_close(given.float(), expected, rtol=1e-6, atol=1e-6)
    else:
        assert same_bits(given, expected.to(dtype)), "rounded once, at the end"


def test_half_precision_experts_are_mixed_in_float32() -> None:
    dtype = torch.bfloat16
    with open_world({"alice": grid_backends([0, 1], lr=0.0, dtype=dtype)}) as world, torch.no_grad():
        moe = world.mixture(k_best=4)
        x = torch.randn(32, D, dtype=dtype)
        y = moe(x)
        scores = [each.float() for each in moe.gate(x)]
        cells = list(itertools.product(range(2), range(2)))
        weights = torch.softmax(torch.stack([scores[0][:, i] + scores[1][:, j] for i, j in cells], 1), 1)
        outputs = [world.backend(f"ffn.{i}.{j}").expert(x).float() for i, j in cells]
        exact = sum(weights[:, k : k + 1] * output for k, output in enumerate(outputs))
        assert y.dtype is dtype
        # One rounding of the sum to 8 bits, and experts that round differently for other rows beside them.
        torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=2**-9)


def test_autocast_trunks(world: World) -> None:
    trunk = nn.Linear(D, D)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = trunk(torch.randn(3, D))
        assert hidden.dtype is torch.bfloat16
        for layer in (world.mixture(), world.swarm.expert("ffn.0.0")):
            y = layer(hidden)
            assert y.dtype is torch.bfloat16
            (hidden + y).float().sum().backward(retain_graph=True)
    assert trunk.weight.grad.dtype is torch.float32


def test_near_ties_of_a_float64_gate_are_told_apart() -> None:
    """In float32, or in a default dtype of bfloat16, both sums are the same number."""
    first = torch.zeros(1, 2, dtype=torch.float64)
    second = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        search = BeamSearch([first, second], "ffn", 4, MaskCache())
        while wanted := search.wanted():
            search.advance({prefix: {0: (object(),), 1: (object(),)} for prefix in wanted})  # type: ignore[misc]
    finally:
        torch.set_default_dtype(torch.float32)
    found = search.found(1)
    assert found.coordinates[0, 0, 1].item() == 1


def test_a_gate_of_float32_scores_is_searched_in_float32_under_any_default_dtype(world: World) -> None:
    """In bfloat16 sums of scores are often ties, and the wrong experts were taken."""
    moe = world.mixture(k_best=1)
    with torch.no_grad():
        moe.gate.proj.weight.zero_()
        moe.gate.proj.bias.copy_(torch.tensor([1.0, 1.001, 1.0, 1.001]))
    x = torch.randn(3, D)
    torch.set_default_dtype(torch.bfloat16)
    try:
        y = moe(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_bits(y, world.backend("ffn.1.1").expert(x))


# -------------------------------------------------------------------------------------------- integers


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> Any:
        return {"y": x * self.scale, "count": (x > 0).sum(1)}


def test_integer_outputs_in_a_mixture_are_refused_with_the_way_out() -> None:
    """Weights cast to integers made zeros of them."""
    backends = [make_backend(f"ffn.0.{i}", Counts()) for i in range(2)]
    with open_world({"alice": backends}) as world:
        options = {"in_features": D, "grid_size": (1, 2), "uid_prefix": "ffn"}
        x = torch.randn(3, D)
        for layer in (world.mixture(grid_size=(1, 2)), p2pmoe.RemoteSwitchMixtureOfExperts(world.swarm, **options)):
            for _ in range(2):
                with pytest.raises(SchemaError, match=r"INT64\[batch\].*integers cannot take.*swarm\.expert"):
                    layer(x)
            with pytest.raises(SchemaError, match="integers cannot take"):
                asyncio.run(layer.acall(x))
        assert world.swarm.dispatcher.exchanges == 0
        assert torch.equal(world.swarm.expert("ffn.0.1")(x)["count"], (x > 0).sum(1))


def test_integer_inputs_are_scored_and_carried() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.embedding(tokens).sum(1)

    schema = {"args_schema": (P(D, dtype=torch.int64),)}
    backends = [make_backend(f"ffn.0.{i}", Table(), **schema) for i in range(2)]
    with open_world({"alice": backends}) as world:
        moe = world.mixture(grid_size=(1, 2), k_best=1)
        tokens = torch.randint(10, (5, D))
        y = moe(tokens)
        assert (y.shape, y.dtype) == ((5, 3), torch.float32)
        y.sum().backward()
        assert moe.gate.proj.weight.grad is not None
        with pytest.raises(SchemaError, match="INT64"):
            moe(torch.randn(5, D))


def test_give_back_leaves_integers_alone() -> None:
    outputs = torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    assert [each.dtype for each in give_back(outputs, torch.float64)] == [torch.float64, torch.int64, torch.bool]
    assert give_back(outputs, None) == outputs
