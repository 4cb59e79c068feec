"""Who may open a connection: alice and bob share a node with a crowd."""

from __future__ import annotations

import pytest

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import OverloadedError
from p2pmoe.rpc.http.admission import MAX_REMEMBERED_SOURCES, Admission

ALICE, BOB = "192.0.2.1", "192.0.2.2"


class Clock:
    now = 0.0
    step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Running(Clock):
    step = 1.0


def make(clock: Clock | None = None, **limits: float) -> Admission:
    fast = {"max_handshakes_per_s": 1e9, "max_source_handshakes_per_s": 1e9}
    return Admission(LimitsConfig(**(fast | limits)), clock=clock or Running())


def test_one_source_leaves_room_for_others() -> None:
    admission = make(max_connections=4, max_source_connections=3)
    tickets = [admission.enter(ALICE) for _ in range(3)]
    with pytest.raises(OverloadedError, match="max_source_connections"):
        admission.enter(ALICE)
    admission.enter(BOB)
    with pytest.raises(OverloadedError, match=r"limits\.max_connections"):
        admission.enter(BOB)
    tickets[0].give_back()
    tickets[0].give_back()
    assert admission.connections == 3
    admission.enter(ALICE)
    assert admission.refused == 2


def test_handshakes_per_second_of_one_source_and_of_all() -> None:
    clock = Clock()
    admission = make(
        clock, max_connections=6, max_source_connections=2, max_handshakes_per_s=1.0, max_source_handshakes_per_s=0.5
    )
    for _ in range(2):
        admission.enter(ALICE).give_back()
    with pytest.raises(OverloadedError, match="max_source_handshakes_per_s"):
        admission.enter(ALICE)
    for host in ("192.0.2.3", "192.0.2.4", "192.0.2.5", "192.0.2.6"):
        admission.enter(host).give_back()
    with pytest.raises(OverloadedError, match=r"limits\.max_handshakes_per_s"):
        admission.enter(BOB)
    clock.now = 2.0
    admission.enter(ALICE).give_back()
    with pytest.raises(OverloadedError, match="max_source_handshakes_per_s"):
        admission.enter(ALICE)


def test_a_crowd_of_sources_takes_no_memory() -> None:
    admission = make(max_connections=1)
    for index in range(MAX_REMEMBERED_SOURCES + 100):
        admission.enter(f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}").give_back()
    assert len(admission._sources) == MAX_REMEMBERED_SOURCES
    assert not admission._open
