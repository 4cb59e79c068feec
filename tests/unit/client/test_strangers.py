"""A stranger decides nothing: which schema is used where several are announced, and what that costs."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from swarm_kit import World, grid_backends, make_backend, open_world
from torch import nn

import p2pmoe
from p2pmoe.cli.train import alive_counter
from p2pmoe.client import grid_finder
from p2pmoe.client.acquaintance import Acquaintance
from p2pmoe.client.offers import read_offers
from p2pmoe.errors import ExpertNotFoundError, ExpertsUnavailableError, SchemaError
from p2pmoe.experts.directory import Provider
from p2pmoe.experts.offers import FULL_AGE_S, Offer, network_of, weigh_schemas
from p2pmoe.experts.uid import parse_uid
from p2pmoe.types import Endpoint, PeerId

D = 4
GRID = [f"ffn.{row}.{column}" for row, column in itertools.product(range(2), range(2))]
ALICE, BOB = "10.0.1.1", "10.0.2.1"  # names that are addresses: each in a network of its own


def wide(uid: str) -> p2pmoe.ExpertBackend:
    return make_backend(uid, nn.Linear(9, 9), args_schema=(p2pmoe.BatchTensorProto(9),))


def same_input(uid: str) -> p2pmoe.ExpertBackend:
    """Another schema that nobody can tell from ours by the width it takes."""
    return make_backend(uid, nn.Linear(D, 8))


def honest() -> dict[str, list[p2pmoe.ExpertBackend]]:
    return {ALICE: grid_backends([0]), BOB: grid_backends([1])}


def updates(world: World, *peers: str) -> int:
    return sum(each.update_count for peer in peers for each in world.peers[peer].backends.values())


def train_once(moe: p2pmoe.RemoteMixtureOfExperts) -> torch.Tensor:
    y: torch.Tensor = moe(torch.randn(6, D, requires_grad=True))
    y.sum().backward()
    return y


def ghosts(names: Iterable[str], digest: str) -> list[Provider]:
    """Records of nodes that are not there."""
    return [Provider(PeerId(name), Endpoint(name, 1), digest, math.inf, 2**60) for name in names]


# ------------------------------------------------------------------------------------------------ mixtures


@pytest.mark.parametrize("stranger", ["0.first.by.name", "zzz.last.by.name"])
@pytest.mark.parametrize("make", [wide, same_input])
def test_a_stranger_under_the_first_uid_is_ignored_with_one_line(
    stranger: str, make: object, caplog: pytest.LogCaptureFixture
) -> None:
    with open_world({**honest(), stranger: [make("ffn.0.0")]}) as world:  # type: ignore[operator]
        for _ in range(5):  # which provider is asked first is drawn by lot
            moe = world.mixture(k_best=4)
            assert train_once(moe).shape == (6, D)
        assert updates(world, stranger) == 0
        assert updates(world, ALICE, BOB) == 5 * 4
    (line,) = caplog.messages
    assert line.startswith("below ffn: 1 of 5 records are of another schema than (FP32[batch, 4]) -> (FP32[batch, 4])")
    assert f"ffn.0.0 of peer {stranger}" in line


def test_a_burst_of_keys_from_one_machine_is_one_voice() -> None:
    burst = {f"10.9.9.{number}": [same_input(uid) for uid in GRID] for number in range(12)}
    with open_world({**burst, **honest()}) as world:
        moe = world.mixture(k_best=4)
        assert train_once(moe).shape == (6, D)
        assert updates(world, *burst) == 0


def test_records_that_name_networks_without_anybody_there_count_nothing() -> None:
    with open_world({**honest(), "10.9.9.9": [same_input(uid) for uid in GRID]}) as world:
        digest = world.peers["10.9.9.9"].backends["ffn.0.0"].schema_digest
        for uid, ghost in itertools.product(GRID, ghosts((f"172.16.{n}.1" for n in range(60)), digest)):
            world.directory.announce(uid, ghost)
        started = time.monotonic()
        assert train_once(world.mixture(k_best=4)).shape == (6, D)
        assert time.monotonic() - started < 5.0
        assert updates(world, "10.9.9.9") == 0


def test_the_callers_width_wins_over_the_majority() -> None:
    hosts = {
        "10.1.0.1": [wide(uid) for uid in GRID],
        "10.2.0.1": [wide(uid) for uid in GRID],
        "carol": [make_backend("ffn.0.1")],
    }
    with open_world(hosts) as world:
        assert train_once(world.mixture(k_best=1)).shape == (6, D)
        assert updates(world, "carol") == 1


@pytest.mark.parametrize("option", ["out_features", "schema_digest"])
def test_what_the_caller_says_wins(option: str) -> None:
    with open_world({**honest(), "carol": [same_input("ffn.0.0")]}) as world:
        says = {"out_features": 8, "schema_digest": world.carol.backends["ffn.0.0"].schema_digest}[option]
        assert train_once(world.mixture(k_best=1, **{option: says})).shape == (6, 8)
        with pytest.raises(SchemaError, match=r"nobody below ffn has the schema 00; they have [0-9a-f]{16}, [0-9a-f]"):
            world.mixture(schema_digest="00")(torch.randn(2, D))


def test_nothing_fits_is_said_at_once_with_both_values() -> None:
    with open_world(honest()) as world:
        message = r"experts below ffn: they take \(FP32\[batch, 4\]\); this mixture has in_features=7"
        with pytest.raises(SchemaError, match=message):
            world.mixture(in_features=7)(torch.randn(2, 7))
        with pytest.raises(SchemaError, match=message):
            world.mixture(in_features=7).check()
        with pytest.raises(SchemaError, match=r"they give \(FP32\[batch, 4\]\); this mixture has out_features=5"):
            world.mixture(out_features=5).check()
        world.mixture().check()


def test_experts_of_sequences_are_ignored_for_rows_and_the_other_way_round() -> None:
    sequences = [make_backend(uid, args_schema=(p2pmoe.BatchTensorProto(3, D),)) for uid in GRID]
    with open_world({ALICE: sequences, BOB: [make_backend("ffn.1.1")]}) as world:
        assert train_once(world.mixture(k_best=1)).shape == (6, D)
        assert updates(world, BOB) == 1
        assert world.mixture(k_best=1)(torch.randn(2, 3, D)).shape == (2, 3, D)
        world.directory.withdraw(PeerId(BOB))
        with pytest.raises(SchemaError, match=r"they take \(FP32\[batch, 3, 4\]\); an input of \[2, 4\] is no batch"):
            world.mixture()(torch.randn(2, D))


def test_a_mixture_at_work_is_not_turned_by_a_later_majority() -> None:
    with open_world(honest()) as world:
        moe = world.mixture(k_best=4)
        train_once(moe)
        digest = moe.schema_digest
        for uid, ghost in itertools.product(GRID, ghosts((f"172.16.{n}.1" for n in range(60)), "ab" * 8)):
            world.directory.announce(uid, ghost)
        for _ in range(3):
            train_once(moe)
        assert moe.schema_digest == digest
        assert updates(world, ALICE, BOB) == 4 * 4


def test_a_swarm_that_changes_its_schema_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    with open_world({"alice": [make_backend(uid) for uid in GRID], "bob": [same_input(uid) for uid in GRID]}) as world:
        world.directory.withdraw(PeerId("bob"))
        moe = world.mixture(k_best=2)
        assert train_once(moe).shape == (6, D)
        world.directory.withdraw(PeerId("alice"))
        for uid, backend in world.bob.backends.items():
            world.directory.announce(uid, Provider(PeerId("bob"), world.bob.endpoint, backend.schema_digest, 1e12, 1))
        assert train_once(moe).shape == (6, 8)
        assert caplog.messages == [
            "experts below ffn. are no longer (FP32[batch, 4]) -> (FP32[batch, 4]) but "
            "(FP32[batch, 4]) -> (FP32[batch, 8]); going on with these"
        ]


def test_a_swarm_that_changes_to_what_does_not_fit_is_said_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grid_finder, "LOOK_AGAIN_S", 0.0)
    with open_world({"alice": grid_backends(), "bob": [wide("ffn.0.0")]}) as world:
        moe = world.mixture()
        train_once(moe)
        world.directory.withdraw(PeerId("alice"))
        with pytest.raises(ExpertsUnavailableError):
            moe(torch.randn(2, D))
        assert "they take (FP32[batch, 9]); this mixture has in_features=4" in caplog.messages[-1]


def test_prefixes_with_nothing_below_keep_no_row_from_the_rest() -> None:
    """Anybody may announce ffn.1. to ffn.15. and nothing below, or experts of another kind."""
    with open_world(
        {"alice": [make_backend("ffn.0.0")], "bob": [wide(f"ffn.{row}.0") for row in range(1, 16)]}
    ) as world:
        moe = world.mixture(grid_size=(16, 2), k_best=1, beam_size=4)
        with torch.no_grad():
            moe.gate.proj.weight.zero_()
            moe.gate.proj.bias.copy_(torch.arange(18.0))  # the gate likes alice's row least
        assert train_once(moe).shape == (6, D)
        assert updates(world, "alice") == 1


# ------------------------------------------------------------------------------------------- single experts


def test_an_experts_neighbours_say_which_schema_is_meant() -> None:
    strangers = {f"10.9.{number}.1": [same_input("ffn.0.0")] for number in range(3)}
    with open_world({**strangers, **honest()}) as world:
        assert world.swarm.expert("ffn.0.0")(torch.randn(2, D)).shape == (2, D)
        digest = world.peers["10.9.0.1"].backends["ffn.0.0"].schema_digest
        assert world.swarm.expert("ffn.0.0", schema_digest=digest)(torch.randn(2, D)).shape == (2, 8)
        with pytest.raises(SchemaError, match=r"ffn.0.1 is not served with the schema"):
            world.swarm.expert("ffn.0.1", schema_digest=digest)(torch.randn(2, D))
        with pytest.raises(ExpertNotFoundError):
            world.swarm.expert("ffn.7.7")(torch.randn(2, D))


def test_a_twin_that_turns_up_later_draws_no_calls_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name would stand before alice's; without a look at who was there first it would get every call."""
    with open_world({"alice": [make_backend("ffn.0")], "aaa": [make_backend("ffn.0")]}) as world:
        twin = world.directory.cached_prefix("ffn.")[0][1]  # type: ignore[index]
        assert twin.peer_id == "aaa"
        world.directory.withdraw(PeerId("aaa"))
        expert, moe = world.swarm.expert("ffn.0"), world.mixture(grid_size=(1,), k_best=1)
        now = time.monotonic()
        for each in (expert, moe):
            each(torch.randn(2, D)).sum().backward()
        monkeypatch.setattr(world.swarm.trust.acquaintance, "_clock", lambda: now + 60.0)
        world.directory.withdraw(PeerId("alice"))
        world.directory.announce("ffn.0", twin)
        world.directory.announce("ffn.0", Provider(PeerId("alice"), world.alice.endpoint, twin.schema_digest, 1e12, 1))
        for each in (expert, moe):
            each(torch.randn(2, D)).sum().backward()
        assert (updates(world, "alice"), updates(world, "aaa")) == (4, 0)


