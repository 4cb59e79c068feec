"""Experts with state on the server: what a call may leave behind, what mode and seed decide, who shares a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swarm_kit import make_backend, same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import p2pmoe
from p2pmoe.server.devices import PlainDevice
from p2pmoe.server.task_pool import TaskPool
from p2pmoe.types import Manner

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
G = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
TRAIN, EVAL = Manner("train"), Manner("eval")


def seeded(function: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return function()


def normed() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))


def dropping() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.5)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = normed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


class Counting(nn.Module):
    """Counts its rows in a buffer that it replaces, and in one that it makes when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows = self.rows + len(x)
        if "late" not in dict(self.named_buffers()):
            self.register_buffer("late", torch.zeros(()))
        self.late += 1
        return x * self.weight


async def compute(pool: TaskPool, *tensors: torch.Tensor, manner: Manner = TRAIN) -> tuple[torch.Tensor, ...]:
    """One batch of one call, computed by this thread."""
    pool.submit(tensors, manner=manner)
    batch = pool.take_batch()
    assert batch is not None
    device = PlainDevice(torch.device("cpu"))
    return device.finish(device.launch(device.stage(batch)))


def state(backend: p2pmoe.ExpertBackend) -> dict[str, torch.Tensor]:
    return copy.deepcopy(backend.expert.state_dict())


def same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(map(same_bits, first.values(), second.values()))


# ------------------------------------------------------------------------------------------------ buffers


@pytest.mark.parametrize("make", [normed, Counting, Checkpointed])
@pytest.mark.parametrize("manner", [TRAIN, EVAL])
async def test_forward_leaves_everything_as_it_was(make: Callable[[], nn.Module], manner: Manner) -> None:
    backend = make_backend("ffn.0", make())
    before = state(backend)
    for _ in range(3):
        await compute(backend.forward_pool, X, manner=manner)
    backend.forward(X)
    assert same_state(before, state(backend))


@pytest.mark.parametrize("make", [normed, Checkpointed])
async def test_a_trained_batch_counts_once_and_as_it_does_locally(make: Callable[[], nn.Module]) -> None:
    """Forward, backward and step here are one forward, backward and step of a module at home, bit for bit."""
    backend, local = make_backend("ffn.0", make()), normed()
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for _ in range(3):
        x = X.clone().requires_grad_()
        y = local(x)
        assert same_bits(y, (await compute(backend.forward_pool, X))[0])
        y.backward(G)
        optimizer.step()
        optimizer.zero_grad()
        assert same_bits(x.grad, (await compute(backend.backward_pool, X, G))[0])
        assert all(map(same_bits, local.state_dict().values(), state(backend).values()))
    assert local[1].num_batches_tracked == 3


async def test_a_buffer_that_is_replaced_or_made_late_is_written_by_trained_batches_only() -> None:
    backend = make_backend("ffn.0", Counting())
    await compute(backend.forward_pool, X)
    assert "late" not in state(backend)
    for _ in range(2):
        await compute(backend.backward_pool, X, G)
        await compute(backend.forward_pool, X)
        await compute(backend.backward_pool, X, G, manner=EVAL)
    assert (state(backend)["rows"], state(backend)["late"]) == (12, 2.0)


async def test_backward_in_eval_mode_is_of_the_function_that_forward_was() -> None:
    backend, local = make_backend("ffn.0", normed()), normed().eval()
    statistics = state(backend)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for _ in range(2):
        x = X.clone().requires_grad_()
        y = local(x)
        assert same_bits(y, (await compute(backend.forward_pool, X, manner=EVAL))[0])
        y.backward(G)
        optimizer.step()
        optimizer.zero_grad()
        assert same_bits(x.grad, (await compute(backend.backward_pool, X, G, manner=EVAL))[0])
    assert all(map(same_bits, local.state_dict().values(), state(backend).values()))
    assert same_bits(statistics["1.running_mean"], state(backend)["1.running_mean"])
    assert backend.update_count == 2


async def test_a_failed_pass_leaves_buffers_as_they_were() -> None:
    backend = make_backend("ffn.0", normed())
    before = state(backend)
    backend.opt.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await compute(backend.backward_pool, X, G)
    assert same_state(before, state(backend))


