"""Token buckets: nobody gets more than the rate, nobody is forbidden for ever."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.rpc.token_bucket import TokenBucket

amounts = st.floats(0, 1e6, allow_nan=False)


@given(
    rate=st.floats(0.1, 1e4),
    burst=st.floats(1, 1e4),
    steps=st.lists(st.tuples(amounts, st.floats(0, 10)), max_size=50),
)
def test_no_more_than_burst_and_rate_are_ever_taken_but_for_one_large_call(
    rate: float, burst: float, steps: list[tuple[float, float]]
) -> None:
    now, taken, largest = 0.0, 0.0, 0.0
    bucket = TokenBucket(rate, burst, now)
    for amount, pause in steps:
        now += pause
        if bucket.take(amount, now) == 0.0:
            taken += amount
            largest = max(largest, amount)
        assert taken <= (burst + now * rate + largest) * (1 + 1e-9)


@given(rate=st.floats(0.1, 1e4), burst=st.floats(1, 1e4), asked=st.lists(amounts, min_size=1, max_size=10))
def test_after_the_time_that_it_named_a_bucket_gives(rate: float, burst: float, asked: list[float]) -> None:
    now = 0.0
    bucket = TokenBucket(rate, burst, now)
    for amount in asked:
        wait_s = bucket.take(amount, now)
        if wait_s:
            assert bucket.take(amount, now) == pytest.approx(wait_s), "a refusal takes nothing"
            now += wait_s * (1 + 1e-6) + 1e-6
            assert bucket.take(amount, now) == 0.0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(1.0, 1.0, 100.0)
    assert bucket.take(1.0, 100.0) == 0.0
    assert bucket.take(1.0, 50.0) > 0
    assert bucket.take(1.0, 100.5) == pytest.approx(0.5)


def test_infinity_is_no_limit() -> None:
    bucket = TokenBucket(math.inf, math.inf, 0.0)
    assert [bucket.take(1e300, 0.0) for _ in range(3)] == [0.0] * 3
