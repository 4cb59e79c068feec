"""torch's modes on the caller's thread: a call gives the same numbers under each, or is refused in words."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from swarm_kit import WAIT_S, World, grid_backends, make_backend, open_world, run_threads, same_bits, until
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import p2pmoe
from p2pmoe.client.mixture_pass import _Enough
from p2pmoe.errors import P2PMoEError, SchemaError, TorchModeError

D = 4

# torch's own: parts of it are imported late and warn of each other; the compiler looks at the gradient of no leaf.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture
def world(carrier: str) -> Iterator[World]:
    """Two nodes, so that the mixture's answers are read on the swarm's thread."""
    hosts = {"alice": grid_backends([0], lr=0.0), "bob": grid_backends([1], lr=0.0)}
    with open_world(hosts, carrier=carrier) as world:
        yield world


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def inference_with_gradients() -> Iterator[None]:
    with torch.inference_mode(), torch.enable_grad():
        yield


@contextlib.contextmanager
def anomalies() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        with torch.autograd.set_detect_anomaly(True):
            yield


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "inference with gradients": inference_with_gradients,
    "bfloat16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16 autocast": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: default_device("meta"),
    "deterministic": deterministic,
    "anomaly": anomalies,
}
KEEPS_GRAPH = sorted(set(MODES) - {"no_grad", "inference", "inference with gradients"})


def layers(world: World) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Everything that can be called, each of which gives one tensor."""
    mixture, expert = world.mixture(k_best=3), world.swarm.expert("ffn.1.0")
    torch.manual_seed(3)
    options = {"in_features": D, "grid_size": (2, 2), "uid_prefix": "ffn", "jitter_eps": 0.0}
    switch = p2pmoe.RemoteSwitchMixtureOfExperts(world.swarm, **options)

    def awaited(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: asyncio.run(asyncio.wait_for(layer.acall(x), WAIT_S))

    return {
        "mixture": mixture,
        "expert": expert,
        "switch": lambda x: switch(x)[0],
        "balancing loss": lambda x: switch(x)[1],
        "awaited mixture": awaited(mixture),
        "awaited expert": awaited(expert),
    }


@pytest.mark.parametrize("mode", sorted(MODES))
def test_outputs_are_the_same_in_every_mode(world: World, mode: str) -> None:
    called = layers(world)
    x = torch.randn(6, D)
    expected = {name: layer(x).detach() for name, layer in called.items()}
    large = torch.randn(16_384, D)  # 256 KiB and more: another way of receiving
    expected_large = called["expert"](large).detach()
    tolerance = {"rtol": 0.0, "atol": 0.05 if "autocast" in mode else 0.0}  # the gate is the caller's own
    with MODES[mode]():
        given = {name: layer(x) for name, layer in called.items()}
        given_large = called["expert"](large)
    for name, wanted in expected.items():
        assert given[name].dtype is torch.float32, name
        assert given[name].device == wanted.device, name
        torch.testing.assert_close(given[name].detach(), wanted, **({} if "expert" in name else tolerance), msg=name)
    assert same_bits(given_large, expected_large)
    assert all(same_bits(layer(x).detach(), expected[name]) for name, layer in called.items()), "nothing stays behind"


@pytest.mark.parametrize("mode", KEEPS_GRAPH)
def test_gradients_are_the_same_in_every_mode(world: World, mode: str) -> None:
    called = layers(world)
    x = torch.randn(6, D)

    def gradient(layer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = {name: gradient(layer) for name, layer in called.items()}
    with MODES[mode]():
        given = {name: gradient(layer) for name, layer in called.items()}
    tolerance = {"rtol": 0.0, "atol": 0.1 if "autocast" in mode else 0.0}
    for name, wanted in expected.items():
        torch.testing.assert_close(given[name], wanted, **({} if "expert" in name else tolerance), msg=name)


def test_backward_in_a_mode_that_forward_was_not_in(world: World) -> None:
    moe = world.mixture(k_best=4)
    x = torch.randn(6, D)
    expected = torch.autograd.grad(moe(x.requires_grad_()).sum(), x)[0]
    for mode in KEEPS_GRAPH:
        y = moe(x)
        with MODES[mode]():
            (given,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(given, expected, rtol=0.0, atol=0.05 if "autocast" in mode else 0.0, msg=mode)


def test_modes_of_one_thread_are_no_other_threads(world: World) -> None:
    moe = world.mixture(k_best=4)
    x = torch.randn(5, D)
    with torch.no_grad():
        expected = moe(x)

    def work(mode: str) -> None:
        with MODES[mode]():
            for _ in range(3):
                torch.testing.assert_close(moe(x).detach(), expected, rtol=1e-5, atol=1e-6)

    run_threads([lambda mode=mode: work(mode) for mode in ("inference", "no_grad", "default device meta", "anomaly")])


def test_answers_are_counted_without_a_tensor() -> None:
    """The counter is made in the caller's mode and written to on the swarm's thread."""
    with open_world({"alice": grid_backends([0]), "bob": grid_backends([1])}) as world:
        moe = world.mixture(k_best=4, k_min=2)
        moe(torch.randn(1, D))
        seen: list[_Enough] = []
        real = moe._passes.forward_group

        def watched(*args: Any) -> Any:
            group, sent = real(*args)
            seen.append(group._enough)
            return group, sent

        moe._passes.forward_group = watched
        with torch.inference_mode():
            moe(torch.randn(3, D))
        assert [type(each) for each in vars(seen[0]).values() if isinstance(each, torch.Tensor)] == []


def test_k_min_is_counted_in_inference_mode() -> None:
    """The grace begins when each row has k_min answers, in inference mode as elsewhere."""
    from swarm_kit import Gate

    gate = Gate()
    with open_world({"alice": [make_backend("ffn.0.0", gate)], "bob": [make_backend("ffn.0.1")]}) as world:
        moe = world.mixture(grid_size=(1, 2), k_best=2, timeout_after_k_min_s=0.05)
        moe.check()  # a call whose grace ran out on a busy machine would leave one of the two out of the next
        gate.armed = True
        x = torch.randn(3, D)
        with torch.inference_mode():
            y = moe(x)  # else it would take the whole timeout of a minute
        gate.go.set()
        with torch.no_grad():
            assert same_bits(y, world.backend("ffn.0.1").expert(x))


@pytest.mark.parametrize("mode", ["inference", "default device meta", "default float64"])
def test_verification_is_independent_of_the_callers_mode(mode: str) -> None:
    hosts = {name: grid_backends(lr=0.0) for name in ("alice", "bob")}
    with open_world(hosts, verify_fraction=1.0, verify_seed=1) as world, MODES[mode]():
        expert = world.swarm.expert("ffn.0.0")
        x = torch.randn(5, D, device="cpu", dtype=torch.float32)
        expert(x)
        counts = world.swarm.verifier.counts
        asyncio.run(until(lambda: counts.agreed or counts.unverified or counts.contradicted))
        assert (counts.agreed, counts.contradicted, counts.unverified) == (1, 0, 0)


def test_tensors_made_in_inference_mode_may_be_inputs(world: World) -> None:
    expert = world.swarm.expert("ffn.0.0")
    with torch.inference_mode():
        x = torch.randn(3, D)
    y = expert(x)
    y.sum().backward()
    assert world.backend("ffn.0.0").update_count == 1
    with torch.no_grad():
        assert same_bits(y, world.backend("ffn.0.0").expert(x.clone()))


# --------------------------------------------------------------------------- what records or transforms


def both(world: World) -> list[Callable[..., torch.Tensor]]:
    return [world.mixture(k_best=4), world.swarm.expert("ffn.0.0")]


def test_recorders_are_refused(world: World) -> None:
    """They would take one answer for a constant: other inputs got the first ones' outputs, without an error."""
    x = torch.randn(3, D)
    for layer in both(world):
        layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(TorchModeError, match=r"torch\.jit\.trace, make_fx and torch\.export cannot record"):
                torch.jit.trace(layer, (x,), check_trace=False)  # noqa: TID251 - to see it refused
            with pytest.raises(TorchModeError, match="would keep this one answer"):
                make_fx(layer)(x)


def test_transforms_are_refused(world: World) -> None:
    x = torch.randn(3, D)
    for layer in both(world):
        exchanges = world.swarm.dispatcher.exchanges
        transforms: list[Callable[[], Any]] = [
            lambda layer=layer: torch.func.vmap(layer)(x.expand(2, 3, D)),
            lambda layer=layer: torch.func.grad(lambda z: layer(z).sum())(x),
            lambda layer=layer: torch.func.jvp(layer, (x,), (x,)),
            lambda layer=layer: torch.func.jacrev(layer)(x),
        ]
        for transform in transforms:
            with pytest.raises(TorchModeError, match="cannot be transformed"):
                transform()
        assert world.swarm.dispatcher.exchanges == exchanges, "nothing was sent"


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad])
def test_forward_mode_differentiation_is_refused(world: World, context: Callable[[], Any]) -> None:
    """Under `no_grad` the tangent was lost without a word."""
    x = torch.randn(3, D)
    for layer in both(world):
        with context(), forward_ad.dual_level(), pytest.raises(TorchModeError, match="forward-mode"):
            layer(forward_ad.make_dual(x, x))


def test_second_derivatives_are_refused_never_left_out(world: World) -> None:
    x = torch.randn(3, D)
    for layer in both(world):
        with pytest.raises(TorchModeError, match="first derivatives only"):
            torch.autograd.functional.hessian(lambda z, layer=layer: layer(z).sum(), x)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (gradient,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        plain = torch.autograd.grad(layer(leaf).sum(), leaf)[0]
        torch.testing.assert_close(gradient.detach(), plain, rtol=1e-5, atol=1e-6)
        with pytest.raises(TorchModeError, match="gradient penalties"):
            (y.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x.to_sparse(), "sparse_coo"),
        (lambda x: x.to("meta"), "on meta"),
        (lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged), "nested"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: [[1.0] * D], "list|positional"),
    ],
)
def test_tensors_without_plain_values_are_refused(world: World, spoil: Callable[[Any], Any], words: str) -> None:
    for layer in both(world):
        layer(torch.randn(1, D))
        exchanges = world.swarm.dispatcher.exchanges
        with pytest.raises(SchemaError, match=words):
            layer(spoil(torch.randn(3, D)))
        assert world.swarm.dispatcher.exchanges == exchanges


