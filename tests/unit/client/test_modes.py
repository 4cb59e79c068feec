"""Mode and seed on their way from a layer to the experts, in memory and over HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swarm_kit import World, make_backend, open_world, run_threads, same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import p2pmoe
from p2pmoe.client.manner import for_expert, manner_of
from p2pmoe.errors import BadRequestError
from p2pmoe.protocol.frames import Frame, describe_tensors
from p2pmoe.protocol.messages import RequestHeader, RequestParameters
from p2pmoe.types import Manner

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def build(*layers: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(4, 4), *(make() for make in layers))


def normed() -> nn.Module:
    return build(lambda: nn.BatchNorm1d(4))


class Half(nn.Module):
    """Dropout alone: where the output is zero the gradient must be too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x * self.weight)


@pytest.fixture(params=["memory", "http"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    experts = [make_backend("bn.0", normed()), make_backend("half.0", Half(), lr=0.0)]
    experts += [make_backend(f"ffn.{i}.{j}", Half(), lr=0.0) for i in range(2) for j in range(2)]
    with open_world({"alice": experts}, carrier=request.param) as world:
        yield world


def test_training_and_evaluating_are_those_of_the_layer(world: World) -> None:
    expert, local = world.swarm.expert("bn.0"), normed()
    module = world.backend("bn.0").expert
    assert same_bits(expert(X), local(X))
    assert module[1].num_batches_tracked == 0, "forward calls train nothing"
    expert.eval()
    fresh = normed().eval()
    assert same_bits(expert(X), fresh(X))
    expert.train()
    expert(X).sum().backward()
    assert module[1].num_batches_tracked == 1
    assert same_bits(module[1].running_mean, local[1].running_mean)


async def test_asking_whether_it_is_ready_leaves_no_trace(world: World) -> None:
    module = world.backend("bn.0").expert
    before = {name: value.clone() for name, value in module.state_dict().items()}
    handlers = world.alice.handlers
    random_state, stats = torch.get_rng_state(), handlers.expert("bn.0")
    for _ in range(6):
        handlers._last_ready = (0.0, False)
        assert await handlers.ready(), "one row is enough where nothing trains"
    assert all(map(same_bits, before.values(), module.state_dict().values()))
    assert module.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert handlers.expert("bn.0") == stats, "nothing is counted"
    assert all(each.grad is None for each in module.parameters())


@pytest.mark.parametrize("name", ["half.0", "mixture"])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(world: World, name: str) -> None:
    layer = world.mixture(k_best=1) if name == "mixture" else world.swarm.expert(name)
    for _ in range(3):
        x = torch.ones(32, 4, requires_grad=True)
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, gradient), "0 or 2 in the same places"
        assert 0 < int((y == 0).sum()) < y.numel()


@pytest.mark.parametrize("name", ["half.0", "mixture"])
def test_who_seeds_torch_again_gets_the_same_masks(world: World, name: str) -> None:
    """They went on counting: a seeded program could not repeat a step within one process."""
    layer = world.mixture(k_best=2) if name == "mixture" else world.swarm.expert(name)
    x = torch.ones(32, 4)
    layer(x)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append([layer(x) for _ in range(3)])
    assert all(map(torch.equal, *runs))
    assert not torch.equal(runs[0][0], runs[0][1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["half.0", "mixture"])
def test_a_checkpoint_drops_the_same_when_it_computes_again(world: World, name: str, reentrant: bool) -> None:
    """The gradient was that of another mask than the output's, without an error."""
    layer = world.mixture(k_best=1) if name == "mixture" else world.swarm.expert(name)
    for _ in range(3):
        x = torch.ones(32, 4, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.sum().backward()
        assert torch.equal(y, x.grad), "0 or 2 in the same places"


def test_threads_beside_a_node_of_their_own_process_disturb_no_mask(world: World) -> None:
    """Their layers draw seeds from the generator that the expert has seeded."""
    expert = world.swarm.expert("half.0")

    def train() -> list[bool]:
        same = []
        for _ in range(15):
            x = torch.ones(64, 4, requires_grad=True)
            y = expert(x)
            y.sum().backward()
            same.append(torch.equal(y, x.grad))
        return same

    assert run_threads([train] * 6) == [[True] * 15] * 6


@pytest.mark.parametrize(("uid", "mode"), [("bn.0", True), ("bn.0", False), ("half.0", False)])
def test_where_nothing_is_drawn_torchs_generator_stays_as_it_is(world: World, uid: str, mode: bool) -> None:
    expert = world.swarm.expert(uid).train(mode)
    state = torch.get_rng_state()
    expert(X.clone().requires_grad_()).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mixture_drops_the_same_in_both_passes_and_not_alike_in_all_experts(world: World) -> None:
    mixture = world.mixture(k_best=4)
    for backend in world.alice.backends.values():
        assert backend.findings.draws or backend.name == "bn.0"
    nn.init.zeros_(next(mixture.gate.parameters()))
    x = torch.ones(32, 4, requires_grad=True)
    y = mixture(x)
    weights = y.detach()
    (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=False)
    # The gate reads x as well; with all-zero weights its scores, and so its part of the gradient, are zero.
    shares = {round(float(each), 3) for each in weights.flatten()}
    assert len(shares) > 2, "the four experts did not drop the same places"
    assert gradient.shape == x.shape


def test_evaluating_draws_nothing(world: World) -> None:
    expert = world.swarm.expert("half.0").eval()
    assert torch.equal(expert(X), X)
    x = X.clone().requires_grad_()
    expert(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_two_providers_drop_alike_for_one_seed() -> None:
    hosts = {"alice": [make_backend("half.0", Half())], "bob": [make_backend("half.0", Half())]}
    with open_world(hosts) as world:
        x = torch.ones(64, 4, requires_grad=True)
        y = world.swarm.expert("half.0")(x)
        world.alice.stop()
        y.sum().backward()
        assert torch.equal(y, x.grad), "the backward call went to bob"
        assert world.peers["bob"].backends["half.0"].update_count == 1


# ---------------------------------------------------------------------------------------------- the wire


async def ask(world: World, uid: str, *tensors: torch.Tensor, **parameters: Any) -> Any:
    headers, _ = describe_tensors(tensors)
    header = RequestHeader(model_name=uid, inputs=headers, parameters=RequestParameters(**parameters))
    world.alice.handlers.admit(header)
    future = world.alice.handlers.submit(Frame(header, tensors))
    world.alice.handlers.flush()
    return await future


async def test_a_call_that_says_nothing_evaluates_in_both_passes(world: World) -> None:
    (y,) = await ask(world, "half.0", X)
    assert torch.equal(y, X)
    (gradient,) = await ask(world, "half.0", X, torch.ones_like(X), direction="backward")
    assert torch.equal(gradient, torch.ones_like(X))


@pytest.mark.parametrize("mode", ["training", "TRAIN", "", "eval ", "x" * 256])
async def test_an_unknown_mode_is_400(world: World, mode: str) -> None:
    for uid in ("half.0", "bn.0"):
        with pytest.raises(BadRequestError, match="'train' or 'eval'"):
            await ask(world, uid, X, mode=mode)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
async def test_a_seed_out_of_bounds_is_400(world: World, seed: int) -> None:
    for uid in ("half.0", "bn.0"):
        with pytest.raises(BadRequestError, match=r"0 ≤ seed < 2\^64"):
            await ask(world, uid, X, seed=seed, mode="train")


async def test_a_backward_call_without_a_seed_is_refused_where_the_expert_draws(world: World) -> None:
    with pytest.raises(BadRequestError, match=r"draws random numbers in train mode.*parameters\.seed"):
        await ask(world, "half.0", X, X, direction="backward", mode="train")
    await ask(world, "bn.0", X, X, direction="backward", mode="train")
    first, second = [(await ask(world, "half.0", X, mode="train"))[0] for _ in range(2)]
    assert not torch.equal(first, second), "a forward call without one is drawn anew each time"


async def test_calls_of_an_expert_that_mixes_rows_are_computed_alone(world: World) -> None:
    """Else an answer would depend on strangers' rows, and the backward pass would be of another batch."""
    handlers, pool = world.alice.handlers, world.backend("bn.0").forward_pool
    headers, _ = describe_tensors((X,))
    parameters = RequestParameters(mode="train")
    frame = Frame(RequestHeader(model_name="bn.0", inputs=headers, parameters=parameters), (X,))
    calls = [pool.runtime, *(handlers.submit(frame) for _ in range(3))][1:]
    handlers.flush()
    expected = normed()(X)
    for call in calls:
        assert same_bits((await call)[0], expected)  # type: ignore[misc]


# ----------------------------------------------------------------------------------------------- seeds


def test_seeds_differ_and_follow_torchs() -> None:
    module = nn.Linear(1, 1)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    seeds = [manner_of(module).seed for _ in range(100)]
    assert len(set(seeds)) == 100
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert manner_of(module.eval()).mode == "eval"


def test_a_program_that_seeds_torch_draws_the_same_seeds_each_time() -> None:
    program = (
        "import torch; from p2pmoe.client.manner import manner_of; torch.manual_seed(7)\n"
        "print([manner_of(torch.nn.Identity()).seed for _ in range(3)])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(eval(runs[0]))) == 3  # noqa: S307 - our own words


def test_the_experts_of_a_pass_have_seeds_of_their_own() -> None:
    manner = Manner("train", 2**63 - 1)
    assert [for_expert(manner, index).seed for index in range(3)] == [2**63 - 1, 0, 1]
    assert for_expert(Manner("eval"), 3) == Manner("eval")


async def test_what_honest_providers_may_answer_differently_is_not_verified() -> None:
    hosts = {name: [make_backend("half.0", Half()), make_backend("bn.0", normed())] for name in ("alice", "bob")}
    with open_world(hosts, verify_fraction=1.0, verify_seed=0) as world:
        verifier = world.swarm.verifier
        assert verifier is not None
        for uid in ("half.0", "bn.0"):
            expert = world.swarm.expert(uid)
            assert expert.info.repeatable == {"eval"}
            expert(X)
        assert verifier.counts.sampled == 0
        world.swarm.expert("half.0").eval()(X)
        assert verifier.counts.sampled == 1


def test_info_tells_it_over_every_carrier(world: World) -> None:
    assert world.swarm.expert("bn.0").info.repeatable == {"eval"}
    assert world.swarm.expert("bn.0").info.draws == set()
    document = world.alice.handlers.expert("bn.0") | {"repeatable": 3}
    with pytest.raises(p2pmoe.errors.DecodeError, match="list of modes"):
        p2pmoe.client.directory.ExpertInfo.from_json(document, expected_digest=document["schema_digest"])
