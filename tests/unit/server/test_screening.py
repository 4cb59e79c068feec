"""The gate around experts under attack: they stay finite whatever is sent, and a neighbour in the batch is unharmed."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_kit import WAIT_S, make_backend, same_bits
from torch import nn

from p2pmoe import BatchTensorProto, ExpertBackend, Runtime, nested_flatten
from p2pmoe.config import GateConfig, OptimizerConfig
from p2pmoe.errors import BadRequestError, CallError, ExpertFailedError, NonFiniteError, OutlierGradientError
from p2pmoe.metrics import NodeMetrics
from p2pmoe.server.gate import is_finite
from p2pmoe.server.layers import make_expert
from p2pmoe.server.optimizers import make_optimizer
from p2pmoe.server.screening import guard_experts

Flat = tuple[torch.Tensor, ...]
NAN, INF, MAX = math.nan, math.inf, torch.finfo(torch.float32).max
KINDS = {
    "ffn": {"inner_dim": 6},
    "transformer": {"seq_len": 2, "num_heads": 2, "inner_dim": 6},
    "nop": {},
    "det_dropout": {},
}


def guarded(backend: ExpertBackend, **gate: Any) -> NodeMetrics:
    metrics = NodeMetrics()
    guard_experts([backend], GateConfig(**gate), metrics)
    return metrics


def built_in(kind: str, **optimizer: Any) -> ExpertBackend:
    """The same parameters every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        module, args, kwargs = make_expert(kind, 4, KINDS[kind])
    trained = make_optimizer(module.parameters(), OptimizerConfig(**optimizer))
    return ExpertBackend(f"{kind}.0", module, trained, args_schema=args, kwargs_schema=kwargs)


@contextmanager
def served(backend: ExpertBackend) -> Iterator[Runtime]:
    runtime = Runtime(backend.get_pools())
    try:
        yield runtime
    finally:
        runtime.close()


def run_together(backend: ExpertBackend, direction: str, calls: Iterable[Flat]) -> list[Any]:
    """Results and errors of calls that are queued before the device looks: one batch."""

    async def ask() -> list[Any]:
        pool = backend.forward_pool if direction == "forward" else backend.backward_pool
        futures = [pool.submit(call).future for call in calls]
        runtime.start()
        async with asyncio.timeout(WAIT_S):
            return await asyncio.gather(*futures, return_exceptions=True)

    with served(backend) as runtime:
        return asyncio.run(ask())


def honest_call(backend: ExpertBackend, direction: str, seed: int, rows: int = 2) -> Flat:
    generator = torch.Generator().manual_seed(seed)
    schema = backend.forward_schema if direction == "forward" else backend.backward_schema
    return tuple(
        torch.randn((rows, *proto.shape), generator=generator).to(proto.dtype)
        if proto.dtype.is_floating_point
        else torch.randint(0, 2, (rows, *proto.shape), generator=generator).to(proto.dtype)
        for proto in nested_flatten(schema)
    )


def spoilt_call(backend: ExpertBackend, direction: str, values: dict[int, float], seed: int = 99) -> Flat:
    """An honest call whose tensors of these indices are full of one value."""
    call = list(honest_call(backend, direction, seed))
    for index, value in values.items():
        call[index] = torch.full_like(call[index], value)
    return tuple(call)


