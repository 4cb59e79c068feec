"""What nobody foresaw where answers are read: it fails its own call, in words and at once; neighbours go on.

On the swarm's loop and in the calling thread, in memory and over HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from swarm_kit import ALICE, WAIT_S, World, grid_backends, make_backend, open_world, run_threads, same_bits

from p2pmoe import BatchTensorProto
from p2pmoe.client import mixture_pass
from p2pmoe.client.answers import Answers
from p2pmoe.client.calls import Call, CallGroup, make_call
from p2pmoe.client.exchange import Dispatcher
from p2pmoe.errors import UnexpectedError
from p2pmoe.rpc.memory import MemoryTransport

X = torch.ones(2, 4)
PROTOS = (BatchTensorProto(4),)


@pytest.fixture(params=["loop in memory", "loop over HTTP", "calling thread"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Alice with four experts, and how calls reach her."""
    carrier = "memory" if request.param == "loop in memory" else "http"
    with open_world({"alice": [make_backend(f"ffn.{i}", lr=0.0) for i in range(4)]}, carrier=carrier) as world:
        if request.param == "loop over HTTP":
            world.swarm.dispatcher._lone = None
        for index in range(4):
            world.swarm.expert(f"ffn.{index}")(X)  # sessions and connections are there
        yield world


def call_of(world: World, index: int) -> Call:
    return make_call(
        world.alice.endpoint, f"ffn.{index}", "forward", (X,), PROTOS, PROTOS, timeout_s=WAIT_S, peer_id=None
    )


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.exc_info and each.levelno == logging.ERROR]


def quickly(function: Callable[[], Any]) -> Any:
    started = time.monotonic()
    try:
        return function()
    finally:
        assert time.monotonic() - started < WAIT_S / 2


def raises(*_: Any) -> bool:
    raise ZeroDivisionError("who counts?")


def test_a_predicate_that_raises_fails_its_group_and_no_other(world: World, caplog: pytest.LogCaptureFixture) -> None:
    group = CallGroup([call_of(world, 0), call_of(world, 1)], enough=raises, grace_s=0.1)
    other = CallGroup([call_of(world, 2), call_of(world, 3)], enough=lambda position: False)

    def call(each: CallGroup) -> Any:
        quickly(lambda: world.swarm.call(each, WAIT_S))
        return each

    run_threads([lambda: call(group), lambda: call(other)])
    with pytest.raises(UnexpectedError, match=r"ZeroDivisionError: who counts\?") as caught:
        group.results(WAIT_S)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    for index, result in zip((2, 3), other.results(WAIT_S), strict=True):
        assert same_bits(result[0], world.alice.backends[f"ffn.{index}"].expert(X))
    assert len(told(caplog)) == 1
    assert same_bits(world.swarm.expert("ffn.0")(X), world.alice.backends["ffn.0"].expert(X))


def test_an_awaited_predicate_too(world: World) -> None:
    group = CallGroup([call_of(world, 0), call_of(world, 1)], enough=raises, grace_s=0.1)
    quickly(lambda: world.swarm.run(world.swarm.call_async(group, WAIT_S)))
    with pytest.raises(UnexpectedError):
        group.results(WAIT_S)