# ------------------------------------------------------------------------------------------------- weighing


def offer(uid: str, host: str, digest: str, key: str | None = None) -> Offer:
    return Offer(parse_uid(uid), Provider(PeerId(key or host), Endpoint(host, 1), digest, math.inf, 1))


def first(offers: list[Offer], ages: dict[str, float] | None = None) -> str:
    return weigh_schemas(offers, lambda peer_id: (ages or {}).get(peer_id, 0.0))[0].schema_digest


def test_weights() -> None:
    ours = [offer(f"ffn.{n}", f"10.0.{n % 2}.1", "aa") for n in range(8)]
    assert weigh_schemas(ours, lambda _: 0.0)[0].weight == 8 * 2
    many_keys = [offer(f"ffn.{n}", "10.9.9.9", "bb", f"key{n}") for n in range(15)]
    assert first(ours + many_keys) == "aa"
    assert first(ours + many_keys + [offer("ffn.0", "10.8.0.1", "bb")]) == "bb", "two networks, 15 uids"
    assert first(ours + many_keys + [offer("ffn.0", "10.8.0.1", "bb")], {"10.0.0.1": FULL_AGE_S}) == "aa", "known long"
    tie = [offer("ffn.0", "10.0.0.1", "cc"), offer("ffn.1", "10.1.0.1", "aa")]
    assert first(tie) == first(tie[::-1]) == "aa"


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.1.2.3", "10.1.2.0/24"),
        ("::ffff:10.1.2.3", "10.1.2.0/24"),
        ("2001:db8:1:2::3", "2001:db8:1::/48"),
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("fe80::1%eth0", "fe80::/48"),
        ("a.b.Example.org.", "example.org"),
        ("alice", "alice"),
        ("", ""),
    ],
)
def test_networks(host: str, network: str) -> None:
    assert network_of(host) == network


