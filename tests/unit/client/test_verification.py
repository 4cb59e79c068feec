"""Redundant calls: in the background, bounded, settled by majority, and fair to honest nodes."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lying_kit import Lie, LyingTransport, shaped
from swarm_kit import ALICE, BOB, CAROL, WAIT_S, Gate, World, grid_backends, make_backend, open_world, same_bits

import p2pmoe
from p2pmoe.client import verification
from p2pmoe.client.verification import MAX_ROWS, MAX_RUNNING, draw_rows, same_answer, take_rows
from p2pmoe.errors import ConfigError
from p2pmoe.rpc.memory import MemoryNetwork, MemoryTransport
from p2pmoe.types import Endpoint, PeerId

ONES = shaped(lambda y: y)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


@contextlib.contextmanager
def replicas(
    *names: str, lies: dict[str, Lie] | None = None, make: Callable[[], list[Any]] | None = None, **options: Any
) -> Iterator[World]:
    """Peers that host ffn.0 with the same parameters; those of `lies` answer by script."""
    make = make or (lambda: [make_backend("ffn.0", lr=0.0)])
    network = MemoryNetwork()
    transport = LyingTransport(MemoryTransport(network), {Endpoint(each, 1): lie for each, lie in (lies or {}).items()})
    options = {"transport": transport, "verify_fraction": 1.0, "verify_seed": 1} | options
    with open_world({name: make() for name in names}, network=network, **options) as world:
        yield world


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


def settled(world: World) -> verification.VerifyCounts:
    """The counts once nothing runs any more."""
    verifier = world.swarm.verifier
    assert verifier is not None
    wait_for(lambda: not verifier._held)
    return verifier.counts


def verdict(world: World, name: str) -> str:
    return world.swarm.trust.standing.verdict(PeerId(name))


def counts(world: World, name: str) -> dict[str, int]:
    return {each.peer_id: each.counts for each in world.swarm.trust.standing.snapshot()}.get(PeerId(name), {})


# -------------------------------------------------------------------------------------------------- verdicts


def test_honest_replicas_agree_and_nothing_is_held_against_them() -> None:
    with replicas("alice", "bob", "carol") as world:
        expert = world.swarm.expert("ffn.0")
        for _ in range(5):
            expert(X)
            settled(world)
        assert (settled(world).sampled, settled(world).agreed) == (5, 5)
        assert world.swarm.trust.standing.snapshot() == []
        assert world.network.link(BOB).exchanges + world.network.link(CAROL).exchanges == 5, "one witness is enough"


async def test_awaited_calls_are_verified_too() -> None:
    with replicas("alice", "bob") as world:
        await world.swarm.expert("ffn.0").acall(X)
        wait_for(lambda: settled(world).agreed == 1)


def test_a_third_provider_outvotes_the_liar() -> None:
    with replicas("alice", "bob", "carol", lies={"alice": ONES}) as world:
        expert = world.swarm.expert("ffn.0")
        assert same_bits(expert(X), torch.ones(3, 4)), "the answer itself is not waited for"
        settled(world)
        assert counts(world, "alice") == {"outvoted": 1}
        assert [verdict(world, name) for name in ("alice", "bob", "carol")] == ["last", "good", "good"]
        assert same_bits(expert(X), world.bob.backends["ffn.0"].expert(X)), "an honest one is asked first now"


def test_a_lying_witness_is_outvoted_too() -> None:
    with replicas("alice", "bob", "carol", lies={"bob": ONES, "carol": ONES}) as world:
        world.swarm.transport.lies.pop(CAROL)
        expert = world.swarm.expert("ffn.0")
        while not counts(world, "bob"):
            expert(X)
            settled(world)
        assert counts(world, "bob") == {"outvoted": 1}
        assert verdict(world, "alice") == verdict(world, "carol") == "good"


def test_with_two_providers_both_lose_a_little_and_stay_good() -> None:
    with replicas("alice", "bob", lies={"alice": ONES}) as world:
        expert = world.swarm.expert("ffn.0")
        for _ in range(10):
            expert(X)
            settled(world)
        assert settled(world).contradicted == 10
        assert counts(world, "alice") == counts(world, "bob") == {"contradiction": 10}
        assert verdict(world, "alice") == verdict(world, "bob") == "good"


def test_who_contradicts_different_peers_sinks() -> None:
    hosts = {
        "alice": [make_backend(f"ffn.{i}", lr=0.0) for i in range(3)],
        "bob": [make_backend("ffn.0", lr=0.0)],
        "carol": [make_backend("ffn.1", lr=0.0)],
        "dave": [make_backend("ffn.2", lr=0.0)],
    }
    network = MemoryNetwork()
    transport = LyingTransport(MemoryTransport(network), {ALICE: ONES})
    with open_world(hosts, network=network, transport=transport, verify_fraction=1.0) as world:
        for index in range(3):
            world.swarm.expert(f"ffn.{index}")(X)
            settled(world)
        assert verdict(world, "alice") == "last"
        assert {verdict(world, name) for name in ("bob", "carol", "dave")} == {"good"}


def test_a_peer_that_has_lied_before_is_no_witness() -> None:
    with replicas("alice", "bob", lies={"alice": ONES}) as world:
        world.swarm.trust.note_lie(PeerId("alice"), "broken_reply", "an earlier one")
        expert = world.swarm.expert("ffn.0")
        expert(X)  # bob answers; alice is not asked about him
        assert settled(world).unverified == 1
        world.swarm.directory.mark_unreachable(PeerId("bob"), 5)
        expert(X)
        assert settled(world).unverified == 2
        world.swarm.directory.mark_reachable(PeerId("bob"))
        alice = next(each for each in world.directory._providers["ffn.0"] if each.peer_id == "alice")
        world.swarm.verifier.offer(alice, "ffn.0", expert.info, (X,), (torch.ones(3, 4),))
        settled(world)
        assert counts(world, "alice") == {"broken_reply": 1, "outvoted": 1}
        assert counts(world, "bob") == {}


def test_three_that_were_trained_apart_are_not_shunned() -> None:
    lies = {"alice": ONES, "bob": shaped(lambda y: y * 2), "carol": shaped(lambda y: y * 3)}
    with replicas(*lies, lies=lies) as world:
        expert = world.swarm.expert("ffn.0")
        for _ in range(20):
            expert(X)
            settled(world)
        assert "shunned" not in {verdict(world, name) for name in lies}
        assert all(set(counts(world, name)) <= {"contradiction"} for name in lies)


def test_a_witness_that_answers_nonsense_is_judged_by_it_and_the_next_one_is_asked() -> None:
    lies = {"bob": shaped(lambda y: y * math.nan), "carol": shaped(lambda y: y[:1])}
    with replicas("alice", "bob", "carol", "dave", lies=lies) as world:
        expert = world.swarm.expert("ffn.0")
        while not (counts(world, "bob") and counts(world, "carol")):
            expert(X)
            settled(world)
        assert (counts(world, "bob"), counts(world, "carol")) == ({"non_finite": 1}, {"broken_reply": 1})
        assert verdict(world, "alice") == verdict(world, "dave") == "good"
        assert settled(world).contradicted == 0


def test_without_a_second_provider_nothing_is_asked() -> None:
    with replicas("alice") as world:
        world.swarm.expert("ffn.0")(X)
        assert settled(world).unverified == 1
        assert world.network.link(ALICE).exchanges == 1


def test_a_witness_that_cannot_be_reached_proves_nothing() -> None:
    with replicas("alice", "bob") as world:
        world.network.link(BOB).cut()
        world.swarm.expert("ffn.0")(X)
        assert settled(world).unverified == 1
        assert world.swarm.trust.standing.snapshot() == []


def test_the_mixtures_calls_are_verified() -> None:
    hosts = {"make": lambda: grid_backends(lr=0.0)}
    with replicas("alice", "bob", "carol", lies={"alice": ONES}, **hosts) as world:
        world.mixture(k_best=4)(X)
        settled(world)
        assert counts(world, "alice").get("outvoted", 0) >= 1
        assert verdict(world, "bob") == verdict(world, "carol") == "good"
        y = world.mixture(k_best=4)(X)
        with open_world({"bob": grid_backends(lr=0.0)}) as honest:
            assert same_bits(y, honest.mixture(k_best=4)(X))


# ----------------------------------------------------------------------------------- in the background, bounded


def test_nobody_waits_for_it_and_closing_ends_it(no_new_threads: None) -> None:
    with replicas("alice", "bob") as world:
        expert = world.swarm.expert("ffn.0")
        expert.info  # noqa: B018
        world.network.link(BOB).delay_s = math.inf
        began = time.monotonic()
        for _ in range(3 * MAX_RUNNING):
            expert(X)
        assert time.monotonic() - began < WAIT_S / 2, "a silent witness holds up nobody"
        verifier = world.swarm.verifier
        assert verifier is not None
        wait_for(lambda: verifier.counts.unverified == 2 * MAX_RUNNING)
        assert (verifier.counts.sampled, verifier._held) == (3 * MAX_RUNNING, MAX_RUNNING)
        world.swarm.close()
        assert not verifier._tasks
        assert verifier._held == 0
        assert world.network.link(BOB)._running == set()


def test_a_silent_witness_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "TIMEOUT_S", 0.05)
    with replicas("alice", "bob") as world:
        expert = world.swarm.expert("ffn.0")
        expert.info  # noqa: B018
        world.network.link(BOB).delay_s = math.inf
        expert(X)
        assert settled(world).unverified == 1
        assert verdict(world, "bob") == "good"


def test_what_the_caller_does_to_its_tensors_afterwards_does_not_matter() -> None:
    gates: list[Gate] = []

    def make() -> list[Any]:
        gates.append(Gate())
        return [make_backend("ffn.0", gates[-1], lr=0.0)]

    with replicas("alice", "bob", make=make) as world:
        expert = world.swarm.expert("ffn.0")
        expert.info  # noqa: B018
        gates[1].armed = True
        x = X.clone()
        with torch.inference_mode():
            y = expert(x)
            x.zero_()
            y.zero_()
        gates[1].go.set()
        assert settled(world).agreed == 1


def test_only_a_share_is_sampled_the_same_for_the_same_seed() -> None:
    seen = []
    for _ in range(2):
        with replicas("alice", verify_fraction=0.25, verify_seed=3) as world:
            expert = world.swarm.expert("ffn.0")
            drawn = []
            for _ in range(100):
                before = settled(world).sampled
                expert(X)
                drawn.append(settled(world).sampled - before)
            seen.append(drawn)
    assert seen[0] == seen[1]
    assert 10 < sum(seen[0]) < 45


def test_by_default_nothing_is_verified() -> None:
    with replicas("alice", "bob", verify_fraction=0.0) as world:
        world.swarm.expert("ffn.0")(X)
        assert world.swarm.verifier is None
        assert world.network.link(BOB).exchanges == 0


def test_backward_is_never_repeated() -> None:
    with replicas("alice", "bob") as world:
        x = X.clone().requires_grad_()
        world.swarm.expert("ffn.0")(x).sum().backward()
        settled(world)
        assert world.bob.backends["ffn.0"].update_count == 0


def test_many_threads_offer_at_once() -> None:
    with replicas("alice", "bob") as world:
        expert = world.swarm.expert("ffn.0")
        expert.info  # noqa: B018
        threads = [threading.Thread(target=lambda: [expert(X) for _ in range(5)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        done = settled(world)
        assert done.sampled == 40 == done.agreed + done.unverified
        assert world.swarm.trust.standing.snapshot() == []


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        {"verify_fraction": -0.1},
        {"verify_fraction": 1.1},
        {"verify_fraction": math.nan},
        {"verify_rtol": -1.0},
        {"verify_atol": math.nan},
    ],
)
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="verify_"):
        p2pmoe.Swarm(directory=p2pmoe.client.directory.StaticDirectory({}), **options)


# -------------------------------------------------------------------------------------------------- the comparison


def test_rounding_is_no_difference_and_a_changed_number_is() -> None:
    y = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    y[0, 0] = 1e-9  # where large numbers cancel, all digits may differ
    other = y * (1 + 1e-3 * torch.rand(8, 16))
    other[0, 0] = -3e-8
    assert same_answer(y, other, rtol=1e-2, atol=0.0)
    for wrong in (y.roll(1, 0), -y, y * 1.1, torch.zeros(8, 16), y.masked_fill(y == y[3, 3], math.nan)):
        assert not same_answer(y, wrong, rtol=1e-2, atol=1e-4)
    other = y.clone()
    other[5, 7] += 0.05 * float(y[5].abs().max())
    assert not same_answer(y, other, rtol=1e-2, atol=1e-4)


@given(st.integers(1, 5), st.integers(0, 5), st.sampled_from([torch.float16, torch.float64, torch.int32]))
def test_everything_equals_itself(rows: int, width: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(rows * width).view(rows, width).to(dtype)
    assert same_answer(tensor, tensor.clone(), rtol=0.0, atol=0.0)
    assert same_answer(torch.ones(rows), torch.ones(rows), rtol=0.0, atol=0.0), "one number a row"


def test_integers_must_be_equal() -> None:
    assert not same_answer(torch.tensor([[1000]]), torch.tensor([[1001]]), rtol=0.5, atol=5.0)


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (64, 4), (1000, 4), (100, 100_000), (3, 0)])
def test_samples_are_bounded(rows: int, width: int) -> None:
    x = torch.zeros(rows, width)
    drawn = draw_rows(random.Random(0), (x,), (x,))
    assert drawn is not None
    assert drawn == sorted(set(drawn))
    assert 1 <= len(drawn) <= min(rows, MAX_ROWS)
    taken = take_rows((x,), drawn)[0]
    assert taken.shape == (len(drawn), width)
    assert 2 * taken.nbytes <= verification.MAX_SAMPLE_BYTES
    assert taken.data_ptr() != x.data_ptr() or not taken.numel()


def test_a_row_that_is_too_large_is_not_copied() -> None:
    x = torch.zeros(1, verification.MAX_SAMPLE_BYTES // 4 + 1)
    assert draw_rows(random.Random(0), (x,), (x,)) is None
