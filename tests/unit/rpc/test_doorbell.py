"""The doorbell: a ring is never lost, and rings that nobody waits for cost nothing."""

from __future__ import annotations

import threading
import time

from swarm_kit import WAIT_S, run_threads

from p2pmoe.rpc.doorbell import Doorbell, thread_doorbell


def test_a_ring_before_the_wait_counts() -> None:
    bell = Doorbell()
    bell.ring()
    assert bell.wait(WAIT_S)
    assert not bell.wait(0.0)
    bell.close()


def test_a_wait_ends_in_time() -> None:
    bell = Doorbell()
    started = time.monotonic()
    assert not bell.wait(0.05)
    assert time.monotonic() - started < 2.0
    bell.close()


def test_rings_from_many_threads_wake_the_one_that_waits() -> None:
    bell, stop = Doorbell(), threading.Event()

    def wait() -> None:
        for _ in range(20):
            assert bell.wait(WAIT_S)
        stop.set()

    def ring() -> None:
        while not stop.wait(0.0005):
            bell.ring()

    run_threads([wait, ring, ring, ring])
    bell.close()


def test_rings_that_nobody_hears_never_block() -> None:
    bell = Doorbell()
    for _ in range(100_000):
        bell.ring()
    assert bell.wait(WAIT_S)
    bell.close()
    bell.close()
    bell.ring()


def test_every_thread_has_its_own() -> None:
    mine = thread_doorbell()
    assert thread_doorbell() is mine
    theirs = run_threads([thread_doorbell])
    assert theirs[0] is not mine


def test_the_timeout_may_differ_from_wait_to_wait() -> None:
    bell = Doorbell()
    for timeout_s in (0.02, 0.05, 0.0, 0.02):
        started = time.monotonic()
        assert not bell.wait(timeout_s)
        assert timeout_s * 0.9 <= time.monotonic() - started < timeout_s + 1.0
    bell.ring()
    assert bell.wait(0.02)
    bell.close()
