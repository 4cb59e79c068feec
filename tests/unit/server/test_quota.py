"""Caller accounts: nobody gets more than his rate, nobody is forbidden for ever."""

from __future__ import annotations

import msgspec
import pytest

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import OverloadedError
from p2pmoe.server.quota import CallerQuota


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def quota(clock: Clock | None = None, **limits: float) -> CallerQuota:
    return CallerQuota(msgspec.structs.replace(LimitsConfig(), **limits), clock=clock or Clock())


def test_calls_a_second_are_counted_for_each_caller() -> None:
    clock = Clock()
    each = quota(clock, caller_calls_per_s=2.0, caller_burst_s=1.0)
    each.count_call("alice")
    each.count_call("alice")
    with pytest.raises(OverloadedError, match="2 calls a second") as caught:
        each.count_call("alice")
    assert caught.value.retry_after_s == pytest.approx(0.5)
    each.count_call("bob")
    clock.now += 0.5
    each.count_call("alice")


def test_bytes_and_updates_are_counted() -> None:
    clock = Clock()
    each = quota(clock, caller_bytes_per_s=100.0, caller_updates_per_s=1.0, caller_burst_s=1.0)
    account = each.count_call("alice")
    each.charge(account, 250, updates=True)  # larger than the burst: lent by a full bucket
    with pytest.raises(OverloadedError, match="backward"):
        each.charge(account, 0, updates=True)
    with pytest.raises(OverloadedError, match="tensor bytes") as caught:
        each.charge(account, 1, updates=False)
    assert caught.value.retry_after_s == pytest.approx(1.51)
    clock.now += 1.52
    each.charge(account, 1, updates=True)


def test_a_size_that_is_only_claimed_makes_no_debt_for_ever() -> None:
    clock = Clock()
    each = quota(clock, caller_bytes_per_s=1000.0, caller_burst_s=1.0, max_body_bytes=5000)
    account = each.count_call("alice")
    each.charge(account, 2**60, updates=False)
    clock.now += 5.0
    each.charge(account, 1000, updates=False)


def test_running_calls_are_capped_and_given_back() -> None:
    each = quota(caller_max_calls=2)
    account = each.count_call("alice")
    account.begin()
    account.begin()
    with pytest.raises(OverloadedError, match="limit is 2"):
        each.count_call("alice")
    each.count_call("bob")
    account.end(None)
    each.count_call("alice")


def test_the_table_of_callers_is_bounded_and_forgets_the_silent() -> None:
    each = quota(max_callers=3, caller_calls_per_s=1.0, caller_burst_s=1.0)
    for name in ("alice", "bob", "carol"):
        each.count_call(name)
    with pytest.raises(OverloadedError):
        each.count_call("alice")  # was heard last now
    for index in range(100):
        each.account("alice")
        each.count_call(f"stranger {index}")
        assert len(each) == 3
    with pytest.raises(OverloadedError):
        each.count_call("alice")
