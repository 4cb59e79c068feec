"""The mixture: equal to a local one, one exchange a node and pass, and honest about who did not answer."""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swarm_kit import (
    ALICE,
    BOB,
    WAIT_S,
    Gate,
    World,
    grid_backends,
    make_backend,
    open_world,
    run_threads,
    same_bits,
)
from torch import nn

import p2pmoe
from p2pmoe import BatchTensorProto as P
from p2pmoe.client.gating import masked_softmax
from p2pmoe.errors import ExpertNotFoundError, ExpertsUnavailableError, SchemaError

D = 4


def reference(moe: p2pmoe.RemoteMixtureOfExperts, experts: dict[str, nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The same mixture of local experts: every live expert is scored, nothing is searched."""
    rows, grid, k = x.reshape(-1, D), moe.grid_size, moe.options.k_best
    scores = moe.gate(rows)
    cells = [cell for cell in itertools.product(*map(range, grid)) if name(moe, cell) in experts]
    totals = torch.stack([sum(s[:, c] for s, c in zip(scores, cell, strict=True)).detach() for cell in cells], 1)
    best = totals.topk(min(k, len(cells)), dim=1).indices
    coordinates = torch.tensor(cells)[best]
    weights = masked_softmax(moe.gate.score(scores, coordinates), torch.ones_like(best, dtype=torch.bool))
    row_of, slot_of = (each.flatten() for each in torch.meshgrid(*map(torch.arange, best.shape), indexing="ij"))
    order = best[row_of, slot_of].sort(stable=True).indices
    row_of, slot_of = row_of[order], slot_of[order]
    inputs = rows.index_select(0, row_of)
    cell_of = best[row_of, slot_of]
    outputs = torch.cat([experts[name(moe, cells[c])](inputs[cell_of == c]) for c in cell_of.unique().tolist()])
    mixed = torch.zeros_like(rows).index_add(0, row_of, outputs * weights[row_of, slot_of].unsqueeze(1))
    return mixed.view_as(x)


def name(moe: p2pmoe.RemoteMixtureOfExperts, cell: tuple[int, ...]) -> str:
    return ".".join([moe.uid_prefix, *map(str, cell)])


def local_experts(world: World) -> dict[str, nn.Module]:
    return {uid: copy.deepcopy(b.expert) for peer in world.peers.values() for uid, b in peer.backends.items()}


@pytest.fixture
def world(carrier: str) -> Iterator[World]:
    with open_world({"alice": grid_backends([0]), "bob": grid_backends([1])}, carrier=carrier) as world:
        yield world


@pytest.fixture
def memory() -> Iterator[World]:
    with open_world({"alice": grid_backends([0]), "bob": grid_backends([1])}) as world:
        yield world


# ----------------------------------------------------------------------------------------- remote = local


@pytest.mark.parametrize("shape", [(6, D), (2, 3, D), (2, 1, 3, D), (1, D)])
def test_remote_equals_local_bit_for_bit(world: World, shape: tuple[int, ...]) -> None:
    """Outputs, gradients to inputs and gate, and the experts' updates, over several steps."""
    moe = world.mixture()
    local = copy.deepcopy(moe.gate), local_experts(world)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in local[1].values()]
    twin = world.mixture()
    twin.gate = local[0]
    for step in range(3):
        x = torch.randn(shape)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y_local, y_remote = reference(twin, local[1], mine), moe(theirs)
        assert same_bits(y_local, y_remote), step
        gradient = torch.randn(shape)
        y_local.backward(gradient)
        y_remote.backward(gradient)
        assert same_bits(mine.grad, theirs.grad), step
        for a, b in zip(twin.gate.parameters(), moe.gate.parameters(), strict=True):
            assert same_bits(a.grad, b.grad), step
            a.grad = b.grad = None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for uid, expert in local[1].items():
            for a, b in zip(expert.parameters(), world.backend(uid).expert.parameters(), strict=True):
                assert same_bits(a, b), (step, uid)


def test_exactly_one_exchange_per_node_and_pass(world: World) -> None:
    moe = world.mixture(k_best=4)  # every row goes to every expert: both nodes are asked
    counter = world.swarm.dispatcher
    moe(torch.randn(1, D))
    for rows in (1, 7, 33):
        exchanges, calls = counter.exchanges, counter.calls
        y = moe(torch.randn(rows, D))
        assert (counter.exchanges - exchanges, counter.calls - calls) == (2, 4), "2 nodes, 4 experts"
        y.sum().backward()
        assert (counter.exchanges - exchanges, counter.calls - calls) == (4, 8)


def test_rows_are_grouped_by_expert(memory: World) -> None:
    rows: list[int] = []
    for peer in memory.peers.values():
        for backend in peer.backends.values():
            real = backend.forward_pool.process_function
            backend.forward_pool.process_function = lambda x, real=real: (rows.append(len(x)), real(x))[1]
    memory.mixture()(torch.randn(16, D))
    assert sum(rows) == 16 * 2
    assert len(rows) <= 4


def test_gradcheck() -> None:
    double = {"dtype": torch.float64, "lr": 0.0}
    with open_world({"alice": grid_backends([0], **double), "bob": grid_backends([1], **double)}) as world:
        moe = world.mixture().double()
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(moe, (x,))
        weight = moe.gate.proj.weight

        def by_gate(values: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(moe, {"gate.proj.weight": values}, (x.detach(),))

        assert torch.autograd.gradcheck(by_gate, (weight.detach().clone().requires_grad_(),))


def test_experts_of_whole_sequences(carrier: str) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.cumsum(1))

    backends = [make_backend(f"ffn.{i}.{j}", Sequence(), args_schema=(P(3, D),)) for i in range(2) for j in range(2)]
    with open_world({"alice": backends}, carrier=carrier) as world:
        moe = world.mixture(k_best=1)
        x = torch.randn(5, 3, D, requires_grad=True)
        y = moe(x)
        assert y.shape == (5, 3, 2)
        y.sum().backward()
        assert x.grad is not None
        for wrong in (torch.randn(3, D), torch.randn(5, 2, D), torch.randn(2, 5, 3, D)[..., :2]):
            with pytest.raises(SchemaError):
                moe(wrong)


def test_further_arguments_are_split_like_the_first() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor, mask: torch.Tensor, *, shift: torch.Tensor) -> Any:
            return {"y": (x * mask + shift.unsqueeze(1)) * self.scale, "kept": mask.float()}

    schema = {"args_schema": (P(D), P(D, dtype=torch.uint8)), "kwargs_schema": {"shift": P()}}
    with open_world({"alice": [make_backend(f"ffn.0.{i}", Masked(), **schema) for i in range(2)]}) as world:
        moe = world.mixture()
        x, mask = torch.randn(2, 3, D, requires_grad=True), torch.randint(0, 2, (2, 3, D), dtype=torch.uint8)
        shift = torch.randn(2, 3, requires_grad=True)
        mixed = moe(x, mask, shift=shift)
        torch.testing.assert_close(mixed["y"], x * mask + shift.unsqueeze(-1))
        mixed["y"].sum().backward()
        torch.testing.assert_close(x.grad, mask.float(), rtol=1e-5, atol=1e-5)
        with pytest.raises(SchemaError):
            moe(x, mask)
        for wrong in (mask[:1], mask.transpose(0, 1).contiguous(), None, 1.0):
            with pytest.raises(SchemaError, match="every argument must"):
                moe(x, wrong, shift=shift)


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (0, 3, D)])
def test_no_rows(world: World, shape: tuple[int, ...]) -> None:
    moe = world.mixture()
    x = torch.zeros(shape, requires_grad=True)
    y = moe(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert moe.gate.proj.weight.grad is not None


def test_experts_train_when_the_input_needs_no_gradient_and_rest_under_no_grad(memory: World) -> None:
    moe = memory.mixture(k_best=4)
    moe.requires_grad_(False)
    moe(torch.randn(3, D)).sum().backward()
    assert {b.update_count for p in memory.peers.values() for b in p.backends.values()} == {1}
    with torch.no_grad():
        assert not moe(torch.randn(3, D)).requires_grad


def test_half_precision_inputs_and_gates(memory: World) -> None:
    moe = memory.mixture().bfloat16()
    y = moe(torch.randn(3, D, dtype=torch.bfloat16, requires_grad=True))
    assert y.isfinite().all()
    y.float().sum().backward()


@pytest.mark.parametrize("x", [torch.randn(D), torch.randn(2, D + 1), torch.randn(())])
def test_an_input_of_the_wrong_shape(memory: World, x: torch.Tensor) -> None:
    with pytest.raises(SchemaError, match=r"\[B, 4\]"):
        memory.mixture()(x)


@pytest.mark.parametrize(
    "options",
    [{"k_best": 0}, {"k_min": 3}, {"k_min": -1}, {"backward_k_min": 3}, {"grid_size": ()}, {"grid_size": (2,) * 5}],
)
def test_options_that_make_no_sense(memory: World, options: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        memory.mixture(**options)


@pytest.mark.parametrize("option", ["k_best", "k_min", "backward_k_min"])
@pytest.mark.parametrize("bad", [1.0, "1", None])
def test_numbers_of_experts_are_whole(memory: World, option: str, bad: Any) -> None:
    """1.0 was a TypeError of the search, at the first call."""
    with pytest.raises(SchemaError, match=f"^{option} must be a whole number, got {re.escape(repr(bad))}$"):
        memory.mixture(**{option: bad})


@pytest.mark.parametrize("grid", [(3,), (2, 2), (2, 2, 2), (2, 1, 2, 2)])
def test_one_to_four_dimensions(grid: tuple[int, ...]) -> None:
    cells = [".".join(map(str, cell)) for cell in itertools.product(*map(range, grid))]
    with open_world({"alice": [make_backend(f"ffn.{cell}") for cell in cells]}) as world:
        moe = world.mixture(grid_size=grid)
        x = torch.randn(4, D, requires_grad=True)
        assert same_bits(moe(x), reference(moe, local_experts(world), x))


async def test_awaited_and_beside_a_running_loop(world: World) -> None:
    moe = world.mixture()
    x = torch.randn(3, D, requires_grad=True)
    async with asyncio.timeout(WAIT_S):
        first, second = await asyncio.gather(moe.acall(x), moe.acall(x))
    assert same_bits(first, moe(x))
    (first.sum() + second.sum()).backward()
    with pytest.raises(SchemaError):
        await moe.acall(torch.randn(3, D + 1))


def test_many_threads_share_one_mixture(world: World) -> None:
    moe = world.mixture()
    expected = {seed: moe(torch.full((3, D), float(seed))).detach() for seed in range(8)}

    def work(seed: int) -> None:
        for _ in range(3):
            torch.testing.assert_close(moe(torch.full((3, D), float(seed))), expected[seed], rtol=1e-5, atol=1e-6)

    run_threads([lambda seed=seed: work(seed) for seed in range(8)])


# ------------------------------------------------------------------------------------------ missing experts


def test_experts_that_nobody_hosts_are_passed_over() -> None:
    with open_world({"alice": [make_backend("ffn.0.1"), make_backend("ffn.1.0")]}) as world:
        moe = world.mixture(grid_size=(2, 2), k_best=2, k_min=2)
        x = torch.randn(5, D, requires_grad=True)
        assert same_bits(moe(x), reference(moe, local_experts(world), x))


def test_experts_outside_the_grid_are_not_asked() -> None:
    with open_world({"alice": [make_backend(f"ffn.{i}.{i}") for i in range(4)]}) as world:
        moe = world.mixture(grid_size=(2, 2), k_best=4)
        x = torch.randn(5, D)
        inside = {uid: each for uid, each in local_experts(world).items() if uid in ("ffn.0.0", "ffn.1.1")}
        assert same_bits(moe(x), reference(moe, inside, x))


def test_experts_of_another_schema_are_not_asked() -> None:
    backends = [make_backend("ffn.0.0"), make_backend("ffn.0.1"), make_backend("ffn.1.0", dim=9)]
    with open_world({"alice": backends}) as world:
        moe = world.mixture(k_best=3)
        y = moe(torch.randn(5, D, requires_grad=True))
        y.sum().backward()
        assert y.isfinite().all()
        assert world.backend("ffn.1.0").update_count == 0


def test_nobody_at_all() -> None:
    with open_world({"alice": []}) as world:
        with pytest.raises(ExpertNotFoundError, match=r"p2pmoe lookup 'ffn\.\*'"):
            world.mixture()(torch.randn(2, D))
        x = torch.randn(2, 3, D, requires_grad=True)
        y = world.mixture(allow_zero_outputs=True)(x)
        assert same_bits(y, torch.zeros(2, 3, D))
        y.sum().backward()
        assert same_bits(x.grad, torch.zeros(2, 3, D))


def test_zeros_may_be_trained_through_without_an_input_that_needs_gradients() -> None:
    with open_world({"alice": []}) as world:
        moe = world.mixture(allow_zero_outputs=True)
        moe(torch.randn(2, D)).sum().backward()
        assert same_bits(moe.gate.proj.weight.grad, torch.zeros_like(moe.gate.proj.weight))


# ---------------------------------------------------------------------------------------- experts that fail


def test_a_dead_peers_experts_are_left_out_and_the_rest_mixed(memory: World) -> None:
    moe = memory.mixture(k_best=4)
    moe(torch.randn(1, D))
    experts = local_experts(memory)
    memory.network.link(ALICE).cut()
    x = torch.randn(6, D, requires_grad=True)
    y = moe(x)
    alive = {uid: each for uid, each in experts.items() if uid.startswith("ffn.1.")}
    torch.testing.assert_close(y, reference(moe, alive, x))
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert moe.gate.proj.weight.grad.isfinite().all()


def test_dead_peers_are_left_out_of_the_next_search(memory: World) -> None:
    moe = memory.mixture(k_best=2)
    moe(torch.randn(1, D))
    memory.network.link(ALICE).cut()
    x = torch.randn(6, D)
    moe(x)
    asked = memory.network.link(ALICE).exchanges
    for _ in range(3):
        y = moe(x)
    assert memory.network.link(ALICE).exchanges == asked
    alive = {uid: each for uid, each in local_experts(memory).items() if uid.startswith("ffn.1.")}
    assert same_bits(y, reference(moe, alive, x))


def test_rows_that_nobody_answers_are_named(memory: World) -> None:
    moe = memory.mixture(k_best=1, beam_size=1)
    gate = moe.gate.proj
    with torch.no_grad():  # the first feature's sign decides: negative rows go to ffn.0.0 at alice
        gate.weight.zero_()
        gate.bias.zero_()
        gate.weight[0, 0], gate.weight[1, 0] = -9.0, 9.0
    x = torch.ones(12, D)
    x[[2, 5, 11], 0] = -1.0
    moe(x)

    def fail(*_: Any) -> Any:
        raise RuntimeError("broken")

    for backend in memory.alice.backends.values():
        backend.forward_pool.process_function = fail
    with pytest.raises(ExpertsUnavailableError, match=r"3 rows \(2, 5, 11\).*broken") as caught:
        moe(x)
    assert caught.value.rows == (2, 5, 11)


@pytest.mark.parametrize("k_min", [1, 2, 4])
def test_k_min_decides_which_rows_are_short(memory: World, k_min: int) -> None:
    moe = memory.mixture(k_best=4, k_min=k_min)
    moe(torch.randn(1, D))
    memory.alice.backends["ffn.0.0"].forward_pool.process_function = lambda x: 1 / 0
    x = torch.randn(3, D)
    if k_min == 4:
        with pytest.raises(ExpertsUnavailableError, match="fewer than 4") as caught:
            moe(x)
        assert caught.value.rows == (0, 1, 2)
    else:
        alive = {uid: each for uid, each in local_experts(memory).items() if uid != "ffn.0.0"}
        torch.testing.assert_close(moe(x), reference(moe, alive, x))


def test_zeros_never_nan_where_nobody_answers(memory: World) -> None:
    moe = memory.mixture(allow_zero_outputs=True, k_best=4)
    moe(torch.randn(1, D))
    for link in (ALICE, BOB):
        memory.network.link(link).cut()
    x = torch.randn(5, D, requires_grad=True)
    y = moe(x)
    assert same_bits(y, torch.zeros(5, D))
    y.sum().backward()
    assert same_bits(x.grad, torch.zeros(5, D))
    assert moe.gate.proj.weight.grad.isfinite().all()
    y = moe(x)  # by now nobody is in the directory either
    assert same_bits(y, torch.zeros(5, D))
    y.sum().backward()


def test_extreme_scores_never_give_nan(memory: World) -> None:
    moe = memory.mixture(k_best=4)
    with torch.no_grad():
        moe.gate.proj.weight.mul_(1e18)
    x = torch.randn(5, D, requires_grad=True)
    y = moe(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_a_lost_backward_of_one_node_leaves_its_gradients_out(memory: World) -> None:
    moe = memory.mixture(k_best=4)
    x = torch.randn(3, D, requires_grad=True)
    y = moe(x)
    memory.network.link(ALICE).cut()
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert [memory.backend(f"ffn.{i}.0").update_count for i in range(2)] == [0, 1]


def test_backward_k_min_is_kept(memory: World) -> None:
    for backward_k_min, raises in ((2, False), (3, True)):
        moe = memory.mixture(k_best=4, backward_k_min=backward_k_min)
        y = moe(torch.randn(3, D, requires_grad=True))
        memory.network.link(ALICE).cut()
        if raises:
            with pytest.raises(ExpertsUnavailableError, match="backward: fewer than 3") as caught:
                y.sum().backward()
            assert caught.value.rows == (0, 1, 2)
        else:
            y.sum().backward()
        memory.network.link(ALICE).restore()
        memory.directory.mark_reachable(memory.alice.peer_id)


def test_backward_asks_only_those_that_answered_forward(memory: World) -> None:
    moe = memory.mixture(k_best=4)
    moe(torch.randn(1, D))
    memory.network.fail_at(ALICE, memory.network.link(ALICE).exchanges + 1)
    y = moe(torch.randn(3, D, requires_grad=True))
    asked = memory.network.link(ALICE).exchanges
    y.sum().backward()
    assert memory.network.link(ALICE).exchanges == asked
    assert memory.backend("ffn.0.0").update_count == 0


@pytest.fixture
def slow() -> Iterator[tuple[World, Gate]]:
    """ffn.0.0 at alice waits for its gate; the others answer at once."""
    gate = Gate()
    backends = [make_backend("ffn.0.0", gate), make_backend("ffn.0.1")]
    with open_world({"alice": backends[:1], "bob": backends[1:]}) as world:
        yield world, gate
        gate.go.set()


def test_the_grace_after_k_min_ends_the_wait(slow: tuple[World, Gate]) -> None:
    world, gate = slow
    moe = world.mixture(grid_size=(1, 2), k_best=2, timeout_after_k_min_s=0.05)
    moe.check()  # a call whose grace ran out on a busy machine would leave one of the two out of the next
    gate.armed = True
    started = time.monotonic()
    x = torch.randn(3, D)
    y = moe(x)
    assert time.monotonic() - started < WAIT_S / 2
    assert same_bits(y, reference(moe, {"ffn.0.1": world.backend("ffn.0.1").expert}, x))


def test_below_k_min_there_is_no_grace_only_the_timeout(slow: tuple[World, Gate]) -> None:
    world, gate = slow
    moe = world.mixture(grid_size=(1, 2), k_best=2, k_min=2, timeout_after_k_min_s=0.01, forward_timeout_s=0.3)
    moe.options.__class__  # noqa: B018
    with torch.no_grad():
        moe(torch.randn(1, D))
    gate.armed = True
    started = time.monotonic()
    with pytest.raises(ExpertsUnavailableError):
        moe(torch.randn(3, D))
    assert 0.25 < time.monotonic() - started < 2.0, "one timeout for the whole pass"


def test_without_a_grace_everybody_is_waited_for(slow: tuple[World, Gate]) -> None:
    world, gate = slow
    moe = world.mixture(grid_size=(1, 2), k_best=2, timeout_after_k_min_s=None)
    moe(torch.randn(1, D))
    gate.armed = True
    x = torch.randn(3, D)
    y, _ = run_threads([lambda: moe(x), lambda: (gate.begun.wait(WAIT_S), gate.go.set())])
    experts = {uid: world.backend(uid).expert for uid in ("ffn.0.0", "ffn.0.1")}
    gate.armed = False
    assert same_bits(y, reference(moe, experts, x))


def test_the_pass_takes_no_longer_than_its_timeout_even_when_it_is_tried_again(memory: World) -> None:
    """Every peer is silent: the search is repeated without them, but the time is up after one timeout."""
    moe = memory.mixture(k_best=1, forward_timeout_s=0.4)
    moe(torch.randn(1, D))
    for endpoint in (ALICE, BOB):
        memory.network.link(endpoint).delay_s = math.inf
    started = time.monotonic()
    with pytest.raises(ExpertsUnavailableError):
        moe(torch.randn(3, D))
    assert time.monotonic() - started < 0.75


def test_anomalies_count_as_failures(memory: World) -> None:
    module = memory.backend("ffn.0.0").expert
    with torch.no_grad():
        module[2].bias[0] = math.nan
    x = torch.randn(3, D, requires_grad=True)
    for moe in (memory.mixture(k_best=4), memory.mixture(k_best=4, detect_anomalies=True)):
        alive = {uid: each for uid, each in local_experts(memory).items() if uid != "ffn.0.0"}
        y = moe(x)
        torch.testing.assert_close(y, reference(moe, alive, x))
        y.sum().backward()
        assert x.grad.isfinite().all()
    bad = x.detach().clone()
    bad[1, 1] = math.inf
    with pytest.raises(SchemaError, match="non-finite"):
        moe(bad)


def test_ones_own_anomalies_come_back_unless_they_are_refused(memory: World) -> None:
    x = torch.randn(3, D, requires_grad=True)
    gradient = torch.ones(3, D)
    gradient[1, 1] = math.inf
    memory.mixture(k_best=4)(x).backward(gradient)
    assert not x.grad[1].isfinite().any()
    assert x.grad[0].isfinite().all()
    assert memory.swarm.trust.standing.snapshot() == [], "honest answers"


@pytest.mark.parametrize("detect_anomalies", [False, True])
def test_anomalies_in_gradients_count_as_failures_too(memory: World, detect_anomalies: bool) -> None:
    moe = memory.mixture(k_best=4, detect_anomalies=detect_anomalies)
    x = torch.randn(3, D, requires_grad=True)
    y = moe(x)
    real = memory.backend("ffn.0.0").backward_pool.process_function
    memory.backend("ffn.0.0").backward_pool.process_function = lambda *t: (real(*t)[0] * math.nan,)
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_one_failing_expert_does_not_hurt_the_others_of_its_node(memory: World) -> None:
    memory.alice.backends["ffn.0.0"].forward_pool.process_function = lambda x: 1 / 0
    moe = memory.mixture(k_best=4)
    x = torch.randn(3, D)
    alive = {uid: each for uid, each in local_experts(memory).items() if uid != "ffn.0.0"}
    torch.testing.assert_close(moe(x), reference(moe, alive, x))


def test_rows_go_to_a_replica_when_its_peer_dies() -> None:
    with open_world({"alice": grid_backends(), "bob": grid_backends()}) as world:
        moe = world.mixture(k_best=2, k_min=2)
        x = torch.randn(5, D)
        first = moe(x)
        world.network.link(ALICE).cut()
        assert same_bits(moe(x), first)


def test_training_through_a_lossy_network_never_gives_nan() -> None:
    with open_world({"alice": grid_backends([0]), "bob": grid_backends([1])}) as world:
        moe = world.mixture(k_best=4, allow_zero_outputs=True, backward_k_min=0)
        optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
        for endpoint in (ALICE, BOB):
            world.network.link(endpoint).loss = 0.3
        for _ in range(30):
            optimizer.zero_grad()
            y = moe(torch.randn(4, D))
            y.square().mean().backward()
            optimizer.step()
            assert y.isfinite().all()
            for peer in world.peers.values():
                world.directory.mark_reachable(peer.peer_id)
        assert all(each.isfinite().all() for each in moe.parameters())


# -------------------------------------------------------------------------------------------------- switch


@pytest.fixture
def switch(world: World) -> p2pmoe.RemoteSwitchMixtureOfExperts:
    torch.manual_seed(3)
    return p2pmoe.RemoteSwitchMixtureOfExperts(world.swarm, in_features=D, grid_size=(2, 2), uid_prefix="ffn")


def test_switch_scales_one_experts_output_by_its_probability(
    world: World, switch: p2pmoe.RemoteSwitchMixtureOfExperts
) -> None:
    switch.eval()
    x = torch.randn(6, D)
    y, loss = switch(x)
    scores = switch.gate(x)
    probabilities = [torch.softmax(score, -1) for score in scores]
    for row in range(6):
        cell = [int(score[row].argmax()) for score in scores]
        weight = probabilities[0][row, cell[0]] * probabilities[1][row, cell[1]]
        expected = world.backend(f"ffn.{cell[0]}.{cell[1]}").expert(x[row : row + 1])[0] * weight
        torch.testing.assert_close(y[row], expected)
    assert loss.ndim == 0
    assert loss.requires_grad


def test_switch_jitters_only_in_training(switch: p2pmoe.RemoteSwitchMixtureOfExperts) -> None:
    x = torch.randn(6, D)
    switch.eval()
    assert same_bits(switch(x)[0], switch(x)[0])
    switch.train()
    assert not same_bits(switch(x)[0], switch(x)[0])


def test_the_balancing_loss_is_one_when_even_and_pulls_towards_it(
    switch: p2pmoe.RemoteSwitchMixtureOfExperts,
) -> None:
    with torch.no_grad():
        switch.gate.proj.weight.zero_()
        switch.gate.proj.bias.copy_(torch.tensor([5.0, 0.0, 0.0, 5.0]))
    y, loss = switch.eval()(torch.randn(8, D))
    assert 1.5 < loss.item() <= 2.0
    (y.sum() * 0 + loss).backward()
    assert switch.gate.proj.bias.grad[0] > 0 > switch.gate.proj.bias.grad[1]
    with torch.no_grad():
        switch.gate.proj.bias.zero_()
    assert switch(torch.randn(8, D))[1].item() == pytest.approx(1.0)


def test_switch_gives_two_values_even_when_nobody_is_there() -> None:
    with open_world({"alice": []}) as world:
        layer = p2pmoe.RemoteSwitchMixtureOfExperts(
            world.swarm, in_features=D, grid_size=(2, 2), uid_prefix="ffn", allow_zero_outputs=True
        )
        y, loss = layer(torch.randn(3, D))
        assert same_bits(y, torch.zeros(3, D))
        assert loss.isfinite()
        (y.sum() + loss).backward()


def test_switch_takes_no_rows(switch: p2pmoe.RemoteSwitchMixtureOfExperts) -> None:
    y, loss = switch(torch.zeros(0, D))
    assert y.shape == (0, D)
    assert loss.isfinite()
    (y.sum() + loss).backward()
