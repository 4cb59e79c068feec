"""Rows without answers: zeros where these are allowed, and never in place of an error that tells what to mend."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swarm_kit import ALICE, World, grid_backends, make_backend, open_world
from torch import nn

import p2pmoe
from p2pmoe.errors import ExpertsUnavailableError, SchemaError
from p2pmoe.types import PeerId

D = 4


@pytest.fixture
def world() -> Iterator[World]:
    with open_world({"alice": grid_backends([0, 1])}) as world:
        yield world


def layer(world: World, kind: str, **options: Any) -> p2pmoe.RemoteMixtureOfExperts:
    if kind == "mixture":
        return world.mixture(**options)
    options = {"in_features": D, "grid_size": (2, 2), "uid_prefix": "ffn"} | options
    return p2pmoe.RemoteSwitchMixtureOfExperts(world.swarm, **options)


@pytest.mark.parametrize("kind", ["mixture", "switch"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_features": 7}, r"they take \(FP32\[batch, 4\]\); this mixture has in_features=7"),
        ({"out_features": 5}, r"they give \(FP32\[batch, 4\]\); this mixture has out_features=5"),
        ({"grid_size": (2, 2, 2)}, r"uids below ffn have 2 coordinates, 2 × 2; you asked for 2 × 2 × 2"),
        ({"grid_size": (4,)}, r"uids below ffn have 2 coordinates, 2 × 2; you asked for 4"),
        ({"schema_digest": "00"}, r"nobody below ffn has the schema 00; they have [0-9a-f]{16}"),
    ],
)
def test_what_can_never_fit_is_no_absence(world: World, kind: str, options: dict[str, Any], words: str) -> None:
    """It was zeros for ever, with a line in the log."""
    moe = layer(world, kind, allow_zero_outputs=True, **options)
    x = torch.randn(2, moe.in_features)
    for _ in range(2):
        with pytest.raises(SchemaError, match=words):
            moe(x)
    with pytest.raises(SchemaError, match=words):
        asyncio.run(moe.acall(x))


class Largest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(x).argmax(1, keepdim=True)


def test_integers_are_not_mixed_into_zeros() -> None:
    with open_world({"alice": [make_backend(f"ffn.0.{i}", Largest()) for i in range(2)]}) as world:
        moe = world.mixture(grid_size=(1, 2), allow_zero_outputs=True)
        with pytest.raises(SchemaError, match=r"they give INT64\[batch, 1\].*integers cannot take"):
            moe(torch.randn(2, D))


def test_sequences_for_experts_of_rows_are_not_mixed_into_zeros() -> None:
    longer = [make_backend("ffn.0.0", nn.Linear(D, D), args_schema=(p2pmoe.BatchTensorProto(3, D),))]
    with open_world({"alice": longer}) as world:
        moe = world.mixture(grid_size=(1, 1), k_best=1, allow_zero_outputs=True)
        with pytest.raises(SchemaError, match=r"an input of \[2, 4\] is no batch of that"):
            moe(torch.randn(2, D))


@pytest.mark.parametrize("kind", ["mixture", "switch"])
def test_a_node_that_died_before_the_first_call_leaves_zeros(
    world: World, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its records are still there, and nobody answers what its experts take."""
    assert world.alice.link is not None
    world.alice.link.cut()
    x = torch.randn(2, D, requires_grad=True)
    moe = layer(world, kind, allow_zero_outputs=True)
    with caplog.at_level(logging.WARNING, "p2pmoe"):
        y = moe(x)
    (y if kind == "mixture" else y[0]).sum().backward()
    assert not (y if kind == "mixture" else y[0]).any()
    assert torch.equal(x.grad, torch.zeros(2, D))
    assert caplog.text.count("rows are zeros until that changes") == 1
    world.alice.link.restore()
    world.swarm.trust.pardon(PeerId("alice"))
    y = moe(x)
    assert (y if kind == "mixture" else y[0]).all()


def test_zeros_in_place_of_answers_are_said_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    moe = world.mixture(allow_zero_outputs=True)
    x = torch.randn(2, D)
    assert moe(x).all()
    world.network.link(ALICE).cut()
    with caplog.at_level(logging.WARNING, "p2pmoe.client.grid_finder"):
        assert not moe(x).any()
        assert not moe(x).any()
    assert [record.getMessage() for record in caplog.records] == [
        "ffn: 2 of 2 rows are zeros: http://alice:1 cannot be reached: the link is down"
    ]


# ------------------------------------------------------------------------------------- scores that are none


def spoil(moe: p2pmoe.RemoteMixtureOfExperts, place: str, bad: float) -> torch.Tensor:
    """An input of four rows; its scores are spoilt in row 1 ("input") or in all ("gate")."""
    x = torch.rand(4, D)
    if place == "input":
        x[1, 2] = bad
    else:
        with torch.no_grad():
            moe.gate.proj.bias[0] = bad
    return x


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["input", "gate"])
@pytest.mark.parametrize("k_best", [1, 2, 4])
def test_scores_that_are_no_numbers_are_said_at_once(world: World, place: str, bad: float, k_best: int) -> None:
    """It waited for the whole time-out and said that too few experts are alive; infinity made NaN."""
    moe = world.mixture(k_best=k_best, forward_timeout_s=30.0)
    moe(torch.rand(4, D))
    x = spoil(moe, place, bad)
    exchanges, started = world.swarm.dispatcher.exchanges, time.monotonic()
    with pytest.raises(
        ExpertsUnavailableError, match=r"scores are NaN or infinite.* input or the gate's par"
    ) as caught:
        moe(x)
    assert time.monotonic() - started < 5
    assert caught.value.rows == ((1,) if place == "input" else (0, 1, 2, 3))
    assert world.swarm.dispatcher.exchanges == exchanges


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["input", "gate"])
def test_rows_without_scores_are_zeros_where_these_are_allowed(
    world: World, place: str, bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    moe = world.mixture(allow_zero_outputs=True)
    x = spoil(moe, place, bad)
    lost = torch.tensor([place == "gate" or row == 1 for row in range(4)])
    with caplog.at_level(logging.WARNING, "p2pmoe"):
        y = moe(x)
    assert torch.equal(y[lost], torch.zeros(int(lost.sum()), D))
    assert y[~lost].isfinite().all()
    assert y[~lost].any(1).all()
    assert f"{int(lost.sum())} of 4 rows are zeros: the gate's scores are NaN or infinite" in caplog.text


def test_experts_that_a_gate_rules_out_are_never_asked(world: World) -> None:
    """Minus infinity is how people mask."""
    moe = world.mixture(k_best=2)
    with torch.no_grad():
        moe.gate.proj.bias[0] = -math.inf
    moe(torch.rand(4, D)).sum().backward()
    assert {uid: each.update_count for uid, each in world.alice.backends.items()} == {
        "ffn.0.0": 0,
        "ffn.0.1": 0,
        "ffn.1.0": 1,
        "ffn.1.1": 1,
    }
