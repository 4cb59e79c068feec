"""Providers that moved or come back: a call that has time left reads the records again and waits.

What will not pass is told at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from moving_kit import ChangingDirectory, announce, directory_of, move
from swarm_kit import ALICE, WAIT_S, World, make_backend, open_world, run_threads, same_bits

import p2pmoe
from p2pmoe.client.patience import FIRST_PAUSE_S, LAST_PAUSE_S, Patience, may_pass, patiently
from p2pmoe.errors import (
    AccessDeniedError,
    BadRequestError,
    DeadlineError,
    DecodeError,
    DrainingError,
    ExpertFailedError,
    ExpertNotFoundError,
    ExpertsUnavailableError,
    InsecureEndpointError,
    OverloadedError,
    P2PMoEError,
    PeerUnreachableError,
    UnknownExpertError,
)

X = torch.ones(2, 4)


@pytest.fixture
def world() -> Iterator[World]:
    with open_world({"alice": [make_backend("ffn.0")]}) as world:
        directory_of(world)
        yield world


@pytest.fixture
def directory(world: World) -> ChangingDirectory:
    return world.directory


def within(least_s: float, most_s: float, function: Callable[[], Any]) -> Any:
    started = time.monotonic()
    try:
        return function()
    finally:
        assert least_s <= time.monotonic() - started < most_s


# --------------------------------------------------------------------------------------------- one expert


@pytest.mark.parametrize("reads", [1, 3])
@pytest.mark.parametrize("awaited", [False, True])
def test_a_call_finds_the_provider_at_its_new_address(
    world: World, directory: ChangingDirectory, reads: int, awaited: bool
) -> None:
    """Also when the records say so only after some tries: pauses, not the time for which an address is left out."""
    expert = world.swarm.expert("ffn.0")
    right = expert(X)
    move(world, world.alice, 2)
    directory.on_read = lambda number: announce(directory, world.alice) if number == reads else None
    again = within(0.0, 2.0, lambda: asyncio.run(expert.acall(X)) if awaited else expert(X))
    assert same_bits(again, right)
    assert directory.reads == reads
    within(0.0, 1.0, lambda: expert(X))
    assert directory.reads == reads, "it is cached now"


def test_a_call_in_flight_is_repeated_at_the_new_address_and_a_gradient_applied_once(
    world: World, directory: ChangingDirectory
) -> None:
    """The first answer is lost with the connection; at the new address the same id gets the same answer."""
    expert = world.swarm.expert("ffn.0")
    x = X.clone().requires_grad_()
    y = expert(x)
    link = world.network.link(ALICE)
    link.fail_at(link.exchanges + 1, "lose_answer")
    link.fail_at(link.exchanges + 2, "refuse")  # where it was nobody answers any more

    def moved(number: int) -> None:
        move(world, world.alice, 2)
        announce(directory, world.alice)

    directory.on_read = moved
    within(0.0, 2.0, lambda: y.sum().backward())
    assert x.grad.isfinite().all()
    assert world.alice.backends["ffn.0"].update_count == 1


def test_the_first_call_of_a_module_waits_too(world: World, directory: ChangingDirectory) -> None:
    move(world, world.alice, 2)
    directory.on_read = lambda number: announce(directory, world.alice) if number == 2 else None
    assert within(0.0, 2.0, lambda: world.swarm.expert("ffn.0")(X)).shape == (2, 4)


def test_at_the_deadline_it_says_why_nobody_answered(world: World, directory: ChangingDirectory) -> None:
    expert = world.swarm.expert("ffn.0", forward_timeout_s=0.6)
    expert(X)
    world.alice.stop()
    for _ in range(2):  # the second one knows that the address is silent before it asks
        with pytest.raises((PeerUnreachableError, ExpertNotFoundError), match=r"cannot be reached|no live provider"):
            within(0.5, 2.0, lambda: expert(X))
    assert 4 <= directory.reads <= 16


def test_an_expert_that_was_known_and_is_announced_by_nobody_is_waited_for(
    world: World, directory: ChangingDirectory
) -> None:
    expert = world.swarm.expert("ffn.0", forward_timeout_s=0.5)
    expert(X)
    announced, directory.announced_now, directory._providers = directory.announced_now, {}, {}
    with pytest.raises(ExpertNotFoundError, match=r"no live provider of ffn\.0"):
        within(0.4, 2.0, lambda: expert(X))
    reads = directory.reads
    directory.on_read = lambda number: directory.announced_now.update(announced) if number == reads + 3 else None
    assert within(0.0, 2.0, lambda: world_expert(world)(X)).shape == (2, 4)


def world_expert(world: World) -> p2pmoe.RemoteExpert:
    expert = world.swarm.expert("ffn.0")
    expert._info = next(iter(world.swarm._infos.values()))
    return expert


def test_an_expert_of_which_nobody_has_heard_is_looked_up_once(world: World, directory: ChangingDirectory) -> None:
    with pytest.raises(ExpertNotFoundError, match=r"no live provider of ffn\.7 is known"):
        within(0.0, 1.0, lambda: world.swarm.expert("ffn.7")(X))
    assert directory.reads == 1


def test_one_that_was_announced_a_moment_ago_is_found_by_the_fresh_look(
    world: World, directory: ChangingDirectory
) -> None:
    directory._providers = {}
    assert within(0.0, 1.0, lambda: world.swarm.expert("ffn.0")(X)).shape == (2, 4)
    assert directory.reads == 1


def test_another_schema_is_told_after_one_look(directory: ChangingDirectory, world: World) -> None:
    expert = world.swarm.expert("ffn.0")
    expert(X)
    from dataclasses import replace

    other = {"ffn.0": tuple(replace(each, schema_digest="ab" * 16) for each in directory.announced_now["ffn.0"])}
    directory.announced_now, directory._providers = dict(other), dict(other)
    with pytest.raises(ExpertNotFoundError, match="another schema"):
        within(0.0, 1.0, lambda: expert(X))
    assert directory.reads == 1


def test_what_will_not_pass_is_told_at_once(world: World, directory: ChangingDirectory) -> None:
    expert = world.swarm.expert("ffn.0")
    expert(X)
    world.alice.backends["ffn.0"].forward_pool.process_function = lambda x: 1 / 0
    with pytest.raises(ExpertFailedError):
        within(0.0, 1.0, lambda: expert(X))
    assert directory.reads == 0


def test_a_provider_that_comes_back_where_it_was_is_asked_by_its_new_record(
    world: World, directory: ChangingDirectory
) -> None:
    """Not only when the address has been left out long enough."""
    expert = world.swarm.expert("ffn.0")
    right = expert(X)
    world.network.link(ALICE).cut()

    def back(number: int) -> None:
        if number == 2:
            world.network.link(ALICE).restore()
            announce(directory, world.alice)

    directory.on_read = back
    assert same_bits(within(0.0, 2.0, lambda: expert(X)), right)


def test_the_address_is_left_out_and_not_the_key() -> None:
    hosts = {name: [make_backend("ffn.0", lr=0.0)] for name in ("alice", "bob")}
    with open_world(hosts) as world:
        directory = directory_of(world)
        expert = world.swarm.expert("ffn.0")
        right = expert(X)
        world.alice.stop()
        assert expert(X).shape == (2, 4), "bob's"
        exchanges = world.network.link(ALICE).exchanges
        assert expert(X).shape == (2, 4)
        assert world.network.link(ALICE).exchanges == exchanges, "the silent address is not asked"
        move(world, world.alice, 2)
        announce(directory, world.alice)
        world.bob.stop()
        assert same_bits(within(0.0, 2.0, lambda: expert(X)), right)


def test_many_that_wait_each_find_it(world: World, directory: ChangingDirectory) -> None:
    experts = [world.swarm.expert("ffn.0") for _ in range(8)]
    right = [expert(X) for expert in experts]
    move(world, world.alice, 2)
    started = time.monotonic()

    def appear(number: int) -> None:
        if time.monotonic() - started > 0.3:
            announce(directory, world.alice)

    directory.on_read = appear
    results = run_threads([lambda expert=expert: within(0.0, 4.0, lambda: expert(X)) for expert in experts])
    assert all(same_bits(a, b) for a, b in zip(results, right, strict=True))


# -------------------------------------------------------------------------------------------------- mixtures


def grid(world: World, **options: Any) -> p2pmoe.RemoteMixtureOfExperts:
    return world.mixture(**{"grid_size": (1,), "k_best": 1, "uid_prefix": "ffn"} | options)


@pytest.mark.parametrize("reads", [1, 3])
def test_a_mixture_waits_for_its_only_expert(world: World, directory: ChangingDirectory, reads: int) -> None:
    moe = grid(world)
    right = moe(X)
    move(world, world.alice, 2)
    directory.on_read = lambda number: announce(directory, world.alice) if number >= reads else None
    assert same_bits(within(0.0, 2.5, lambda: moe(X)), right)
    assert directory.reads == reads


def test_a_mixtures_first_call_waits_too(world: World, directory: ChangingDirectory) -> None:
    move(world, world.alice, 2)
    directory.on_read = lambda number: announce(directory, world.alice) if number >= 2 else None
    assert within(0.0, 2.5, lambda: grid(world)(X)).shape == (2, 4)


def test_a_mixture_says_at_the_deadline_which_rows_are_short(world: World, directory: ChangingDirectory) -> None:
    moe = grid(world, forward_timeout_s=0.6)
    moe(X)
    world.alice.stop()
    for _ in range(2):
        with pytest.raises(ExpertsUnavailableError) as caught:
            within(0.5, 2.0, lambda: moe(X))
        assert caught.value.rows == (0, 1)
    assert world.network.link(ALICE).exchanges <= 6, "nobody is asked in vain meanwhile"


def test_a_mixture_that_may_give_zeros_waits_for_nobody(world: World, directory: ChangingDirectory) -> None:
    moe = grid(world, allow_zero_outputs=True)
    moe(X)
    world.alice.stop()
    assert same_bits(within(0.0, 1.0, lambda: moe(X)), torch.zeros(2, 4))


def test_a_mixture_tells_at_once_what_will_not_pass(world: World, directory: ChangingDirectory) -> None:
    moe = grid(world)
    moe(X)
    world.alice.backends["ffn.0"].forward_pool.process_function = lambda x: 1 / 0
    with pytest.raises(ExpertsUnavailableError, match="division by zero"):
        within(0.0, 1.0, lambda: moe(X))


def test_a_grid_that_never_had_enough_experts_says_so_at_once(world: World, directory: ChangingDirectory) -> None:
    moe = grid(world, grid_size=(4,), k_best=2, k_min=2)
    with pytest.raises(ExpertsUnavailableError, match="fewer than 2"):
        within(0.0, 1.0, lambda: moe(X))


def test_nobody_below_a_prefix_is_looked_up_once(world: World, directory: ChangingDirectory) -> None:
    with pytest.raises(ExpertNotFoundError, match=r"no expert below other\."):
        within(0.0, 1.0, lambda: grid(world, uid_prefix="other")(X))
    assert directory.reads == 1


@pytest.mark.parametrize("failure", ["refuse", "lose_answer"])
def test_the_backward_pass_of_a_mixture_follows_and_a_gradient_is_applied_once(
    world: World, directory: ChangingDirectory, failure: Any
) -> None:
    moe = grid(world)
    x = X.clone().requires_grad_()
    y = moe(x)
    link = world.network.link(ALICE)
    link.fail_at(link.exchanges + 1, failure)

    def moved(number: int) -> None:
        if number == 2:
            move(world, world.alice, 2)
            announce(directory, world.alice)

    directory.on_read = moved
    within(0.0, 2.5, lambda: y.sum().backward())
    assert x.grad.isfinite().all()
    assert world.alice.backends["ffn.0"].update_count == 1


def test_the_backward_pass_ends_at_its_deadline(world: World, directory: ChangingDirectory) -> None:
    moe = grid(world, backward_timeout_s=0.5)
    y = moe(X.clone().requires_grad_())
    world.alice.stop()
    with pytest.raises(ExpertsUnavailableError, match=r"backward: .*cannot be reached"):
        within(0.4, 2.0, lambda: y.sum().backward())


# -------------------------------------------------------------------------------------------------- patience


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (PeerUnreachableError("x"), True),
        (InsecureEndpointError("x"), False),
        (DrainingError("x"), True),
        (OverloadedError("x"), True),
        (UnknownExpertError("x"), True),
        (DeadlineError("x"), True),
        (ExpertNotFoundError("x"), False),
        (DecodeError("x"), False),
        (ExpertFailedError("x"), False),
        (BadRequestError("x"), False),
        (AccessDeniedError("x"), False),
    ],
)
def test_what_may_pass(error: P2PMoEError, passes: bool) -> None:
    assert may_pass(error) == passes


def test_pauses_grow_and_end_with_the_time() -> None:
    patience = Patience(time.monotonic() + 60.0)
    pauses = [patience.next_pause_s() for _ in range(10)]
    assert pauses[0] == 0.0, "the first look at fresh records is at once"
    for pause_s, expected_s in zip(pauses[1:], [0.1, 0.2, 0.4, 0.8, *[1.0] * 5], strict=True):
        assert 0.8 * expected_s <= pause_s <= 1.2 * expected_s
    assert (FIRST_PAUSE_S, LAST_PAUSE_S) == (0.1, 1.0)
    assert patience.next_pause_s(5.0) == 5.0
    assert patience.next_pause_s(61.0) is None
    assert Patience(time.monotonic()).next_pause_s() is None


async def test_an_attempt_that_hangs_ends_at_the_deadline_with_the_last_reason() -> None:
    asked: list[bool] = []

    async def attempt(again: bool) -> None:
        asked.append(again)
        if again:
            await asyncio.sleep(WAIT_S)
        raise PeerUnreachableError("silent")

    with pytest.raises(PeerUnreachableError, match="silent"):
        async with asyncio.timeout(WAIT_S / 2):
            await patiently(attempt, time.monotonic() + 0.3, fixed=False)
    assert asked == [False, True]
    asked.clear()
    with pytest.raises(PeerUnreachableError, match="silent"):
        await patiently(attempt, time.monotonic() + WAIT_S, fixed=True)
    assert asked == [False]
