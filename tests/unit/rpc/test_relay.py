"""The relay: waiting threads wake one after the other, and nobody is forgotten when one of them has gone."""

from __future__ import annotations

import threading
import time

from swarm_kit import WAIT_S, run_threads

from p2pmoe.rpc.doorbell import RELAY_PATIENCE_S, Doorbell, Relay


def test_one_alone_is_rung_at_once() -> None:
    relay, bell = Relay(), Doorbell()
    assert not relay.wake(bell)
    assert bell.wait(0.5)
    relay.woke(bell)
    assert not relay.nudge()


def test_the_next_is_rung_when_the_first_is_awake() -> None:
    relay, first, second = Relay(), Doorbell(), Doorbell()
    relay.wake(first)
    assert relay.wake(second)
    assert not second.wait(0.0)
    relay.woke(first)
    assert second.wait(0.5)


def test_one_that_never_wakes_keeps_nobody() -> None:
    relay, gone, second, third = Relay(), Doorbell(), Doorbell(), Doorbell()
    for bell in (gone, second, third):
        relay.wake(bell)
    assert relay.nudge(), "the first has its time"
    time.sleep(2 * RELAY_PATIENCE_S)
    assert not relay.nudge()
    assert second.wait(0.5)
    assert third.wait(0.5)


def test_one_that_was_not_in_the_queue_passes_the_turn_on() -> None:
    relay, timed_out, waiting = Relay(), Doorbell(), Doorbell()
    relay.wake(waiting)
    assert waiting.wait(0.5)
    relay.woke(timed_out)
    assert waiting.wait(0.5), "rung once more rather than forgotten"


def test_many_threads_and_many_rounds() -> None:
    relay, count, rounds = Relay(), 16, 50
    bells = [Doorbell() for _ in range(count)]
    waiting = threading.Semaphore(0)

    def wait(bell: Doorbell) -> int:
        heard = 0
        deadline = time.monotonic() + WAIT_S
        waiting.release()
        while heard < rounds and time.monotonic() < deadline:
            if bell.wait(0.2):
                heard += 1
                relay.woke(bell)
                waiting.release()
        return heard

    def ring() -> int:
        for _ in range(rounds):
            for _ in bells:
                assert waiting.acquire(timeout=WAIT_S)
            for bell in bells:
                relay.wake(bell)
            while relay.nudge():
                time.sleep(RELAY_PATIENCE_S)
        return rounds

    heard = run_threads([*(lambda bell=bell: wait(bell) for bell in bells), ring])
    # A bell that is rung twice before its thread looks counts once or twice; it is never rung too seldom.
    assert all(each == rounds for each in heard)
