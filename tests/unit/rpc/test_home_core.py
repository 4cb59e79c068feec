"""The home core: threads are bound only while they wait, and nothing of it is left behind."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from swarm_kit import run_threads

from p2pmoe.rpc import home_core
from p2pmoe.rpc.home_core import HomeCore

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="there is but one core, or no way to choose"
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def in_own_thread(test: Callable[[], None]) -> Callable[[], None]:
    """Affinity belongs to the thread: what a test does to its own would be felt by all that follow."""

    @functools.wraps(test)
    def run() -> None:
        run_threads([test])

    return run


def another(core: int | None, cores: set[int]) -> int:
    return next(each for each in cores if each != core)


def test_nobody_is_bound_where_nobody_settled() -> None:
    assert HomeCore().enter() is None


@in_own_thread
def test_waiting_threads_are_bound_to_the_core_of_the_one_that_wakes_them() -> None:
    home, before = HomeCore(), os.sched_getaffinity(0)
    home.settle()
    assert home.core in before
    assert os.sched_getaffinity(0) == {home.core}

    def wait() -> None:
        bound = home.enter()
        assert bound is not None
        assert os.sched_getaffinity(0) == {home.core}
        bound.release()
        assert os.sched_getaffinity(0) == before

    # A thread inherits the affinity of the one that starts it, so start it from outside.
    home.leave()
    assert os.sched_getaffinity(0) == before
    home.settle()
    core = home.core
    os.sched_setaffinity(0, before)
    run_threads([wait] * 3)
    assert home.core == core
    home.leave()
    assert home.enter() is None
    assert os.sched_getaffinity(0) == before


@in_own_thread
def test_it_moves_at_times() -> None:
    clock = Clock()
    home, before = HomeCore(clock), os.sched_getaffinity(0)
    home.settle()
    core = home.core
    clock.now += 0.05
    home.settle()
    assert os.sched_getaffinity(0) == {core}, "it stays for a while"
    clock.now += 0.06
    home.settle()
    assert os.sched_getaffinity(0) == before, "the scheduler chooses"
    assert home.core == core, "the others wait there meanwhile"
    home.settle()
    assert os.sched_getaffinity(0) == before, "not at once again"
    other = another(core, before)
    os.sched_setaffinity(0, {other})
    os.sched_setaffinity(0, before)
    clock.now += 0.003
    home.settle()
    assert home.core is not None
    assert os.sched_getaffinity(0) == {home.core}
    home.leave()
    assert os.sched_getaffinity(0) == before


@in_own_thread
def test_a_thread_with_cores_of_its_own_choice_keeps_them() -> None:
    home, before = HomeCore(), os.sched_getaffinity(0)
    home.settle()
    core = home.core
    other = another(core, before)
    os.sched_setaffinity(0, {other})
    assert home.enter() is None, "it may not run at home"
    assert os.sched_getaffinity(0) == {other}
    home.leave()
    assert os.sched_getaffinity(0) == {other}, "somebody moved it meanwhile"
    home.settle()
    assert home.core is None, "it has one core only: there is nothing to choose"


@in_own_thread
def test_who_moves_a_thread_while_it_waits_has_the_last_word() -> None:
    home, before = HomeCore(), os.sched_getaffinity(0)
    home.settle()
    core = home.core
    os.sched_setaffinity(0, before)
    bound = home.enter()
    assert bound is not None
    other = another(core, before)
    os.sched_setaffinity(0, {other})
    bound.release()
    assert os.sched_getaffinity(0) == {other}


def test_a_sandbox_that_forbids_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(*_: object) -> None:
        raise PermissionError("seccomp")

    home = HomeCore()
    monkeypatch.setattr(os, "sched_setaffinity", forbid)
    home.settle()
    assert home.core is None
    assert home.enter() is None
    home.leave()


def test_a_system_without_proc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise FileNotFoundError("/proc")

    home, before = HomeCore(), os.sched_getaffinity(0)
    monkeypatch.setattr(home_core, "_current_core", fail)
    home.settle()
    monkeypatch.undo()
    home.settle()
    assert home.core is None, "it does not try again"
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not Path("/proc/thread-self/stat").exists(), reason="no /proc")
@in_own_thread
def test_the_core_is_the_one_the_thread_runs_on() -> None:
    for core in os.sched_getaffinity(0):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})
        assert home_core._current_core() == core
        os.sched_setaffinity(0, before)
