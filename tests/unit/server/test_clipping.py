"""What becomes of outliers: honest trainers of any scale are never refused, and nobody gets more than the limit."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.server.clipping import LARGEST, MAX_CALLERS, NEW_SCALE_AFTER, CallerScale, Extreme, GradientLimit
from p2pmoe.server.gate import NormGate

FACTOR, WARMUP = 1000.0, 64
ALICE, BOB, CAROL = ("a" * 32, "b" * 32, "c" * 32)


def converged(scale: float = 1e-6, *, caller: str = ALICE, calls: int = 5000) -> tuple[GradientLimit, NormGate]:
    """An expert that one trainer has called for long, with gradients of about this norm."""
    norms = NormGate(factor=FACTOR, warmup_calls=WARMUP)
    limit, rng = GradientLimit(norms, factor=FACTOR, warmup_calls=WARMUP), random.Random(1)
    for _ in range(calls):
        assert limit.judge(caller, scale * math.exp(rng.gauss(0.0, 1.0)), is_one=True) == 0
    return limit, norms


def taken(limit: GradientLimit, caller: str, norm: float, *, is_one: bool = True) -> float:
    """The norm that reaches the expert. A refusal fails the test."""
    verdict = limit.judge(caller, norm, is_one=is_one)
    assert not isinstance(verdict, Extreme), f"{norm} of {caller} was refused"
    return norm * 2.0**-verdict


HONEST = {
    "fresh": 1660.0,
    "summed": 4096.0 * 10,
    "scaled": 65_536.0,
    "one row a batch": 4096.0,
    "fresh and scaled": 1660.0 * 65_536,
    "fresh, summed and scaled": 1660.0 * 64 * 65_536,
}


@pytest.mark.parametrize("caller", [ALICE, BOB], ids=["the same trainer", "a newcomer"])
@pytest.mark.parametrize("times", HONEST.values(), ids=HONEST)
def test_no_honest_trainer_is_refused_beside_a_converged_one(times: float, caller: str) -> None:
    limit, norms = converged()
    rng = random.Random(2)
    for _ in range(400):
        norm = norms.usual * times * math.exp(rng.gauss(0.0, 1.0))
        assert 0.0 < taken(limit, caller, norm) <= max(norm, norms.limit)
        taken(limit, ALICE, 1e-6 * math.exp(rng.gauss(0.0, 1.0)))


@pytest.mark.parametrize("rate", [2.0, 0.5], ids=["growing", "backing off"])
def test_a_loss_scale_that_moves_is_followed(rate: float) -> None:
    limit, _ = converged(1.0)
    scale = 65_536.0
    for step in range(3000):
        scale *= rate if step % 100 == 99 else 1.0
        taken(limit, BOB, min(scale, 1e30))


def test_trainers_behind_one_address_are_never_refused_however_their_scales_differ() -> None:
    limit, _ = converged(1e-9)
    for _ in range(300):
        for norm in (1e-9, 1.0, 1e9):
            taken(limit, "192.0.2.7", norm, is_one=False)


def test_ordinary_gradients_are_left_alone() -> None:
    limit, norms = converged(1.0)
    for caller in (ALICE, BOB, "192.0.2.7"):
        for norm in (0.0, 1e-300, 1.0, norms.limit * 0.99):
            assert limit.judge(caller, norm, is_one=True) == 0


def test_nothing_is_scaled_down_before_the_experts_scale_is_known() -> None:
    limit = GradientLimit(NormGate(factor=FACTOR, warmup_calls=WARMUP), factor=FACTOR, warmup_calls=WARMUP)
    assert [limit.judge(ALICE, norm, is_one=True) for norm in (1.0, 1e30, 1e-30)] == [0, 0, 0]


def test_a_new_key_for_every_call_gets_nobody_over_the_limit() -> None:
    limit, norms = converged(1.0)
    for index in range(2000):
        bound = norms.limit
        assert taken(limit, f"{index:032x}", 10.0 ** (index % 30)) <= bound * 1.01  # it learns first
        taken(limit, ALICE, 1.0)
    assert norms.usual < 2.0, "half of the calls, and the scale did not follow them"
    assert f"{MAX_CALLERS} callers" in repr(limit)


def test_a_trainer_of_another_scale_keeps_its_proportions_and_does_not_drown_the_others() -> None:
    limit, norms = converged(1.0)
    for _ in range(200):
        usual = taken(limit, BOB, 65_536.0)
        taken(limit, ALICE, 1.0)
    assert usual < norms.limit / 8
    assert taken(limit, BOB, 65_536.0 * 4) == pytest.approx(usual * 4)
    assert taken(limit, BOB, 65_536.0 * 4096) <= norms.limit


def test_far_over_its_own_history_a_call_is_refused_until_that_is_the_new_scale() -> None:
    limit, norms = converged(1.0)
    bound = FACTOR**2 * norms.usual
    first = limit.judge(ALICE, bound * 10, is_one=True)
    assert isinstance(first, Extreme)
    assert first.limit == pytest.approx(bound, rel=0.2)
    assert first.usual == pytest.approx(1.0, rel=0.5)
    assert first.forgiven_after == NEW_SCALE_AFTER - 1
    assert taken(limit, ALICE, 1.0) == 1.0
    row = [limit.judge(ALICE, bound * 10, is_one=True) for _ in range(NEW_SCALE_AFTER + 1)]
    left = [each.forgiven_after if isinstance(each, Extreme) else each for each in row]
    assert left[:NEW_SCALE_AFTER] == [2, 1, 0]
    assert isinstance(left[-1], int)
    for _ in range(300):
        taken(limit, ALICE, bound * 10)


def test_poison_between_honest_calls_is_refused_each_time() -> None:
    limit, _ = converged(1.0)
    for _ in range(100):
        assert isinstance(limit.judge(ALICE, 1e9, is_one=True), Extreme)
        assert limit.judge(ALICE, 1.0, is_one=True) == 0


@pytest.mark.parametrize("is_one", [True, False])
def test_what_no_loss_has_is_refused_to_everybody(is_one: bool) -> None:
    limit = GradientLimit(NormGate(factor=FACTOR, warmup_calls=WARMUP), factor=FACTOR, warmup_calls=WARMUP)
    for _ in range(10):
        verdict = limit.judge(CAROL, 3e38, is_one=is_one)
        assert isinstance(verdict, Extreme)
        assert (verdict.limit, verdict.usual, verdict.forgiven_after) == (LARGEST, 0.0, None)


def test_a_short_history_follows_quickly_and_a_few_extremes_do_not_lead_it() -> None:
    own = CallerScale()
    for norm in (0.02, 0.02, 1e9) * 8:
        own.learn(math.log(norm))
    assert 0.01 < own.usual < 1.0
    assert "24 calls" in repr(own)


@given(
    st.lists(
        st.tuples(st.sampled_from([ALICE, BOB, "::1"]), st.floats(0.0, 1e300, allow_subnormal=True)), max_size=200
    ),
    st.floats(1.001, 1e9),
    st.sampled_from([1e-36, 1e-3]),
)
def test_whatever_is_sent_what_is_taken_is_within_the_limit(
    calls: list[tuple[str, float]], factor: float, least: float
) -> None:
    norms = NormGate(factor=factor, warmup_calls=3)
    limit = GradientLimit(norms, factor=factor, warmup_calls=3, least=least)
    for caller, norm in calls:
        bound = norms.limit
        verdict = limit.judge(caller, norm, is_one=caller != "::1")
        if isinstance(verdict, Extreme):
            assert norm > min(LARGEST, factor**2)
        elif norm <= bound * (1 - 1e-9):
            assert verdict == 0
        else:
            assert math.ldexp(norm, -verdict) <= max(bound, norms.limit, least) * (1 + 1e-9)
