"""Optimizers and the gradients that experts give: sparse ones, other dtypes, and experts that have none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from swarm_kit import make_backend, same_bits
from torch import nn

from p2pmoe import BatchTensorProto as P
from p2pmoe import ExpertBackend
from p2pmoe.config import GateConfig, OptimizerConfig
from p2pmoe.errors import ConfigError, NonFiniteResultError
from p2pmoe.metrics import NodeMetrics
from p2pmoe.server.optimizers import NoOptimizer, make_optimizer
from p2pmoe.server.screening import guard_experts

INDEX = torch.tensor([1, 1, 1, 2])


class Mixed(nn.Module):
    """An embedding with sparse gradients below a linear layer with dense ones."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.table, self.linear = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(index))


def embed(name: str, module: nn.Module | None = None, **options: Any) -> ExpertBackend:
    module = module or nn.Embedding(10, 4, sparse=True)
    config = OptimizerConfig(name=name, **{"lr": 1.0} | options)
    trained = make_optimizer(module.parameters(), config)
    return ExpertBackend("ffn.0", module, trained, args_schema=P(dtype=torch.int64))


def test_clipping_takes_the_norm_of_rows_not_of_entries() -> None:
    """Four rows of a batch that name one row of the table, each with the gradient 2: it is 8, its norm is 16."""
    backend = embed("sgd", clip_grad_norm=1.0)
    before = backend.expert.weight.detach().clone()
    backend.backward(torch.ones(4, dtype=torch.int64), torch.full((4, 4), 2.0))
    step = before - backend.expert.weight.detach()
    assert math.isclose(float(step.norm()), 1.0, rel_tol=1e-5)
    assert step[1].tolist() == pytest.approx([0.5] * 4, rel=1e-5)


def test_entries_that_cancel_are_no_overflow() -> None:
    backend = embed("sgd", clip_grad_norm=None)
    gradient = torch.tensor([[3e12] * 4, [-3e12] * 4, [0.0] * 4, [1.0] * 4])
    backend.backward(INDEX, gradient)
    assert backend.update_count == 1
    with pytest.raises(NonFiniteResultError, match="no step is taken"):
        backend.backward(INDEX, gradient.abs())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_sparse_gradient_changes_nothing(bad: float) -> None:
    backend = embed("adagrad")
    guard_experts([backend], GateConfig(), NodeMetrics())
    before = backend.expert.weight.detach().clone()
    gradient = torch.ones(4, 4)
    gradient[2, 1] = bad
    with pytest.raises(NonFiniteResultError):
        backend.backward(INDEX, gradient)
    assert same_bits(before, backend.expert.weight)


@pytest.mark.parametrize("module", [lambda: nn.Embedding(10, 4, sparse=True), Mixed])
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("adagrad", torch.optim.Adagrad, {}),
    ],
)
def test_sparse_gradients_step_as_torch_does(module: Any, name: str, kind: Any, options: dict[str, Any]) -> None:
    def make() -> nn.Module:
        torch.manual_seed(11)
        return module()  # type: ignore[no-any-return]

    backend, local = embed(name, make(), options=options, clip_grad_norm=None, lr=0.1), make()
    optimizer = kind(local.parameters(), lr=0.1, **options)
    for seed in range(4):
        torch.manual_seed(seed)
        gradient = torch.randn(4, 4)
        local(INDEX).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        backend.backward(INDEX, gradient)
        for mine, theirs in zip(local.parameters(), backend.expert.parameters(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_sparse_adam_steps() -> None:
    backend = embed("sparse_adam", lr=0.1)
    before = backend.expert.weight.detach().clone()
    backend.backward(INDEX, torch.ones(4, 4))
    changed = (backend.expert.weight.detach() != before).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 2]


def test_sparse_momentum_does_not_grow() -> None:
    backend = embed("sgd", options={"momentum": 0.9})
    for _ in range(20):
        backend.backward(INDEX, torch.ones(4, 4))
    (buffer,) = (each["momentum_buffer"] for each in backend.opt.state.values())
    assert buffer._nnz() == 2


def test_a_sparse_gradient_of_an_input_comes_back_dense() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, table: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(torch.arange(len(table)), table * self.weight, sparse=False)

    class Raw(Lookup):
        def forward(self, table: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(torch.arange(len(table)), table, sparse=True)

    for kind in (Lookup, Raw):
        backend = make_backend("ffn.0", kind())
        (gradient,) = backend.backward(torch.ones(3, 4), torch.full((3, 4), 2.0))
        assert gradient.tolist() == [[2.0] * 4] * 3


def test_a_sparse_gradient_without_a_sparse_module_is_stepped_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(10, 4))

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(index, self.table, sparse=True)

    backend = embed("sgd", Functional(), clip_grad_norm=None)
    backend.backward(INDEX, torch.ones(4, 4))
    assert backend.expert.table[1].tolist() == [-2.0] * 4


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "adadelta", "adamax", "nadam", "radam"])
def test_an_optimizer_that_takes_no_sparse_gradients_is_refused_in_words(name: str) -> None:
    with pytest.raises(ConfigError, match=r"ffn\.0: \w+ takes no sparse gradients.*sgd, adagrad, sparse_adam"):
        embed(name)


