"""Which grid the records of a name are from, and when a caller's grid is not that one."""

from __future__ import annotations

import itertools
import math

import pytest

from p2pmoe.experts.directory import Provider
from p2pmoe.experts.offers import Offer, view_grid, why_not_this_grid
from p2pmoe.experts.uid import ExpertUid
from p2pmoe.types import Endpoint, PeerId


def offer(coordinates: tuple[int, ...], key: str = "alice") -> Offer:
    provider = Provider(PeerId(key), Endpoint("127.0.0.1", 1), "aa", math.inf, 1)
    return Offer(ExpertUid("ffn", coordinates), provider)


def grid(*sizes: int, nodes: int = 1) -> list[Offer]:
    """Every cell, in runs of neighbours over some nodes."""
    cells = list(itertools.product(*map(range, sizes)))
    return [offer(cell, f"node{index * nodes // len(cells)}") for index, cell in enumerate(cells)]


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("served", "asked", "reason"),
    [
        ((8, 8), (4, 4), "uids below ffn have 2 coordinates, 8 × 8; you asked for 4 × 4"),
        ((8, 8), (8,), "uids below ffn have 2 coordinates, 8 × 8; you asked for 8"),
        ((8, 8), (8, 8, 8), "uids below ffn have 2 coordinates, 8 × 8; you asked for 8 × 8 × 8"),
        ((8,), (8, 8), "uids below ffn have 1 coordinate, 8; you asked for 8 × 8"),
        ((2, 2, 2, 2), (16,), "uids below ffn have 4 coordinates, 2 × 2 × 2 × 2; you asked for 16"),
        ((4, 4), (2, 2), "uids below ffn have 2 coordinates, 4 × 4; you asked for 2 × 2"),
        ((8, 2), (2, 8), "uids below ffn have 2 coordinates, 8 × 2; you asked for 2 × 8"),
        ((8, 8), (8, 8), None),
        ((4, 4), (8, 8), None),
        ((4, 4), (64, 64), None),
    ],
)
def test_the_callers_grid(served: tuple[int, ...], asked: tuple[int, ...], reason: str | None, nodes: int) -> None:
    assert why_not_this_grid("ffn", grid(*served, nodes=nodes), asked) == reason


def test_nothing_is_known_of_an_empty_swarm() -> None:
    assert why_not_this_grid("ffn", [], (4, 4)) is None
    assert str(view_grid("ffn", [])) == "there are no uids below ffn"


def test_a_part_may_be_meant_but_not_a_part_that_is_not_there() -> None:
    assert why_not_this_grid("ffn", grid(8, 8), (4, 4), partial=True) is None
    assert why_not_this_grid("ffn", grid(8, 8), (8,), partial=True) is not None


def test_cells_outside_alone_are_enough() -> None:
    offers = [offer((row, column)) for row in range(4, 8) for column in range(8)]
    expected = "uids below ffn have 2 coordinates, 8 × 8; you asked for 4 × 4"
    assert why_not_this_grid("ffn", offers, (4, 4)) == expected
    assert why_not_this_grid("ffn", offers, (4, 4), partial=True) == expected


@pytest.mark.parametrize(
    "stranger",
    [
        [(9, 9)],
        [(row, column) for row in range(100) for column in range(4, 14)],
        [(number,) for number in range(400)],
        [(0, 0, number) for number in range(400)],
    ],
)
def test_a_stranger_with_any_number_of_cells_elsewhere_locks_nobody_out(stranger: list[tuple[int, ...]]) -> None:
    offers = grid(4, 4, nodes=3) + [offer(cell, "mallory") for cell in stranger]
    assert why_not_this_grid("ffn", offers, (4, 4)) is None
    assert why_not_this_grid("ffn", offers, (2, 2)) is not None
    assert why_not_this_grid("ffn", offers, (4,)) is not None
