"""The pure parts of the gate: finiteness, norms, splitting, and an estimate that no minority can move."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.server.gate import (
    NormGate,
    count_non_finite,
    exact_norm,
    is_finite,
    magnitude,
    norm_of,
    quick_norm,
    split_by_magnitude,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_wherever_it_is(dtype: torch.dtype, size: int, bad: float) -> None:
    tensor = torch.ones(size, dtype=dtype)
    assert is_finite(tensor)
    assert count_non_finite(tensor) == 0
    for index in {0, size // 2, size - 1}:
        spoilt = tensor.clone()
        spoilt[index] = bad
        assert not is_finite(spoilt)
        assert norm_of(spoilt) == math.inf
        assert count_non_finite(spoilt) == 1


@pytest.mark.parametrize("dtype", FLOATS[:4])
def test_the_largest_values_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    tensor = torch.full((70_000,), largest, dtype=dtype)
    assert is_finite(tensor)
    assert dtype is torch.float64 or norm_of(tensor) == pytest.approx(largest * math.sqrt(70_000), rel=1e-2)
    assert not math.isfinite(quick_norm(tensor)) or dtype is torch.float16


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_always_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.ones(3, dtype=dtype))
    assert magnitude([torch.full((3,), 9).to(dtype)]) == 1.0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty_tensors_are_finite(shape: tuple[int, ...]) -> None:
    assert is_finite(torch.empty(shape))
    assert norm_of(torch.empty(shape)) == exact_norm(torch.empty(shape)) == 0.0
    assert magnitude([torch.empty(shape)]) == 1.0


def test_opposite_infinities_do_not_cancel() -> None:
    assert not is_finite(torch.tensor([math.inf, -math.inf]))


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=40), st.sampled_from(FLOATS[:4]))
def test_finiteness_is_that_of_every_value(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    expected = bool(torch.isfinite(tensor).all())
    assert is_finite(tensor) == expected
    assert math.isfinite(norm_of(tensor)) == expected
    if expected:
        reference = math.hypot(*tensor.double().tolist())
        assert norm_of(tensor) == pytest.approx(reference, rel=1e-2 if dtype is torch.bfloat16 else 1e-4, abs=1e-18)
    strided = tensor.repeat(2, 1).t()
    assert is_finite(strided) == expected


@given(st.lists(st.floats(min_value=1.0) | st.just(math.nan), min_size=2, max_size=50))
def test_a_split_leaves_nothing_out_and_neither_part_empty(magnitudes: list[float]) -> None:
    mild, extreme = split_by_magnitude(magnitudes)
    assert sorted(mild + extreme) == list(range(len(magnitudes)))
    assert mild == sorted(mild)
    assert extreme == sorted(extreme)
    assert mild
    assert extreme


def test_an_extreme_call_is_alone_at_once() -> None:
    assert split_by_magnitude([1.0, 5.0, 1e30, 2.0]) == ([0, 1, 3], [2])


# ------------------------------------------------------------------------------------------- the norm gate


def warmed(scale: float = 1.0, *, factor: float = 100.0, calls: int = 16) -> NormGate:
    gate = NormGate(factor=factor, warmup_calls=calls)
    for _ in range(calls):
        assert gate.admits(scale)
    return gate


def honest(rng: random.Random, scale: float = 1.0) -> float:
    return scale * math.exp(rng.gauss(0.0, 1.0))


def test_nothing_is_refused_before_enough_was_seen() -> None:
    gate = NormGate(factor=10.0, warmup_calls=5)
    assert all(gate.admits(norm) for norm in (1.0, 1e30, 1.0, 0.0, 1e-30))
    assert gate.limit == math.inf
    assert "4 of 5" in repr(gate)
    assert gate.admits(1.0)
    assert gate.usual == pytest.approx(1.0), "the median, whatever two of the five sent"
    assert not gate.admits(1e30)
    assert "usual 1" in repr(gate)


def test_outliers_are_refused_and_the_rest_passes() -> None:
    gate, rng = warmed(), random.Random(1)
    assert all(gate.admits(honest(rng)) for _ in range(5000))
    assert 0.5 < gate.usual < 2.0
    assert not gate.admits(gate.limit * 1.01)
    assert gate.admits(gate.limit * 0.99)
    assert gate.admits(1e-30)
    assert gate.admits(0.0)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_it_follows_an_honest_drift(direction: float) -> None:
    gate, rng = warmed(), random.Random(2)
    for step in range(8000):
        assert gate.admits(honest(rng, 10.0 ** (direction * step / 1000)))
    assert abs(math.log10(gate.usual) - direction * 8) < 1.0


@pytest.mark.parametrize("strategy", ["just under the limit", "growing slowly", "refused", "tiny", "shrinking"])
def test_a_minority_cannot_move_it_out_of_the_honest_range(strategy: str) -> None:
    """40 % of the calls are hostile, and the attacker knows the limit."""
    gate, rng = warmed(), random.Random(3)
    slow = 1.0
    refused = 0
    for _ in range(20_000):
        if rng.random() < 0.4:
            slow = min(slow * 1.001, gate.limit * 0.999)
            gate.admits(
                {
                    "just under the limit": gate.limit * 0.999,
                    "growing slowly": slow,
                    "refused": gate.limit * 10.0,
                    "tiny": 1e-30,
                    "shrinking": gate.usual / 90.0,
                }[strategy]
            )
        else:
            refused += not gate.admits(honest(rng))
        assert math.exp(-2.5) < gate.usual < math.exp(2.5), "between the 1st and the 99th percentile of honest norms"
    assert refused <= 12, "one in a thousand, when the median is at the honest norms' lower end"


def test_refused_calls_move_it_only_with_eight_times_the_honest_ones() -> None:
    gate, rng = warmed(), random.Random(4)
    for _ in range(20_000):
        if rng.random() < 0.8:
            assert not gate.admits(gate.limit * 1e6)
        else:
            assert gate.admits(honest(rng))
    assert gate.usual < math.exp(2.5)


@pytest.mark.parametrize("start", [1e-30, 1e30])
def test_it_recovers_from_a_hostile_warm_up(start: float) -> None:
    gate, rng = warmed(start), random.Random(5)
    calls = 0
    while not (0.2 < gate.usual < 5.0):
        gate.admits(honest(rng))
        calls += 1
        assert calls < 4000
    assert all(gate.admits(honest(rng)) for _ in range(100))


def test_an_honest_call_now_and_then_stops_the_recovery_towards_a_flood() -> None:
    gate, rng = warmed(), random.Random(6)
    for index in range(50_000):
        gate.admits(honest(rng) if index % 8 == 0 else 1e20)
    assert gate.limit < 1e5


@given(st.lists(st.floats(0.0, 1e300, allow_subnormal=True), max_size=300), st.floats(1.001, 1e9))
def test_any_norms_leave_it_sound(norms: list[float], factor: float) -> None:
    gate = NormGate(factor=factor, warmup_calls=3)
    for norm in norms:
        limit = gate.limit
        assert gate.admits(norm) == (norm <= limit) or norm == pytest.approx(limit)
        assert 0.0 <= gate.usual < math.inf