def test_functional_call_reaches_the_gate(world: World) -> None:
    moe = world.mixture(k_best=4)
    other = copy.deepcopy(moe)
    with torch.no_grad():
        other.gate.proj.weight.mul_(-2.0)
    x = torch.randn(3, D)
    given = torch.func.functional_call(moe, dict(other.named_parameters()), (x,))
    assert same_bits(given, other(x))
    assert not same_bits(given, moe(x))


def test_torch_compile_ends_its_graph_at_the_layer(world: World) -> None:
    """One break, whatever is inside, and the same numbers for inputs of every size."""
    torch.compiler.reset()
    for layer in both(world):
        model = nn.Sequential(nn.Linear(D, D), layer, nn.Linear(D, 1))
        compiled = torch.compile(model, backend="eager")
        for rows in (3, 5, 7):
            x, z = (torch.ones(rows, D).requires_grad_() for _ in range(2))
            compiled(x).sum().backward()
            model(z).sum().backward()
            torch.testing.assert_close(compiled(x), model(z))
            torch.testing.assert_close(x.grad, z.grad)
    with pytest.raises(Exception, match="called over the network") as caught:
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, D))
    assert not isinstance(caught.value, P2PMoEError), "torch's own, in our words"
    torch.compiler.reset()


def test_checkpointing_computes_again_and_gives_the_same(world: World) -> None:
    from torch.utils.checkpoint import checkpoint

    for layer in both(world):
        x, z = (torch.ones(3, D).mul(0.5).requires_grad_() for _ in range(2))
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        layer(z).sum().backward()
        torch.testing.assert_close(x.grad, z.grad)