@pytest.mark.parametrize("carrier", ["memory", "http"])
def test_a_mixture_says_so_instead_of_taking_what_is_left(
    carrier: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_world({"alice": grid_backends([0], lr=0.0), "bob": grid_backends([1], lr=0.0)}, carrier=carrier) as world:
        moe = world.mixture(k_best=4, k_min=1)
        right = moe(X)
        monkeypatch.setattr(mixture_pass._Enough, "__call__", raises)
        with pytest.raises(UnexpectedError, match="ZeroDivisionError"):
            quickly(lambda: moe(X))
        monkeypatch.undo()
        assert same_bits(moe(X), right)
        assert world.swarm.trust.standing.snapshot() == []


def test_looking_at_an_answer_fails_that_call_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Call.check

    def check(self: Call, header: Any) -> None:
        if self.uid == "ffn.1":
            raise AttributeError("nobody knows")
        real(self, header)

    monkeypatch.setattr(Call, "check", check)
    group = CallGroup([call_of(world, index) for index in range(3)])
    quickly(lambda: world.swarm.call(group, WAIT_S))
    first, second, third = group.results(WAIT_S)
    assert isinstance(second, UnexpectedError)
    assert str(second).startswith("looking at an answer of ffn.1 failed unexpectedly: AttributeError: nobody knows")
    for index, result in ((0, first), (2, third)):
        assert same_bits(result[0], world.alice.backends[f"ffn.{index}"].expert(X))
    assert told(caplog) == ["looking at an answer of ffn.1 failed unexpectedly"]


def test_handing_over_an_answer_too(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = CallGroup.complete

    def complete(self: CallGroup, call: Call, result: Any) -> float | None:
        if call.uid == "ffn.1":
            raise IndexError("lost")
        return real(self, call, result)

    monkeypatch.setattr(CallGroup, "complete", complete)
    group = CallGroup([call_of(world, index) for index in range(3)])
    quickly(lambda: world.swarm.call(group, WAIT_S))
    with pytest.raises(UnexpectedError, match=r"handing over an answer of ffn\.1 .* IndexError: lost"):
        group.results(WAIT_S)
    assert told(caplog) == ["handing over an answer of ffn.1 failed unexpectedly"]


def test_whoever_is_told_of_a_lie_may_raise(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The call has its own error all the same, and its neighbour its result."""
    wrong = make_call(
        world.alice.endpoint,
        "ffn.0",
        "forward",
        (X,),
        PROTOS,
        (BatchTensorProto(5),),
        timeout_s=WAIT_S,
        peer_id=world.alice.peer_id,
    )
    world.swarm.trust.note_lie = raises
    group = CallGroup([wrong, call_of(world, 1)])
    quickly(lambda: world.swarm.call(group, WAIT_S))
    first, second = group.results(WAIT_S)
    assert "answered" in str(first)
    assert same_bits(second[0], world.alice.backends["ffn.1"].expert(X))


def test_a_transport_that_raises_anything_is_told_to_its_calls(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("exchange", "try_exchange"):
        if hasattr(world.swarm.transport, name):
            monkeypatch.setattr(world.swarm.transport, name, raises)
    group = CallGroup([call_of(world, 0), call_of(world, 1)])
    quickly(lambda: world.swarm.call(group, WAIT_S))
    assert [type(each) for each in group.results(WAIT_S)] == [UnexpectedError] * 2
    assert len(told(caplog)) == 1
    monkeypatch.undo()
    assert same_bits(world.swarm.expert("ffn.0")(X), world.alice.backends["ffn.0"].expert(X))


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_the_loops_thread_outlives_whatever_a_transport_raises(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_world({"alice": [make_backend("ffn.0", lr=0.0)]}) as world:
        expert = world.swarm.expert("ffn.0")
        right = expert(X)

        def leave(*_: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(MemoryTransport, "exchange", leave)
            with pytest.raises(UnexpectedError):
                quickly(lambda: expert(X))
        assert same_bits(expert(X), right)

        async def leave_too() -> None:
            raise error

        with pytest.raises(UnexpectedError):
            quickly(lambda: world.swarm.run(leave_too()))
        assert same_bits(expert(X), right)


def test_answers_of_a_crowd_are_looked_at_one_by_one_when_together_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_world({"alice": [make_backend("ffn.0", lr=0.0)]}) as world:
        expert = world.swarm.expert("ffn.0")
        right = expert(X)
        monkeypatch.setattr("p2pmoe.client.exchange.all_surely_finite", raises)
        monkeypatch.setattr("p2pmoe.client.exchange._CROWD", 0)
        for result in run_threads([lambda: quickly(lambda: expert(X))] * 4):
            assert same_bits(result, right)
        assert "looking at answers that came together failed unexpectedly" in told(caplog)


def test_a_group_that_cannot_be_sent_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_world({"alice": [make_backend("ffn.0", lr=0.0)]}) as world:
        world.swarm.expert("ffn.0")(X)
        with monkeypatch.context() as patch:
            patch.setattr(Dispatcher, "_start", raises)
            group = CallGroup([call_of(world, 0)])
            quickly(lambda: world.swarm.call(group, WAIT_S))
            with pytest.raises(UnexpectedError, match="sending calls failed unexpectedly"):
                group.results(WAIT_S)
        assert world.swarm.expert("ffn.0")(X).isfinite().all()


def test_a_call_is_settled_once_however_often_its_hearer_raises() -> None:
    calls = [make_call(ALICE, "ffn.0", "forward", (X,), PROTOS, PROTOS, timeout_s=1.0) for _ in range(3)]
    group = CallGroup(calls)
    heard: list[str] = []

    def finish(call: Call, result: Any) -> None:
        heard.append(call.id)
        raise TypeError("each time")

    answers = Answers(calls[0].endpoint, calls, finish, lambda *_: None)
    answers.close()
    assert heard == [call.id for call in calls]
    assert group.has_failed
    assert all(isinstance(call.result, UnexpectedError) for call in calls)


def test_a_sample_that_cannot_be_taken_fails_no_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hosts = {name: [make_backend("ffn.0", lr=0.0)] for name in ("alice", "bob")}
    with open_world(hosts, verify_fraction=1.0, verify_seed=1) as world:
        monkeypatch.setattr("p2pmoe.client.verification.take_rows", raises)
        assert world.swarm.expert("ffn.0")(X).isfinite().all()
        assert world.swarm.verifier is not None
        assert (world.swarm.verifier.counts.unverified, world.swarm.verifier._held) == (1, 0)
        assert told(caplog) == ["taking a sample of a call of ffn.0 failed unexpectedly"]


def test_a_repeated_call_that_fails_unexpectedly_is_told_and_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hosts = {name: [make_backend("ffn.0", lr=0.0)] for name in ("alice", "bob")}
    with open_world(hosts, verify_fraction=1.0, verify_seed=1) as world:
        assert world.swarm.verifier is not None
        monkeypatch.setattr(world.swarm.verifier, "_witnesses", raises)
        assert world.swarm.expert("ffn.0")(X).isfinite().all()
        deadline = time.monotonic() + WAIT_S
        while world.swarm.verifier._held and time.monotonic() < deadline:
            world.swarm.run(_turn())
        assert (world.swarm.verifier.counts.unverified, world.swarm.verifier._held) == (1, 0)
        assert told(caplog) == ["repeating a call of ffn.0 failed unexpectedly"]


async def _turn() -> None:
    """One turn of the loop."""