def state_of(backend: ExpertBackend) -> dict[str, torch.Tensor]:
    tensors = {f"expert.{name}": value for name, value in backend.expert.state_dict().items()}
    for index, state in enumerate(backend.opt.state.values()):
        tensors |= {f"opt.{index}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: value.clone() for name, value in tensors.items()}


def check_finite(backend: ExpertBackend) -> None:
    for name, value in state_of(backend).items():
        assert is_finite(value), name


def same_state(first: ExpertBackend, second: ExpertBackend) -> bool:
    one, two = state_of(first), state_of(second)
    return one.keys() == two.keys() and all(same_bits(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------------ refused before batching


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_culprit_is_refused_and_its_neighbours_get_what_they_would_without_it(
    kind: str, direction: str, bad: float
) -> None:
    attacked, quiet = built_in(kind), built_in(kind)
    metrics = guarded(attacked)
    guarded(quiet)
    honest = [honest_call(attacked, direction, seed, rows=seed + 1) for seed in range(3)]
    culprits = [
        spoilt_call(attacked, direction, {index: bad})
        for index, tensor in enumerate(honest[0])
        if tensor.is_floating_point()
    ]
    expected = run_together(quiet, direction, honest)
    results = run_together(attacked, direction, [honest[0], *culprits, *honest[1:]])
    refused, answered = results[1 : 1 + len(culprits)], [results[0], *results[1 + len(culprits) :]]
    assert all(isinstance(error, NonFiniteError) and isinstance(error, BadRequestError) for error in refused)
    assert f"tensor '0' of the call to {kind}.0 ({direction}) holds NaN or infinity in " in str(refused[0])
    for got, want in zip(answered, expected, strict=True):
        assert all(map(same_bits, got, want))
    assert same_state(attacked, quiet)
    stats = metrics.stats(f"{kind}.0", direction)
    assert stats.outcomes["400"] == len(culprits)
    assert stats.rejected["non_finite"] == (len(culprits) if direction == "backward" else 0)


def test_a_batch_of_nothing_but_culprits_is_answered() -> None:
    backend = built_in("ffn")
    guarded(backend)
    before = state_of(backend)
    results = run_together(backend, "backward", [spoilt_call(backend, "backward", {1: NAN})] * 3)
    assert [type(each) for each in results] == [NonFiniteError] * 3
    assert all(map(same_bits, before.values(), state_of(backend).values()))
    assert backend.update_count == 0


def test_an_outlier_is_refused_after_the_warm_up_and_counted_by_reason() -> None:
    backend = built_in("ffn")
    metrics = guarded(backend, outlier_factor=50.0, warmup_calls=8)
    calls = [honest_call(backend, "backward", seed) for seed in range(8)]
    x, gradient = calls[0]
    results = run_together(backend, "backward", [*calls, (x, gradient * 1e4), (x, gradient * 10)])
    assert isinstance(results[8], OutlierGradientError)
    assert "ffn.0 have a norm of" in str(results[8])
    assert not any(isinstance(each, CallError) for index, each in enumerate(results) if index != 8)
    text = metrics.render()[0].decode()
    assert 'p2pmoe_rejected_gradients_total{expert="ffn.0",reason="outlier"} 1.0' in text


@pytest.mark.parametrize("gate", [{"outlier_factor": None}, {"enabled": False}])
def test_the_outlier_gate_can_be_switched_off(gate: dict[str, Any]) -> None:
    backend = built_in("ffn")
    guarded(backend, **({"warmup_calls": 1} | gate))
    x, gradient = honest_call(backend, "backward", 1)
    results = run_together(backend, "backward", [(x, gradient), (x, gradient * 1e9)])
    assert not any(isinstance(each, CallError) for each in results)


# -------------------------------------------------------------------------------------------------- scaled down

ALICE, BOB = "a" * 32, "b" * 32


def run_as(backend: ExpertBackend, calls: Iterable[tuple[str, Flat]]) -> list[Any]:
    """Backward calls of several callers in one batch."""

    async def ask() -> list[Any]:
        futures = [backend.backward_pool.submit(call, caller=caller).future for caller, call in calls]
        runtime.start()
        async with asyncio.timeout(WAIT_S):
            return await asyncio.gather(*futures, return_exceptions=True)

    with served(backend) as runtime:
        return asyncio.run(ask())


def warmed(**options: Any) -> tuple[ExpertBackend, NodeMetrics]:
    backend = built_in("ffn", **options)
    metrics = guarded(backend, outlier_factor=50.0, warmup_calls=8)
    run_as(backend, [(ALICE, honest_call(backend, "backward", seed)) for seed in range(8)])
    return backend, metrics


def gradients_of(backend: ExpertBackend, call: Flat) -> torch.Tensor:
    """What a backward call would get, from the expert as it is now."""
    x = call[0].clone().requires_grad_()
    backend.expert(x).backward(call[1])
    for parameter in backend.expert.parameters():
        parameter.grad = None
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("times", [65_536.0, 1660.0, 1e9, 1e30])
def test_a_newcomer_is_scaled_down_and_gets_the_gradients_of_its_own_scale(times: float) -> None:
    backend, metrics = warmed()
    x, gradient = honest_call(backend, "backward", 20)
    large = (x, gradient * times)
    expected = gradients_of(backend, large)
    (result,) = run_as(backend, [(BOB, large)])
    assert same_bits(result[0], expected), "powers of two: no bit is lost on the way down and up"
    assert backend.update_count == 2
    stats = metrics.stats("ffn.0", "backward")
    assert (stats.clipped, dict(stats.rejected)) == (1, {})
    assert 'p2pmoe_clipped_gradients_total{expert="ffn.0"} 1.0' in metrics.render()[0].decode()


def test_the_neighbours_of_a_scaled_call_get_the_same_bits() -> None:
    backend, _ = warmed(name="sgd", clip_grad_norm=None)
    honest = [honest_call(backend, "backward", seed) for seed in (31, 32)]
    x, gradient = honest_call(backend, "backward", 33)
    expected = [gradients_of(backend, call) for call in (honest[0], (x, gradient * 1e6), honest[1])]
    results = run_as(backend, [(ALICE, honest[0]), (BOB, (x, gradient * 1e6)), (ALICE, honest[1])])
    assert all(torch.allclose(got[0], want, rtol=1e-5) for got, want in zip(results, expected, strict=True))


def test_a_fresh_key_moves_the_expert_no_further_than_a_call_at_the_limit() -> None:
    moved = []
    for key, times in [(ALICE, 40.0), *((f"{index:032x}", 10.0**index) for index in (2, 4, 9, 15))]:
        backend, _ = warmed(name="sgd", clip_grad_norm=None)
        before = [parameter.detach().clone() for parameter in backend.expert.parameters()]
        x = torch.ones(2, 4)
        (result,) = run_as(backend, [(key, (x, torch.ones(2, 4) * times))])
        assert not isinstance(result, CallError)
        pairs = zip(before, backend.expert.parameters(), strict=True)
        moved.append(math.hypot(*(float((old - new.detach()).norm()) for old, new in pairs)))
    assert max(moved[1:]) <= moved[0] * 2, "the limit is 50 times the usual norm, of which 40 is the lesser part"
    assert min(moved) > 0.0


def test_one_huge_row_of_an_honest_call_is_scaled_with_it() -> None:
    backend, metrics = warmed()
    x, gradient = honest_call(backend, "backward", 40, rows=64)
    gradient[7] *= 1e6
    expected = gradients_of(backend, (x, gradient))
    (result,) = run_as(backend, [(BOB, (x, gradient))])
    assert torch.allclose(result[0], expected, rtol=1e-4)
    assert metrics.stats("ffn.0", "backward").clipped == 1


def test_gradients_that_overflow_when_they_are_scaled_back_fail_alone() -> None:
    backend, _ = warmed()
    with torch.no_grad():
        for parameter in backend.expert.parameters():
            parameter.mul_(1e3)
    x, gradient = honest_call(backend, "backward", 50)
    results = run_as(backend, [(ALICE, (x, gradient)), (BOB, (x, gradient * 5e34))])
    assert not isinstance(results[0], CallError)
    assert isinstance(results[1], ExpertFailedError)
    assert "overflowed" in str(results[1])
    check_finite(backend)


def test_a_refusal_says_which_rule_and_for_how_long() -> None:
    backend, _ = warmed()
    x, gradient = honest_call(backend, "backward", 60)
    refused = [run_as(backend, [(ALICE, (x, gradient * 1e6))])[0] for _ in range(3)]
    assert all(isinstance(each, OutlierGradientError) for each in refused)
    assert "after 2 more of this size in a row they are your new scale" in str(refused[0])
    assert "after 0 more of this size in a row they are your new scale" in str(refused[2])
    assert not isinstance(run_as(backend, [(ALICE, (x, gradient * 1e6))])[0], CallError)
    (never,) = run_as(backend, [(BOB, spoilt_call(backend, "backward", {1: MAX}))])
    assert "are never taken" in str(never)


def test_gradients_of_half_precision_are_scaled_within_its_range() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Linear(4, 4).to(torch.float16)
    proto = BatchTensorProto(4, dtype=torch.float16)
    backend = ExpertBackend("ffn.0", module, torch.optim.SGD(module.parameters(), lr=1e-3), args_schema=(proto,))
    metrics = guarded(backend, outlier_factor=50.0, warmup_calls=1)
    x = torch.ones(2, 4, dtype=torch.float16)
    run_as(backend, [(ALICE, (x, x * 1e-3))])
    large = (x, x * 5e3)
    expected = gradients_of(backend, large)
    (result,) = run_as(backend, [(BOB, large)])
    assert torch.allclose(result[0], expected, rtol=1e-2)
    assert metrics.stats("ffn.0", "backward").clipped == 1


# ----------------------------------------------------------------------------------------------- what overflows


@pytest.mark.parametrize("kind", ["ffn", "det_dropout"])
@pytest.mark.parametrize("values", [{0: MAX}, {0: -MAX}])
def test_a_forward_that_overflows_fails_alone(kind: str, values: dict[int, float]) -> None:
    attacked, quiet = built_in(kind), built_in(kind)
    guarded(attacked)
    with torch.no_grad():
        for backend in (attacked, quiet):
            for parameter in backend.expert.parameters():
                parameter.mul_(8.0)
    honest = [honest_call(attacked, "forward", seed) for seed in range(2)]
    results = run_together(attacked, "forward", [honest[0], spoilt_call(attacked, "forward", values), honest[1]])
    expected = run_together(quiet, "forward", honest)
    assert isinstance(results[1], ExpertFailedError)
    assert "3.4e+38" in str(results[1])
    for got, want in zip(results[::2], expected, strict=True):
        assert all(map(same_bits, got, want))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_backward_that_overflows_fails_alone_and_the_neighbours_are_trained_without_it(
    optimizer: str, clip: float | None
) -> None:
    options: dict[str, Any] = {"name": optimizer, "clip_grad_norm": clip}
    attacked, quiet = built_in("ffn", **options), built_in("ffn", **options)
    metrics = guarded(attacked)
    honest = [honest_call(attacked, "backward", seed) for seed in range(3)]
    culprit = spoilt_call(attacked, "backward", {0: 1e30, 1: 1e30})
    results = run_together(attacked, "backward", [honest[0], culprit, *honest[1:]])
    expected = run_together(quiet, "backward", honest)
    assert isinstance(results[1], ExpertFailedError)
    for got, want in zip([results[0], *results[2:]], expected, strict=True):
        assert all(map(same_bits, got, want))
    assert same_state(attacked, quiet)
    assert attacked.update_count == 1
    assert metrics.stats("ffn.0", "backward").rejected == {"overflow": 1}


@pytest.mark.parametrize("culprits", [1, 5])
def test_many_neighbours_of_overflowing_calls_are_all_trained(culprits: int) -> None:
    backend = built_in("ffn", name="sgd")
    guarded(backend)
    calls = [honest_call(backend, "backward", seed, rows=1) for seed in range(40)]
    for index in range(culprits):
        calls[index * 8] = spoilt_call(backend, "backward", {0: 10.0 ** (20 + 3 * index), 1: 1e30})
    results = run_together(backend, "backward", calls)
    failed = [index for index, each in enumerate(results) if isinstance(each, CallError)]
    assert failed == [index * 8 for index in range(culprits)]
    check_finite(backend)


class Normalised(nn.Module):
    """Carries statistics of its batches over to the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x.detach().square().mean(0)  # replaced, not written
        y: torch.Tensor = self.linear(self.norm(x))
        return y


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("value", [1e20, 1e30, MAX])
def test_buffers_that_take_up_what_was_sent_are_put_back(direction: str, value: float) -> None:
    """At 1e20 the outputs are finite: only the running variance overflows."""
    torch.manual_seed(1)
    attacked = make_backend("ffn.0", Normalised())
    quiet = make_backend("ffn.0", copy.deepcopy(attacked.expert))
    guarded(attacked)
    honest = [honest_call(attacked, direction, seed) for seed in range(2)]
    culprit = list(honest_call(attacked, direction, 9))
    culprit[0] = culprit[0] * value if value < MAX else culprit[0].sign() * MAX
    results = run_together(attacked, direction, [honest[0], tuple(culprit), honest[1]])
    expected = run_together(quiet, direction, honest)
    assert isinstance(results[1], ExpertFailedError)
    for got, want in zip(results[::2], expected, strict=True):
        assert all(map(same_bits, got, want))
    assert same_state(attacked, quiet)
    again = honest_call(attacked, "forward", 5)
    assert all(
        map(same_bits, run_together(attacked, "forward", [again])[0], run_together(quiet, "forward", [again])[0])
    )


def test_an_expert_that_raises_leaves_its_buffers_as_they_were() -> None:
    backend = make_backend("ffn.0", Normalised())
    guarded(backend)
    run_together(backend, "forward", [honest_call(backend, "forward", 1)])
    before = state_of(backend)
    backend.expert.linear.register_forward_hook(lambda *_: 1 / 0)
    (result,) = run_together(backend, "forward", [honest_call(backend, "forward", 2)])
    assert "ZeroDivisionError" in str(result)
    assert all(map(same_bits, before.values(), state_of(backend).values()))


# ----------------------------------------------------------------------------------- backends of the user's own


class Gathering(ExpertBackend):
    """Steps every second pass."""

    passes = 0

    def apply_gradients(self) -> None:
        self.passes += 1
        if self.passes % 2 == 0:
            super().apply_gradients()


def test_gathered_gradients_survive_a_culprit() -> None:
    backends = []
    for _ in range(2):
        torch.manual_seed(3)
        module = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        backends.append(Gathering("ffn.0", module, optimizer, args_schema=(BatchTensorProto(4),)))
        guarded(backends[-1])
    attacked, quiet = backends
    honest = [honest_call(attacked, "backward", seed) for seed in range(4)]
    culprit = spoilt_call(attacked, "backward", {0: 1e30, 1: 1e30})
    for call in honest:
        assert isinstance(run_together(attacked, "backward", [culprit])[0], ExpertFailedError)
        got, want = run_together(attacked, "backward", [call])[0], run_together(quiet, "backward", [call])[0]
        assert all(map(same_bits, got, want))
    assert same_state(attacked, quiet)
    assert attacked.update_count == quiet.update_count == 2


class Own(ExpertBackend):
    """A backward of the user's own that knows of no gate and answers nonsense beside a step."""

    def backward(self, *inputs: torch.Tensor) -> Flat:
        x, gradient = inputs
        self.expert(x).backward(gradient)
        self.opt.step()
        self.opt.zero_grad()
        return (gradient * 1e30,)


def test_a_backward_of_the_users_own_is_screened_and_its_optimizer_guarded() -> None:
    module = nn.Linear(4, 4)
    backend = Own("ffn.0", module, torch.optim.SGD(module.parameters(), lr=0.1), args_schema=(BatchTensorProto(4),))
    guarded(backend)
    good, nan = honest_call(backend, "backward", 1), spoilt_call(backend, "backward", {1: NAN})
    large = (good[0], good[1] * 1e10)
    huge = spoilt_call(backend, "backward", {0: 1e30, 1: 1e30})
    results = run_together(backend, "backward", [good, nan, huge])
    assert [type(each) for each in results] == [tuple, NonFiniteError, ExpertFailedError]
    check_finite(backend)
    results = run_together(backend, "backward", [good, large])
    assert [type(each) for each in results] == [tuple, ExpertFailedError]
    assert "after the expert's own step" in str(results[1])
    check_finite(backend)


def test_a_backward_of_the_users_own_cannot_spoil_buffers_either() -> None:
    module = Normalised()
    backend = Own("ffn.0", module, torch.optim.SGD(module.parameters(), lr=0.1), args_schema=(BatchTensorProto(4),))
    guarded(backend)
    x, gradient = honest_call(backend, "backward", 1)
    (result,) = run_together(backend, "backward", [(x * 1e20, gradient)])
    assert not isinstance(result, CallError), "the outputs and the step were finite; only the running variance was not"
    check_finite(backend)


# ------------------------------------------------------------------------------------------------ the property

extremes = st.sampled_from([NAN, INF, -INF, MAX, -MAX, 1e30, -1e30, 1e20, 1e12, 1e-45, -1e-45, 1e-38, 0.0, -0.0, 1.0])
optimizers = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta", "adamax", "nadam", "radam"]),
        "clip_grad_norm": st.sampled_from([None, 1.0]),
        "lr": st.sampled_from([1e-3, 1.0, 100.0]),
    }
)


@st.composite
def attacks(draw: st.DrawFn) -> list[tuple[str, list[tuple[bool, int, list[float]]]]]:
    """Batches: a pass, and calls that are honest or have extreme values strewn over their tensors."""
    call = st.tuples(st.booleans(), st.integers(0, 1000), st.lists(extremes, min_size=1, max_size=4))
    batch = st.tuples(st.sampled_from(["forward", "backward", "backward"]), st.lists(call, min_size=1, max_size=4))
    return draw(st.lists(batch, min_size=1, max_size=4))


def strew(call: Flat, values: list[float], seed: int) -> Flat:
    generator = torch.Generator().manual_seed(seed)
    spoilt = []
    for tensor in call:
        if tensor.is_floating_point():
            chosen = torch.tensor(values)[torch.randint(0, len(values), tensor.shape, generator=generator)]
            spoilt.append(torch.where(torch.rand(tensor.shape, generator=generator) < 0.7, chosen, tensor))
        else:
            spoilt.append(tensor)
    return tuple(spoilt)


@pytest.mark.parametrize("kind", [*KINDS, "batch_norm"])
@settings(max_examples=40)
@given(batches=attacks(), optimizer=optimizers, warmup_calls=st.sampled_from([1, 64]))
def test_whatever_callers_send_parameters_buffers_and_optimizer_stay_finite(
    kind: str, batches: Any, optimizer: dict[str, Any], warmup_calls: int
) -> None:
    if kind == "batch_norm":
        module = Normalised()
        trained = make_optimizer(module.parameters(), OptimizerConfig(**optimizer))
        backend = ExpertBackend("ffn.0", module, trained, args_schema=(BatchTensorProto(4),))
    else:
        backend = built_in(kind, **optimizer)
    guarded(backend, warmup_calls=warmup_calls)
    for direction, calls in batches:
        tensors = [honest_call(backend, direction, seed) for _, seed, _ in calls]
        sent = [
            call if is_honest else strew(call, values, seed)
            for call, (is_honest, seed, values) in zip(tensors, calls, strict=True)
        ]
        results = run_together(backend, direction, sent)
        check_finite(backend)
        for result in results:
            assert isinstance(result, CallError) or all(map(is_finite, result)), "no answer is NaN"
        assert all(parameter.grad is None for parameter in backend.expert.parameters())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(batches=attacks(), optimizer=optimizers)
def test_honest_neighbours_get_the_same_answer_as_without_the_attacker(
    kind: str, batches: Any, optimizer: dict[str, Any]
) -> None:
    """The attackers' gradients are those that are refused or fail: what passes is training, by right."""
    optimizer = optimizer | {"lr": 1e-3}
    attacked, quiet = built_in(kind, **optimizer), built_in(kind, **optimizer)
    guarded(attacked, outlier_factor=None)
    guarded(quiet, outlier_factor=None)
    for direction, calls in batches:
        honest = [honest_call(attacked, direction, seed) for is_honest, seed, _ in calls if is_honest]
        sent = [
            honest_call(attacked, direction, seed)
            if is_honest
            else strew(honest_call(attacked, direction, seed), [*values, NAN], seed)
            for is_honest, seed, values in calls
        ]
        attackers = [call for call, (is_honest, _, _) in zip(sent, calls, strict=True) if not is_honest]
        if any(all(map(is_finite, call)) for call in attackers):
            continue  # luck: no NaN was drawn
        results = run_together(attacked, direction, sent)
        expected = run_together(quiet, direction, honest) if honest else []
        answered = [result for result, (is_honest, _, _) in zip(results, calls, strict=True) if is_honest]
        for got, want in zip(answered, expected, strict=True):
            assert all(map(same_bits, got, want))
    assert same_state(attacked, quiet)