async def test_state_that_the_owner_loads_between_calls_stays() -> None:
    backend = make_backend("ffn.0", normed())
    await compute(backend.backward_pool, X, G)
    fresh = normed().state_dict() | {"1.running_mean": torch.full((4,), 9.0)}
    backend.expert.load_state_dict(fresh)
    await compute(backend.forward_pool, X)
    assert all(map(same_bits, fresh.values(), state(backend).values()))


# ------------------------------------------------------------------------------------------------- modes


async def test_what_the_owner_has_frozen_stays_frozen() -> None:
    module = nn.Sequential(normed(), normed())
    module[0][1].eval()
    backend = make_backend("ffn.0", module)
    modes = [each.training for each in module.modules()]
    for manner in (TRAIN, EVAL):
        await compute(backend.forward_pool, X, manner=manner)
        await compute(backend.backward_pool, X, G, manner=manner)
        assert [each.training for each in module.modules()] == modes
    assert (module[0][1].num_batches_tracked, module[1][1].num_batches_tracked) == (0, 1)


async def test_the_mode_is_put_back_after_a_failure() -> None:
    backend = make_backend("ffn.0", dropping())
    handle = backend.expert[2].register_forward_hook(lambda *_: 1 / 0)
    for pool, tensors in ((backend.forward_pool, (X,)), (backend.backward_pool, (X, G))):
        with pytest.raises(ZeroDivisionError):
            await compute(pool, *tensors, manner=EVAL)
        assert all(each.training for each in backend.expert.modules())
    handle.remove()


async def test_a_wholly_frozen_expert_is_the_same_in_both_modes() -> None:
    backend = make_backend("ffn.0", normed().eval())
    answers = [(await compute(backend.forward_pool, X, manner=manner))[0] for manner in (TRAIN, EVAL)]
    assert same_bits(*answers)
    assert not any(each.training for each in backend.expert.modules())


# ------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 1, 2**63, 2**64 - 1])
async def test_a_seed_decides_what_is_dropped_in_both_passes(seed: int) -> None:
    backend, other = make_backend("ffn.0", dropping(), lr=0.0), make_backend("ffn.0", dropping(), lr=0.0)
    manner = Manner("train", seed)
    state = torch.get_rng_state()
    (y,) = await compute(backend.forward_pool, X, manner=manner)
    (gradient,) = await compute(backend.backward_pool, X, G, manner=manner)
    assert torch.equal(torch.get_rng_state(), state), "the node's own generator is left alone"
    assert same_bits(y, (await compute(other.forward_pool, X, manner=manner))[0])
    assert same_bits(gradient, (await compute(other.backward_pool, X, G, manner=manner))[0])
    local, x = dropping(), X.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = local(x)
    expected.backward(G)
    assert same_bits(y, expected)
    assert same_bits(gradient, x.grad)
    assert not same_bits(y, (await compute(other.forward_pool, X, manner=Manner("train", seed ^ 1)))[0])


async def test_a_seed_changes_nothing_in_eval_mode() -> None:
    backend = make_backend("ffn.0", dropping())
    answers = [(await compute(backend.forward_pool, X, manner=Manner("eval", seed)))[0] for seed in (None, 1, 2)]
    assert same_bits(answers[0], answers[1])
    assert same_bits(answers[0], answers[2])
    assert same_bits(answers[0], dropping().eval()(X))


# ----------------------------------------------------------------------------------------------- batches


async def test_calls_of_other_modes_and_seeds_are_never_batched_together() -> None:
    pool = TaskPool(lambda x: (x,))
    seed = Manner("train", 7)
    for manner in (TRAIN, EVAL, seed, TRAIN, EVAL, seed, TRAIN):
        pool.submit((torch.ones(2, 4),), manner=manner, caller=f"{manner}")
    batches = []
    while (batch := pool.take_batch()) is not None:
        batches.append((batch.manner, batch.rows))
    assert sorted(batches, key=str) == sorted([(TRAIN, 6), (EVAL, 4), (seed, 2), (seed, 2)], key=str)
    assert len(pool) == 0


async def test_a_call_that_goes_alone_goes_alone() -> None:
    pool = TaskPool(lambda x: (x,))
    for alone in (False, True, False, True):
        pool.submit((torch.ones(1, 4),), alone=alone, caller=str(alone))
    rows = []
    while (batch := pool.take_batch()) is not None:
        rows.append(batch.rows)
    assert sorted(rows) == [1, 1, 2]