def test_acquaintance() -> None:
    now = 100.0
    known = Acquaintance(lambda: now)
    alice, bob, carol = (Provider(PeerId(name), Endpoint(name, 1), "aa", 1e12, 1) for name in ("alice", "bob", "carol"))
    assert known.order((carol,)) == (carol,)
    now += 5.0
    assert known.order((alice, carol)) == (alice, carol), "both were there from the beginning"
    now += 60.0
    assert known.order((bob, alice, carol)) == (alice, carol, bob)
    assert (known.seen_for_s(carol.peer_id), known.seen_for_s(bob.peer_id)) == (65.0, 0.0)
    assert known.seen_for_s(PeerId("dave")) == 0.0


# ----------------------------------------------------------------------------------------- grids and prefixes


def test_a_grid_that_is_not_the_swarms_is_refused_at_the_first_call_and_by_check() -> None:
    served = [make_backend(f"ffn.{row}.{column}") for row, column in itertools.product(range(4), range(4))]
    with open_world({"alice": served}) as world:
        expected = "uids below ffn have 2 coordinates, 4 × 4; you asked for {}; ask for the swarm's grid"
        for grid, words in (((2, 2), "2 × 2"), ((4,), "4"), ((4, 4, 4), "4 × 4 × 4")):
            moe = world.mixture(grid_size=grid, k_best=1)
            for call in (moe.check, lambda moe=moe: moe(torch.randn(2, D))):
                with pytest.raises(SchemaError, match=expected.format(words)):
                    call()
        switch = p2pmoe.RemoteSwitchMixtureOfExperts(world.swarm, in_features=D, grid_size=(2, 2), uid_prefix="ffn")
        with pytest.raises(SchemaError, match=expected.format("2 × 2")):
            switch(torch.randn(2, D))
        assert world.mixture(grid_size=(2, 2), partial_grid=True)(torch.randn(2, D)).shape == (2, D)
        assert world.mixture(grid_size=(9, 9))(torch.randn(2, D)).shape == (2, D), "cells may be vacant"
        message = r"no expert below fnn\. is alive in grid 4 × 4; there are experts below ffn; run `p2pmoe lookup"
        with pytest.raises(ExpertNotFoundError, match=message):
            world.mixture(grid_size=(4, 4), uid_prefix="fnn").check()
        assert updates(world, "alice") == 0


