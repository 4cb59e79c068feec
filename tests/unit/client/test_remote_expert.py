"""RemoteExpert: a remote module is the local one, bit for bit, in memory and over HTTP."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from swarm_kit import (
    ALICE,
    WAIT_S,
    Failing,
    Gate,
    World,
    make_backend,
    make_ffn,
    open_world,
    run_threads,
    same_bits,
    until,
)
from torch import nn

import p2pmoe
from p2pmoe import BatchTensorProto as P
from p2pmoe.errors import (
    ClosedError,
    DeadlineError,
    ExpertFailedError,
    ExpertNotFoundError,
    InvalidUidError,
    PeerUnreachableError,
    SchemaError,
    TorchModeError,
)


class Rich(nn.Module):
    """Positional and keyword arguments, nesting, several outputs, integers, an input that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, pair: Any, *, index: torch.Tensor, unused: torch.Tensor) -> Any:
        y = self.linear(x) * pair["scale"].unsqueeze(1) + pair["shift"][0]
        return {"out": y, "extra": [y.sum(1), index * 2], "half": y.half()}


RICH = {
    "args_schema": (P(4), {"scale": P(), "shift": (P(3),)}),
    "kwargs_schema": {"index": P(2, dtype=torch.int64), "unused": P(5)},
}


def rich_arguments(rows: int = 3) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    x, scale, shift, unused = (torch.randn(rows, *shape, requires_grad=True) for shape in ((4,), (), (3,), (5,)))
    return (x, {"scale": scale, "shift": (shift,)}), {"index": torch.randint(9, (rows, 2)), "unused": unused}


@pytest.fixture
def make(carrier: str) -> Iterator[Callable[..., World]]:
    import contextlib

    with contextlib.ExitStack() as stack:
        yield lambda *backends, **options: stack.enter_context(
            open_world({"alice": backends}, carrier=carrier, **options)
        )


# --------------------------------------------------------------------------------------- remote = local


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_remote_equals_local_bit_for_bit(make: Callable[..., World], optimizer: Any) -> None:
    """Forward, input gradients and parameter updates, over several steps."""
    world = make(make_backend("ffn.0", optimizer=optimizer, lr=0.05))
    expert, local = world.swarm.expert("ffn.0"), make_ffn("ffn.0")
    updates = optimizer(local.parameters(), lr=0.05)
    for step in range(6):
        x = torch.randn(5, 4)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y_local, y_remote = local(mine), expert(theirs)
        assert same_bits(y_local, y_remote), step
        gradient = torch.randn(5, 4)
        y_local.backward(gradient)
        y_remote.backward(gradient)
        updates.step()
        updates.zero_grad()
        assert same_bits(mine.grad, theirs.grad), step
        for a, b in zip(local.parameters(), world.backend("ffn.0").expert.parameters(), strict=True):
            assert same_bits(a, b), step
    assert world.backend("ffn.0").update_count == 6


def test_rich_arguments_and_outputs(make: Callable[..., World]) -> None:
    backend = make_backend("ffn.0", Rich(), **RICH)
    local = copy.deepcopy(backend.expert)
    expert = make(backend).swarm.expert("ffn.0")
    args, kwargs = rich_arguments()
    remote, mine = expert(*args, **kwargs), local(*args, **kwargs)
    assert list(remote) == sorted(mine)
    for a, b in zip(p2pmoe.nested_flatten(remote), p2pmoe.nested_flatten(mine), strict=True):
        assert same_bits(a, b)
    assert not remote["extra"][1].requires_grad

    leaves = [each for each in p2pmoe.nested_flatten((args, kwargs)) if each.requires_grad]

    def loss(outputs: Any) -> torch.Tensor:
        return outputs["out"].square().sum() + outputs["extra"][0].sum() + outputs["half"].float().sum()

    theirs = torch.autograd.grad(loss(remote), leaves)
    ours = torch.autograd.grad(loss(mine), leaves, allow_unused=True)
    for a, b, leaf in zip(theirs, ours, leaves, strict=True):
        assert same_bits(a, torch.zeros_like(leaf) if b is None else b)