async def test_a_task_that_waits_without_gradients_cuts_no_other_tasks_graph() -> None:
    """Both run on one thread, whose mode is that of whoever entered one last."""
    from swarm_kit import Gate

    gate = Gate()
    hosts = {"alice": [make_backend("ffn.0.0", gate), make_backend("lone.0", lr=0.0)]}
    with open_world(hosts) as world:
        moe, expert, lone = world.mixture(grid_size=(1, 1), k_best=1), world.swarm.expert("ffn.0.0"), None
        moe(torch.randn(1, D))
        lone = world.swarm.expert("lone.0")
        lone(torch.randn(1, D)), expert(torch.randn(1, D))
        gate.armed = True
        x = torch.randn(2, D, requires_grad=True)
        training = [asyncio.ensure_future(layer.acall(x)) for layer in (moe, expert)]
        await until(gate.begun.is_set)
        async with asyncio.timeout(WAIT_S):
            with torch.no_grad():
                gate.go.set()
                outputs = await asyncio.gather(*training)
            with torch.inference_mode():
                evaluated = await lone.acall(x)
        assert all(each.requires_grad for each in outputs)
        assert not evaluated.requires_grad
        sum(each.sum() for each in outputs).backward()
        assert x.grad is not None


def test_export_without_a_compiler_is_refused(world: World) -> None:
    expert = world.swarm.expert("ffn.0.0")
    expert(torch.randn(1, D))
    with pytest.raises(TorchModeError, match=r"torch\.export cannot record|cannot be transformed"):
        torch.export.export(nn.Sequential(expert), (torch.randn(3, D),), strict=False)  # noqa: TID251 - to see it refused


def test_fake_tensors_are_refused(world: World) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for layer in both(world):
        layer(torch.randn(1, D))
        with FakeTensorMode() as mode, pytest.raises(TorchModeError, match="FakeTensor without values"):
            layer(mode.from_tensor(torch.randn(3, D, device="cpu")))