async def test_nobody_waits_for_ever_behind_another_mode() -> None:
    """alice has thousands of training calls; bob's evaluating one is in the second batch."""
    pool = TaskPool(lambda x: (x,), max_batch_size=4)
    for _ in range(100):
        pool.submit((torch.ones(1, 4),), manner=TRAIN, caller="alice")
    pool.submit((torch.ones(1, 4),), manner=EVAL, caller="bob")
    batches = [pool.take_batch() for _ in range(3)]
    assert [(batch.manner.mode, batch.rows) for batch in batches if batch] == [("train", 4), ("eval", 1), ("train", 4)]


async def test_rows_of_another_mode_fill_no_batch() -> None:
    now = [0.0]
    pool = TaskPool(lambda x: (x,), min_batch_size=4, max_queue_delay_ms=100.0, clock=lambda: now[0])
    pool.submit((torch.ones(2, 4),), manner=TRAIN, caller="alice")
    pool.submit((torch.ones(2, 4),), manner=EVAL, caller="bob")
    assert pool.ready_at() == 0.1
    now[0] = 0.05
    pool.submit((torch.ones(2, 4),), manner=EVAL, caller="carol")
    assert pool.ready_at() == 0.0
    batch = pool.take_batch()
    assert batch is not None
    assert (batch.manner, batch.rows) == (EVAL, 4)
    assert pool.ready_at() == 0.1
    pool.submit((torch.ones(1, 4),), manner=Manner("train", 3), caller="dave")
    assert pool.ready_at() == 0.0, "nobody can join it, so it waits for nobody"
    batch = pool.take_batch()
    assert batch is not None
    assert batch.manner.seed == 3


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("broken", "gave"),
    [
        (lambda y: y[:, :3], r"float32\[6, 3\]"),
        (lambda y: y[:-1], r"float32\[5, 4\]"),
        (lambda y: torch.cat([y, y]), r"float32\[12, 4\]"),
        (lambda y: y.double(), r"float64\[6, 4\]"),
        (lambda y: y.t(), r"float32\[4, 6\]"),
        (lambda y: y.sum(), r"float32\[\]"),
        (lambda y: 3, r"gave \(int\)"),
        (lambda y: y.to_sparse(), r"gave \(sparse_coo float32\[6, 4\]\)"),
        (lambda y: (y, y), "structure"),
        (lambda y: [y], "structure"),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
async def test_what_breaks_the_schema_at_run_time_is_never_sent(
    broken: Callable[[torch.Tensor], Any], gave: str, direction: str
) -> None:
    backend = make_backend("ffn.0")
    backend.expert.register_forward_hook(lambda module, args, y: broken(y))
    before = state(backend)
    pool, tensors = (backend.forward_pool, (X,)) if direction == "forward" else (backend.backward_pool, (X, G))
    with pytest.raises(p2pmoe.errors.SchemaError, match=gave):
        await compute(pool, *tensors)
    assert same_state(before, state(backend))
    assert backend.update_count == 0


async def test_a_pool_checks_what_an_overridden_pass_gives() -> None:
    class Cut(p2pmoe.ExpertBackend):
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(each[:, :3] for each in super().forward(*inputs))

        def backward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(each.double() for each in super().backward(*inputs))

    module = nn.Linear(4, 4)
    backend = Cut("ffn.0", module, torch.optim.SGD(module.parameters(), lr=0.1), args_schema=p2pmoe.BatchTensorProto(4))
    with pytest.raises(p2pmoe.errors.SchemaError, match=r"\[6, 3\].*schema says FP32\[batch, 4\]"):
        await compute(backend.forward_pool, X)
    with pytest.raises(p2pmoe.errors.SchemaError, match=r"float64.*schema says FP32\[batch, 4\]"):
        await compute(backend.backward_pool, X, G)


async def test_parameters_that_no_optimizer_has_gather_no_gradients() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(module[0].parameters(), lr=0.1)
    backend = make_backend("ffn.0", module, optimizer=lambda *_, **__: optimizer)
    backend.backward(X, G)
    assert all(each.grad is None for each in module.parameters())