def test_only_one_of_several_outputs_is_used(make: Callable[..., World]) -> None:
    expert = make(make_backend("ffn.0", Rich(), lr=0.0, **RICH)).swarm.expert("ffn.0")
    args, kwargs = rich_arguments()
    expert(*args, **kwargs)["half"].float().sum().backward()
    assert args[0].grad.abs().sum() > 0
    assert same_bits(kwargs["unused"].grad, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(make: Callable[..., World], dtype: torch.dtype) -> None:
    backend = make_backend("ffn.0", make_ffn("ffn.0", dtype=dtype), args_schema=(P(4, dtype=dtype),))
    local = copy.deepcopy(backend.expert)
    expert = make(backend).swarm.expert("ffn.0")
    x = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    y, mine = expert(x), local(x)
    assert same_bits(y, mine)
    gradient = torch.randn(3, 4, dtype=dtype)
    assert same_bits(torch.autograd.grad(y, x, gradient)[0], torch.autograd.grad(mine, x, gradient)[0])


def test_floats_are_cast_to_the_schema_and_gradients_back(make: Callable[..., World]) -> None:
    expert = make(make_backend("ffn.0")).swarm.expert("ffn.0")
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = expert(x)
    y.sum().backward()
    assert y.dtype is torch.float64, "the caller's"
    assert x.grad is not None
    assert x.grad.dtype is torch.float64


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_a_schema_with_a_codec_rounds_what_travels(make: Callable[..., World], codec: str) -> None:
    schema = {"args_schema": (P(4, codec=codec),), "outputs_schema": P(4, codec=codec)}
    backend = make_backend("nop.0", Gate(), lr=0.0, **schema)
    expert = make(backend).swarm.expert("nop.0")
    x = torch.randn(3, 4, requires_grad=True)
    wire = {"fp16": torch.float16, "bf16": torch.bfloat16}[codec]
    y = expert(x)
    assert same_bits(y, x.to(wire).float())
    gradient = torch.randn(3, 4)
    y.backward(gradient)
    assert same_bits(x.grad, gradient.to(wire).float())


def test_gradcheck(make: Callable[..., World]) -> None:
    double = {"args_schema": (P(3, dtype=torch.float64), P(3, dtype=torch.float64))}
    module = TwoArguments().double()
    expert = make(make_backend("ffn.0", module, lr=0.0, **double)).swarm.expert("ffn.0")
    a, b = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(expert, (a, b))
    assert torch.autograd.gradcheck(lambda x: expert(x, b.detach()), (a,))


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        return torch.tanh(a @ self.weight) * b, (a * b).sum(1)


def test_a_second_derivative_is_refused_not_wrong(make: Callable[..., World]) -> None:
    expert = make(make_backend("ffn.0", lr=0.0)).swarm.expert("ffn.0")
    x = torch.randn(2, 4, requires_grad=True)
    for loss in (lambda y: y.square().sum(), lambda y: y.sum()):
        y = expert(x)
        (gradient,) = torch.autograd.grad(loss(y), x, create_graph=True)
        with pytest.raises(TorchModeError, match=r"once_differentiable"):
            (y.sum() + gradient.square().sum()).backward()


# --------------------------------------------------------------------------------------------- odd inputs


def test_odd_layouts_are_sent_by_value(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0", lr=0.0))
    expert, local = world.swarm.expert("ffn.0"), world.backend("ffn.0").expert
    base = torch.randn(4, 8)
    for view in (base[:, :4].t(), base[:, ::2], base[:1, :4].expand(3, 4), base[1:3, 4:]):
        leaf = view.detach().requires_grad_()
        y = expert(leaf)
        assert same_bits(y, local(view.contiguous()))
        y.sum().backward()
        assert leaf.grad is not None


def test_gradients_that_are_expanded_scalars_arrive(make: Callable[..., World]) -> None:
    expert = make(make_backend("nop.0", Gate(), lr=0.0)).swarm.expert("nop.0")
    x = torch.randn(3, 4, requires_grad=True)
    expert(x).sum().backward()  # autograd hands over one number, expanded
    assert same_bits(x.grad, torch.ones(3, 4))


def test_no_rows_need_no_network(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0"))
    expert = world.swarm.expert("ffn.0")
    x = torch.zeros(0, 4, requires_grad=True)
    y = expert(x)
    assert (y.shape, y.dtype) == ((0, 4), torch.float32)
    assert world.swarm.dispatcher.exchanges == 0
    y.sum().backward()
    assert same_bits(x.grad, torch.zeros(0, 4))
    assert world.swarm.dispatcher.exchanges == 0
    assert world.backend("ffn.0").update_count == 0


def test_an_expert_is_trained_even_when_no_input_needs_a_gradient(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0"))
    world.swarm.expert("ffn.0")(torch.randn(2, 4)).sum().backward()
    assert world.backend("ffn.0").update_count == 1


def test_without_gradients_nothing_is_kept(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0"))
    expert = world.swarm.expert("ffn.0")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = expert(torch.randn(2, 4, requires_grad=True))
        assert not y.requires_grad
    assert world.backend("ffn.0").update_count == 0


def test_a_graph_may_be_kept_and_trains_again(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0", lr=0.0))
    x = torch.randn(2, 4, requires_grad=True)
    y = world.swarm.expert("ffn.0")(x)
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    y.sum().backward()
    assert same_bits(x.grad, first * 2)
    assert world.backend("ffn.0").update_count == 2, "two passes are two ids"


def test_it_is_a_module_like_any_other(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0", lr=0.0))
    expert = world.swarm.expert("ffn.0")
    stack = nn.Sequential(nn.Linear(4, 4), expert, nn.Linear(4, 1))
    stack(torch.randn(3, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())
    assert list(expert.parameters()) == []
    assert "FP32[batch, 4]" in repr(expert)
    assert repr(world.swarm.expert("ffn.9")) == "<RemoteExpert ffn.9>"


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, "positional"),
        ((torch.ones(2, 4), torch.ones(2, 4)), {}, "positional"),
        ((torch.ones(2, 4),), {"mask": torch.ones(2)}, "mask"),
        (((torch.ones(2, 4),),), {}, r"argument|positional"),
        ((torch.ones(2, 5),), {}, r"FP32\[batch, 4\], got float32\[2, 5\]"),
        ((torch.ones(4),), {}, "argument 0"),
        ((torch.ones(()),), {}, "argument 0"),
        ((torch.ones(2, 4, dtype=torch.int64),), {}, "int64"),
        (([[1.0] * 4],), {}, r"argument|positional"),
        ((None,), {}, "NoneType"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(
    make: Callable[..., World], args: Any, kwargs: Any, words: str
) -> None:
    world = make(make_backend("ffn.0"))
    with pytest.raises(SchemaError, match=words) as caught:
        world.swarm.expert("ffn.0")(*args, **kwargs)
    assert "ffn.0" in str(caught.value)
    assert world.swarm.dispatcher.exchanges == 0


def test_different_numbers_of_rows_are_refused(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0", Rich(), **RICH))
    args, kwargs = rich_arguments()
    kwargs["index"] = kwargs["index"][:1]
    with pytest.raises(SchemaError, match=r"\[3, 3, 3, 1, 3\]"):
        world.swarm.expert("ffn.0")(*args, **kwargs)


def test_an_unknown_uid(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0"))
    with pytest.raises(ExpertNotFoundError, match=r"p2pmoe lookup 'ffn\.\*'"):
        world.swarm.expert("ffn.1")(torch.ones(2, 4))
    with pytest.raises(InvalidUidError):
        world.swarm.expert("ffn")


def test_an_expert_that_fails_says_why_and_others_go_on(make: Callable[..., World]) -> None:
    world = make(make_backend("bad.0", Failing()), make_backend("ffn.0"))
    bad, good = world.swarm.expert("bad.0"), world.swarm.expert("ffn.0")
    with pytest.raises(ExpertFailedError, match="dislikes negative numbers"):
        bad(-torch.ones(2, 4))
    assert good(torch.ones(2, 4)).shape == bad(torch.ones(2, 4)).shape
    x = torch.ones(2, 4, requires_grad=True)
    y = bad(x)
    with torch.no_grad():
        world.backend("bad.0").expert.linear.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ExpertFailedError, match="ZeroDivisionError"):
        y.sum().backward()
    assert world.backend("bad.0").update_count == 0


def test_an_expert_that_breaks_its_schema_fails_at_its_node(make: Callable[..., World]) -> None:
    class Liar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer: Any = None
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> Any:
            return x * self.weight if self.answer is None else self.answer(x)

    world = make(make_backend("ffn.0", Liar()), make_backend("ffn.1"))
    expert = world.swarm.expert("ffn.0")
    expert(torch.ones(2, 4))
    lies: list[Callable[[torch.Tensor], Any]] = [
        lambda x: x[:, :3],
        lambda x: x.double(),
        lambda x: x.unsqueeze(1),
    ]
    for lie in lies:
        world.backend("ffn.0").expert.answer = lie
        with pytest.raises(ExpertFailedError, match=r"ffn\.0.* its schema says \(float32\[2, 4\]\)"):
            expert(torch.ones(2, 4))
        assert not any(each.counts for each in world.swarm.trust.standing.snapshot()), "the node has not lied"
        assert world.swarm.expert("ffn.1")(torch.ones(1, 4)).shape == (1, 4)
        world.swarm.trust.pardon(world.alice.peer_id)  # else the third lie would be the last question
    failures: list[Callable[[torch.Tensor], Any]] = [
        lambda x: x.to(torch.complex64),
        lambda x: (x, x),
        lambda x: (),
        lambda x: None,
        lambda x: x[:1],
    ]
    for failure in failures:
        world.backend("ffn.0").expert.answer = failure
        with pytest.raises(ExpertFailedError):
            expert(torch.ones(2, 4))


def test_a_slow_expert_is_a_deadline_error_within_the_timeout(make: Callable[..., World]) -> None:
    gate = Gate()
    world = make(make_backend("gate.0", gate))
    expert = world.swarm.expert("gate.0", forward_timeout_s=0.2)
    expert.info  # noqa: B018 - asked before the clock runs
    gate.armed = True
    with pytest.raises(DeadlineError, match=r"gate\.0"):
        expert(torch.ones(2, 4))
    gate.go.set()


def test_a_swarm_that_is_closed_says_so(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0"))
    expert = world.swarm.expert("ffn.0")
    x = torch.ones(2, 4)
    expert(x)
    world.swarm.close()
    world.swarm.close()
    with pytest.raises(ClosedError):
        expert(x)
    with pytest.raises(ClosedError):
        world.swarm.expert("ffn.0")(x)


def test_a_swarm_that_was_never_opened_says_so() -> None:
    swarm = p2pmoe.Swarm(directory=p2pmoe.client.directory.StaticDirectory({}))
    with pytest.raises(ClosedError, match="use it as"):
        swarm.expert("ffn.0")(torch.ones(1, 4))
    with pytest.raises(ClosedError, match="use it as"):
        swarm.dispatcher  # noqa: B018


def test_closing_ends_calls_that_wait(make: Callable[..., World]) -> None:
    gate = Gate()
    world = make(make_backend("gate.0", gate))
    expert = world.swarm.expert("gate.0")
    expert.info  # noqa: B018
    gate.armed = True

    def close() -> None:
        assert gate.begun.wait(WAIT_S)
        world.swarm.close()

    def call() -> None:
        with pytest.raises((PeerUnreachableError, ClosedError)):
            expert(torch.ones(1, 4))

    run_threads([call, close])
    gate.go.set()


# -------------------------------------------------------------------------------------------- concurrency


def test_sixty_four_threads_at_once(make: Callable[..., World]) -> None:
    world = make(make_backend("ffn.0", lr=0.0), make_backend("ffn.1", lr=0.0))
    experts = [world.swarm.expert(f"ffn.{index}") for index in range(2)]
    locals_ = [copy.deepcopy(world.backend(f"ffn.{index}").expert) for index in range(2)]

    def work(worker: int) -> None:
        generator = torch.Generator().manual_seed(worker)
        for step in range(3):
            which = (worker + step) % 2
            x = torch.randn(1 + worker % 3, 4, generator=generator).requires_grad_()
            y = experts[which](x)
            torch.testing.assert_close(y, locals_[which](x), rtol=1e-5, atol=1e-6)
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            (mine,) = torch.autograd.grad(locals_[which](x).square().sum(), x)
            torch.testing.assert_close(gradient, mine, rtol=1e-4, atol=1e-5)

    run_threads([lambda worker=worker: work(worker) for worker in range(64)])
    updates = sum(world.backend(f"ffn.{index}").update_count for index in range(2))
    assert 0 < updates < 64 * 3, "concurrent calls share optimizer steps"


def test_concurrent_calls_are_one_batch_and_one_step(make: Callable[..., World]) -> None:
    """Sixteen backward calls that wait together become one step on the merged batch."""
    gate = Gate()
    world = make(make_backend("gate.0", gate), make_backend("ffn.0"))
    expert, blocker = world.swarm.expert("ffn.0"), world.swarm.expert("gate.0")
    for each in (expert, blocker):
        each.info  # noqa: B018
    local = make_ffn("ffn.0")
    xs = [torch.randn(2, 4) for _ in range(16)]
    outputs = [expert(x) for x in xs]
    gate.armed = True

    def open_when_all_wait() -> None:
        asyncio.run(until(lambda: world.alice.runtime.tasks_waiting == 16))
        gate.go.set()

    run_threads(
        [
            lambda: blocker(torch.ones(1, 4)),
            lambda: (gate.begun.wait(WAIT_S), open_when_all_wait()),
            *(lambda y=y: (gate.begun.wait(WAIT_S), y.sum().backward()) for y in outputs),
        ]
    )
    assert world.backend("ffn.0").update_count == 1
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    local(torch.cat(xs)).sum().backward()
    optimizer.step()
    for mine, theirs in zip(local.parameters(), world.backend("ffn.0").expert.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


async def test_beside_a_running_event_loop(make: Callable[..., World]) -> None:
    """As in a notebook: the blocking form works where a loop runs already."""
    world = make(make_backend("ffn.0"))
    x = torch.randn(2, 4, requires_grad=True)
    world.swarm.expert("ffn.0")(x).sum().backward()
    assert x.grad is not None
    assert [record.uid for record in world.swarm.find_experts("ffn.*")] == ["ffn.0"]


async def test_awaited_calls_leave_the_loop_free(make: Callable[..., World]) -> None:
    gate = Gate()
    world = make(make_backend("gate.0", gate), make_backend("ffn.0"))
    slow, fast = world.swarm.expert("gate.0"), world.swarm.expert("ffn.0")
    async with asyncio.timeout(WAIT_S):
        await slow.acall(torch.ones(1, 4))
        gate.armed = True
        waiting = asyncio.create_task(slow.acall(torch.ones(1, 4)))
        await until(gate.begun.is_set)
        gate.go.set()
        assert (await waiting).shape == (1, 4)
        x = torch.randn(3, 4, requires_grad=True)
        outputs = await asyncio.gather(*(fast.acall(x) for _ in range(8)))
        sum(outputs).sum().backward()
        assert [each.uid for each in await world.swarm.find_experts_async("ffn.*")] == ["ffn.0"]
        with pytest.raises(ExpertNotFoundError):
            await world.swarm.expert("ffn.7").acall(x)
        with pytest.raises(SchemaError):
            await fast.acall(torch.ones(2, 5))
    assert x.grad is not None


async def test_a_cancelled_await_leaves_nothing_behind(make: Callable[..., World]) -> None:
    gate = Gate()
    world = make(make_backend("gate.0", gate))
    expert = world.swarm.expert("gate.0")
    await expert.acall(torch.ones(1, 4))
    gate.armed = True
    waiting = asyncio.create_task(expert.acall(torch.ones(1, 4)))
    await until(gate.begun.is_set)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.armed = False
    gate.go.set()
    async with asyncio.timeout(WAIT_S):
        assert (await expert.acall(torch.ones(1, 4))).shape == (1, 4)
    await until(lambda: not world.swarm.dispatcher._exchanges)


async def test_async_with(carrier: str) -> None:
    del carrier
    async with p2pmoe.Swarm(directory=p2pmoe.client.directory.StaticDirectory({})) as swarm:
        assert swarm.find_experts("ffn.*") == []
        assert "exchanges" in repr(swarm)


# ---------------------------------------------------------------------------------------- scripted failures


def test_a_lost_backward_answer_is_asked_for_again_and_applied_once() -> None:
    with open_world({"alice": [make_backend("ffn.0")]}) as world:
        expert = world.swarm.expert("ffn.0")
        x = torch.randn(2, 4, requires_grad=True)
        y = expert(x)
        world.network.fail_at(ALICE, world.network.link(ALICE).exchanges + 1, "lose_answer")
        y.sum().backward()
        assert x.grad is not None
        assert world.backend("ffn.0").update_count == 1


@pytest.mark.parametrize("failure", ["refuse", "break_request", "break_answer", "lose_answer"])
def test_a_failed_call_goes_to_the_replica(failure: Any) -> None:
    """Two peers host one uid; the call succeeds on the other, and the first is left alone for a while."""
    with open_world({name: [make_backend("ffn.0", lr=0.0)] for name in ("alice", "bob")}) as world:
        expert = world.swarm.expert("ffn.0")
        x = torch.randn(2, 4, requires_grad=True)
        y = expert(x)
        world.network.fail_at(ALICE, 2, failure)
        world.network.fail_at(ALICE, 3, failure)  # a broken connection is tried twice
        if failure == "break_answer":  # with one call its only result has arrived by then
            y.sum().backward()
            return
        y.sum().backward()
        assert world.bob.backends["ffn.0"].update_count == 1
        assert x.grad is not None
        expert(x)
        assert world.network.link(ALICE).exchanges == 3, "left out"


def test_replicas_over_http_when_one_dies() -> None:
    with open_world({name: [make_backend("ffn.0", lr=0.0)] for name in ("alice", "bob")}, carrier="http") as world:
        expert = world.swarm.expert("ffn.0")
        x = torch.randn(2, 4)
        first = expert(x)
        world.alice.stop()
        assert same_bits(expert(x), first)
        first.sum().backward()
        assert world.bob.backends["ffn.0"].update_count == 1


@pytest.mark.parametrize("carrier", ["memory", "http"])
def test_a_stranger_with_another_schema_under_the_same_uid_is_not_asked(carrier: str) -> None:
    """What most providers host is meant, whoever comes first; a call goes to those that fit it only."""
    hosts = {"alice": [make_backend("ffn.0", dim=6)]} | {
        name: [make_backend("ffn.0", lr=0.0)] for name in ("bob", "carol")
    }
    with open_world(hosts, carrier=carrier) as world:
        expert = world.swarm.expert("ffn.0")
        x = torch.randn(2, 4)
        first = expert(x)
        first.sum().backward()
        world.bob.stop()
        assert same_bits(expert(x), first)
        assert world.alice.handlers.expert("ffn.0")["requests"] == 0


def test_an_expert_that_was_replaced_by_another_says_so() -> None:
    with open_world({"alice": [make_backend("ffn.0")], "bob": [make_backend("ffn.0", dim=6)]}) as world:
        expert = world.swarm.expert("ffn.0")
        expert.info  # noqa: B018 - whichever of the two; the other one remains
        stays, goes = ("alice", "bob") if expert.info.inputs[0].shape == (6,) else ("bob", "alice")
        world.directory.mark_unreachable(world.peers[goes].peer_id, 60.0)
        with pytest.raises(ExpertNotFoundError, match="another schema"):
            expert(torch.zeros(1, *expert.info.inputs[0].shape))
        world.swarm.expert("ffn.0")(torch.zeros(1, 6 if stays == "bob" else 4))


def test_all_replicas_dead_is_unreachable_and_comes_back() -> None:
    with open_world({"alice": [make_backend("ffn.0")]}) as world:
        expert = world.swarm.expert("ffn.0")
        expert(torch.ones(1, 4))
        world.network.link(ALICE).cut()
        for _ in range(2):
            with pytest.raises((PeerUnreachableError, ExpertNotFoundError)):
                expert(torch.ones(1, 4))
        world.network.link(ALICE).restore()
        world.directory.mark_reachable(world.alice.peer_id)
        assert expert(torch.ones(1, 4)).shape == (1, 4)


def test_a_draining_node_is_left_for_the_replica() -> None:
    with open_world({name: [make_backend("ffn.0")] for name in ("alice", "bob")}) as world:
        expert = world.swarm.expert("ffn.0")
        expert(torch.ones(1, 4))
        world.alice.handlers.drain()
        assert expert(torch.ones(1, 4)).shape == (1, 4)
        assert world.network.link(ALICE).exchanges == 2


def test_a_silent_peer_is_a_deadline_error() -> None:
    with open_world({"alice": [make_backend("ffn.0")]}) as world:
        expert = world.swarm.expert("ffn.0", forward_timeout_s=0.1)
        expert(torch.ones(1, 4))
        world.network.link(ALICE).delay_s = math.inf
        with pytest.raises(DeadlineError):
            expert(torch.ones(1, 4))


def test_too_many_calls_for_the_node_say_so() -> None:
    """An error that stands for the whole exchange reaches every call of it that has no answer of its own."""
    with open_world({"alice": [make_backend("ffn.0")]}) as world:
        world.network.register(ALICE, world.alice.handlers, max_calls=1)
        expert = world.swarm.expert("ffn.0")
        from p2pmoe.client.calls import CallGroup, make_call

        provider = world.swarm.run(world.swarm.find_providers("ffn.0"))[0]
        info = expert.info
        x = (torch.ones(1, 4),)
        calls = [
            make_call(provider.endpoint, "ffn.0", "forward", x, info.inputs, info.outputs, timeout_s=5.0)
            for _ in range(3)
        ]
        group = CallGroup(calls)
        world.swarm.call(group, 5.0)
        results = group.results(5.0)
        assert sum(isinstance(each, tuple) for each in results) == 1
        assert all("more than 1 calls" in str(each) for each in results if not isinstance(each, tuple))
