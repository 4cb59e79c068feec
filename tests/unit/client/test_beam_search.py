"""Beam search, gating and routing, against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.client.beam_search import BeamSearch, Found, MaskCache
from p2pmoe.client.gating import ProductKeyGating, masked_softmax
from p2pmoe.client.routing import route
from p2pmoe.errors import SchemaError
from p2pmoe.experts.directory import Provider
from p2pmoe.types import Endpoint, PeerId

Cell = tuple[int, ...]
SOMEBODY = (Provider(PeerId("alice"), Endpoint("alice", 1), "digest", math.inf, 1),)


def children_of(alive: Collection[Cell], prefix: str) -> dict[int, Any]:
    coordinates = tuple(int(part) for part in prefix.split(".")[1:-1])
    depth = len(coordinates)
    return {cell[depth]: SOMEBODY for cell in sorted(alive) if cell[:depth] == coordinates}


def search(
    scores: Sequence[torch.Tensor], alive: Collection[Cell], beam: int, k: int, masks: MaskCache | None = None
) -> tuple[Found, list[list[str]]]:
    asked = []
    beams = BeamSearch(scores, "ffn", beam, masks or MaskCache())
    while wanted := beams.wanted():
        asked.append(list(wanted))
        beams.advance({prefix: children_of(alive, prefix) for prefix in wanted})
    return beams.found(k), asked


def total(scores: Sequence[torch.Tensor], row: int, cell: Cell) -> float:
    return sum(float(score[row, coordinate]) for score, coordinate in zip(scores, cell, strict=True))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[torch.Tensor], set[Cell], int]:
    grid = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rows = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    # Small integers: sums are exact, and ties happen.
    scores = [torch.randint(-9, 10, (rows, size), generator=generator).float() for size in grid]
    cells = list(itertools.product(*map(range, grid)))
    alive = set(cells) if draw(st.booleans()) else draw(st.sets(st.sampled_from(cells)))
    return scores, alive, draw(st.integers(1, 6))


def check(scores: list[torch.Tensor], alive: set[Cell], found: Found, k: int) -> None:
    for row in range(len(scores[0])):
        best = sorted((total(scores, row, cell) for cell in alive), reverse=True)[:k]
        cells = [
            tuple(c) for c, ok in zip(found.coordinates[row].tolist(), found.valid[row].tolist(), strict=True) if ok
        ]
        assert set(cells) <= alive, "never an expert that is not there"
        assert len(set(cells)) == len(cells)
        assert [total(scores, row, cell) for cell in cells] == best
        valid = found.valid[row].tolist()
        assert valid == sorted(valid, reverse=True), "best first, the missing last"


@settings(max_examples=200)
@given(problems())
def test_a_beam_as_wide_as_the_grid_finds_the_best_of_whoever_is_alive(
    problem: tuple[list[torch.Tensor], set[Cell], int],
) -> None:
    scores, alive, k = problem
    found, _ = search(scores, alive, math.prod(score.shape[1] for score in scores), k)
    check(scores, alive, found, k)


@settings(max_examples=200)
@given(problems())
def test_on_a_full_grid_a_beam_of_k_is_exact(problem: tuple[list[torch.Tensor], set[Cell], int]) -> None:
    scores, _, k = problem
    alive = set(itertools.product(*(range(score.shape[1]) for score in scores)))
    found, asked = search(scores, alive, k, k)
    check(scores, alive, found, k)
    rows = len(scores[0])
    assert all(len(set(level)) == len(level) <= rows * k for level in asked), "distinct prefixes, bounded by the beam"


@settings(max_examples=200)
@given(problems(), st.integers(1, 4))
def test_a_narrow_beam_never_invents_experts(problem: tuple[list[torch.Tensor], set[Cell], int], beam: int) -> None:
    scores, alive, k = problem
    found, _ = search(scores, alive, beam, k)
    for row in range(len(scores[0])):
        coordinates, valid = found.coordinates[row].tolist(), found.valid[row].tolist()
        chosen = [tuple(cell) for cell, ok in zip(coordinates, valid, strict=True) if ok]
        assert set(chosen) <= alive
        totals = [total(scores, row, cell) for cell in chosen]
        assert totals == sorted(totals, reverse=True)


def test_a_search_asks_level_by_level() -> None:
    scores = [torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.0, 9.0]]), torch.tensor([[1.0, 0.0]])]
    alive = {(0, 0, 1), (0, 1, 0), (2, 1, 1)}
    found, asked = search(scores, alive, 2, 2)
    assert asked[0] == ["ffn."]
    assert set(asked[1]) == {"ffn.0.", "ffn.2."}
    assert set(asked[2]) == {"ffn.0.1.", "ffn.2.1."}
    assert found.coordinates[0].tolist() == [[0, 1, 0], [2, 1, 1]]
    assert found.providers("ffn", (0, 1, 0)) == SOMEBODY
    assert found.providers("ffn", (9, 9, 9)) == ()


def test_nobody_is_alive() -> None:
    found, _ = search([torch.zeros(2, 3), torch.zeros(2, 3)], set(), 4, 2)
    assert not found.valid.any()


def test_masks_are_rebuilt_when_the_directory_says_something_new() -> None:
    masks = MaskCache(limit=2)
    scores = [torch.zeros(1, 3)]
    first = {0: SOMEBODY}
    assert masks.mask("ffn.", first, 3).tolist() == [True, False, False]
    assert masks.mask("ffn.", first, 3) is masks.mask("ffn.", first, 3)
    assert masks.mask("ffn.", {1: SOMEBODY, 7: SOMEBODY}, 3).tolist() == [False, True, False]
    for index in range(9):
        masks.mask(f"other{index}.", {}, 3)
    assert len(masks._masks) <= 2
    assert search(scores, {(2,)}, 1, 1, masks)[0].coordinates.tolist() == [[[2]]]


# -------------------------------------------------------------------------------------------------- gating


@given(problems())
def test_an_experts_score_is_the_sum_over_dimensions(problem: tuple[list[torch.Tensor], set[Cell], int]) -> None:
    scores, _, _ = problem
    cells = list(itertools.product(*(range(score.shape[1]) for score in scores)))
    coordinates = torch.tensor(cells).expand(len(scores[0]), -1, -1)
    sums = ProductKeyGating.score(scores, coordinates)
    for row in range(len(scores[0])):
        assert sums[row].tolist() == [total(scores, row, cell) for cell in cells]


@pytest.mark.parametrize("grid", [(), (1, 2, 3, 4, 5), (0,), (3, -1)])
def test_a_grid_has_one_to_four_dimensions(grid: Cell) -> None:
    with pytest.raises(SchemaError, match="grid_size"):
        ProductKeyGating(4, grid)


def test_gating_splits_one_linear_layer() -> None:
    gate = ProductKeyGating(4, (2, 3))
    x = torch.randn(5, 4)
    first, second = gate(x)
    assert torch.equal(torch.cat([first, second], 1), gate.proj(x))


@given(
    st.lists(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.data(),
)
def test_masked_softmax_is_a_softmax_over_those_that_answered(rows: list[list[float]], data: st.DataObject) -> None:
    scores = torch.tensor(rows, requires_grad=True)
    alive = torch.tensor([data.draw(st.lists(st.booleans(), min_size=3, max_size=3)) for _ in rows])
    weights = masked_softmax(scores, alive)
    assert weights.isfinite().all()
    assert (weights[~alive] == 0).all()
    for row in range(len(rows)):
        if alive[row].any():
            torch.testing.assert_close(weights[row][alive[row]], torch.softmax(scores[row][alive[row]], 0))
    (gradient,) = torch.autograd.grad(weights.square().sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[~alive] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masked_softmax_in_other_precisions(dtype: torch.dtype) -> None:
    scores = torch.tensor([[-6e4, 6e4, 0.0], [1.0, 2.0, 3.0]], dtype=dtype)
    weights = masked_softmax(scores, torch.tensor([[True, False, False], [False, False, False]]))
    assert weights.dtype is dtype
    assert weights.tolist() == [[1, 0, 0], [0, 0, 0]]


# ------------------------------------------------------------------------------------------------- routing


def pairs(coordinates: torch.Tensor, valid: torch.Tensor) -> Iterator[tuple[Cell, int, int]]:
    for row, slot in valid.nonzero().tolist():
        yield tuple(coordinates[row, slot].tolist()), row, slot


@given(problems(), st.data())
def test_rows_are_grouped_by_expert(problem: tuple[list[torch.Tensor], set[Cell], int], data: st.DataObject) -> None:
    scores, _, k = problem
    grid = tuple(score.shape[1] for score in scores)
    rows = data.draw(st.integers(0, 5))
    drawn = [[[data.draw(st.integers(0, size - 1)) for size in grid] for _ in range(k)] for _ in range(rows)]
    coordinates = torch.tensor(drawn, dtype=torch.int64).reshape(rows, k, len(grid))
    valid = torch.rand(rows, k) < 0.7
    routing = route(coordinates, valid, grid)
    assert routing.experts == sorted(set(routing.experts))
    seen: list[tuple[Cell, int, int]] = []
    for cell, (start, end) in zip(routing.experts, routing.bounds, strict=True):
        assert start < end
        ranks = list(zip(routing.rows_P[start:end].tolist(), routing.slots_P[start:end].tolist(), strict=True))
        assert ranks == sorted(ranks), "rows stay in their order"
        seen += [(cell, row, slot) for row, slot in ranks]
    assert sorted(seen) == sorted(pairs(coordinates, valid))
    assert len(routing) == len(routing.experts)


def test_children_may_be_any_mapping() -> None:
    children: Mapping[int, Any] = {}
    beams = BeamSearch([torch.zeros(1, 2)], "ffn", 1, MaskCache())
    beams.advance({"ffn.": children})
    assert beams.wanted() == []
    assert "level 1 of 1" in repr(beams)