def test_combinations_that_torch_refuses_at_the_first_step_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="SparseAdam trains nothing but embeddings"):
        embed("sparse_adam", Mixed())
    with pytest.raises(ConfigError, match="no weight_decay"):
        embed("sgd", options={"weight_decay": 0.1})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad"])
def test_parameters_of_any_dtype_are_trained(name: str, dtype: torch.dtype) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.to(dtype) * self.weight
            return (y.real if dtype.is_complex else y).float()

    module = Scale()
    optimizer = make_optimizer(module.parameters(), OptimizerConfig(name=name, lr=0.25))
    backend = ExpertBackend("ffn.0", module, optimizer, args_schema=P(4))
    guard_experts([backend], GateConfig(), NodeMetrics())
    (gradient,) = backend.backward(torch.ones(2, 4), torch.full((2, 4), 0.5))
    assert gradient.tolist() == [[0.5] * 4] * 2
    assert bool((module.weight.real < 1.0).all() if dtype.is_complex else (module.weight < 1.0).all())


# ------------------------------------------------------------------------------------------------- none


class Shift(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3.0


@pytest.mark.parametrize("module", [Shift(), nn.Linear(4, 4)])
def test_an_expert_that_is_not_trained_gives_gradients_and_stays(module: nn.Module) -> None:
    for optimizer in (None, make_optimizer(module.parameters(), OptimizerConfig(name="none"))):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        backend = ExpertBackend("ffn.0", module, optimizer, args_schema=P(4))
        guard_experts([backend], GateConfig(), NodeMetrics())
        x, gradient = torch.ones(2, 4), torch.ones(2, 4)
        mine = x.clone().requires_grad_()
        expected = torch.autograd.grad(module(mine), mine, gradient)[0]
        for _ in range(2):
            assert same_bits(backend.backward(x, gradient)[0], expected)
        assert all(map(same_bits, before.values(), module.state_dict().values()))
        assert all(each.grad is None for each in module.parameters())
        assert (backend.update_count, backend.is_trained) == (0, False)
        assert isinstance(backend.opt, NoOptimizer)


def test_nothing_to_train_is_said_in_words() -> None:
    with pytest.raises(ConfigError, match=r"no parameters to train; set optimizer\.name = 'none'"):
        make_optimizer(Shift().parameters(), OptimizerConfig())


def test_optimizers_that_need_a_closure_are_refused_in_words() -> None:
    module = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"ffn\.0: LBFGS needs a closure"):
        ExpertBackend("ffn.0", module, torch.optim.LBFGS(module.parameters()), args_schema=P(4))
    with pytest.raises(ConfigError, match=r"unknown optimizer 'lbfgs'.*several times"):
        make_optimizer(module.parameters(), OptimizerConfig(name="lbfgs"))

    class Own(torch.optim.SGD):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            closure()

    with pytest.raises(ConfigError, match="Own needs a closure"):
        ExpertBackend("ffn.0", module, Own(module.parameters(), lr=0.1), args_schema=P(4))