def test_more_experts_a_row_than_the_grid_has_are_refused_when_the_mixture_is_made() -> None:
    with (
        open_world({}) as world,
        pytest.raises(SchemaError, match="k_best=5 is more than the 4 experts of a grid of 2 × 2"),
    ):
        world.mixture(k_best=5)


def test_what_is_read_to_find_the_schema_is_bounded() -> None:
    """A stranger that announces thousands of prefixes costs nobody thousands of reads."""
    with open_world({"alice": grid_backends()}) as world:
        for number in range(3000):
            world.directory.announce(f"ffn.{number}.0.0.{number}", ghosts(["mallory"], "ab" * 8)[0])
        asked: list[int] = []
        get_prefixes = world.directory.get_prefixes

        async def counting(prefixes: list[str]) -> object:
            asked.append(len(prefixes))
            return await get_prefixes(prefixes)

        world.directory.get_prefixes = counting  # type: ignore[assignment,method-assign]
        world.mixture().check()
        assert asked[0] == 1
        assert max(asked) <= 64
        assert len(asked) <= 4


def test_what_is_counted_while_training_is_the_callers_grid() -> None:
    with open_world({"alice": grid_backends()}) as world:
        for number in range(3000):
            world.directory.announce(f"ffn.{number}.{number + 2}.0", ghosts(["mallory"], "ab" * 8)[0])
        assert alive_counter(world.swarm, "ffn", (2, 2))() == 4
        read = world.swarm.run(read_offers(world.directory, "ffn", 5.0, within=(2, 2)))
        assert sorted(str(each.uid) for each in read) == GRID


def test_of_two_that_are_equally_known_everybody_asks_the_same_one() -> None:
    with open_world({"alice": [make_backend("ffn.0")], "bob": [make_backend("ffn.0")]}) as world:
        for newest in ("alice", "bob"):
            announced = [
                replace(each, sequence=2 if each.peer_id == newest else 1)
                for each in world.directory.cached_prefix("ffn.")[0]  # type: ignore[index]
            ]
            world.directory.withdraw(PeerId("alice"))
            world.directory.withdraw(PeerId("bob"))
            for each in sorted(announced, key=lambda each: -each.sequence):
                world.directory.announce("ffn.0", each)
            found = world.swarm.run(world.swarm.find_providers("ffn.0"))
            assert [each.peer_id for each in found] == ["alice", "bob"]
