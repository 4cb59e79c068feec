"""Memory for calls in flight: bounded in all, shared among callers, given back to the byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import OverloadedError
from p2pmoe.rpc.budget import SharedBudget


def test_one_caller_alone_leaves_a_fifth_for_the_next() -> None:
    whole = SharedBudget(1000)
    greedy = whole.of("greedy")
    for _ in range(80):
        greedy.take(10)
    with pytest.raises(OverloadedError, match="your calls"):
        greedy.take(10)
    whole.of("honest").take(200)
    assert whole.held == 1000


def test_a_first_call_may_take_all_that_is_left() -> None:
    whole = SharedBudget(1000)
    whole.of("alice").take(1000)
    with pytest.raises(OverloadedError):
        whole.of("bob").take(1)
    whole.of("alice").give(1000)
    whole.of("bob").take(5000)  # larger than all: goes alone
    assert whole.by_caller == {"bob": 5000}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 600), st.booleans()), max_size=60))
def test_what_is_taken_is_given_back_and_the_sum_holds(steps: list[tuple[str, int, bool]]) -> None:
    whole = SharedBudget(1000)
    held: list[tuple[str, int]] = []
    for key, count, gives in steps:
        if gives and held:
            owner, size = held.pop()
            whole.of(owner).give(size)
        else:
            try:
                whole.of(key).take(count)
            except OverloadedError:
                continue
            held.append((key, count))
        assert whole.held == sum(size for _, size in held) == sum(whole.by_caller.values())
        assert whole.held <= 1000
    for owner, size in held:
        whole.of(owner).give(size)
    assert whole.held == 0
    assert not whole.by_caller
