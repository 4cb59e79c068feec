"""The dispatcher under many callers: they share exchanges, and nobody waits for a stranger's slow call."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time

import pytest
import torch
from swarm_kit import WAIT_S, Gate, make_backend, open_world, run_threads

import p2pmoe
from p2pmoe.client.calls import CallGroup, make_call
from p2pmoe.config import LimitsConfig


def forward(expert: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = expert(x)
    return result


def timed(expert: torch.nn.Module, x: torch.Tensor) -> float:
    begun = time.monotonic()
    forward(expert, x)
    return time.monotonic() - begun


def test_many_callers_share_exchanges() -> None:
    callers, calls = 32, 10
    with open_world({"alice": [make_backend("ffn.0")]}, carrier="http") as world:
        expert = world.swarm.expert("ffn.0")
        x = torch.ones(1, 4)
        wanted = forward(expert, x)
        before = world.swarm.dispatcher.exchanges

        def call() -> None:
            for _ in range(calls):
                assert torch.allclose(forward(expert, x), wanted)

        run_threads([call] * callers)
        exchanges = world.swarm.dispatcher.exchanges - before
        assert exchanges < callers * calls / 3, f"{exchanges} exchanges for {callers * calls} calls"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound to cores on Linux only")
def test_a_crowd_leaves_no_thread_bound_to_a_core() -> None:
    """Callers that end together, and callers that give up: all may run everywhere afterwards, the loop too."""
    allowed, x = os.sched_getaffinity(0), torch.ones(1, 4)
    with open_world({"alice": [make_backend("ffn.0")]}, carrier="http") as world:
        expert = world.swarm.expert("ffn.0")
        forward(expert, x)
        crowds = set()

        def call() -> set[int]:
            for _ in range(30):
                forward(expert, x)
                assert os.sched_getaffinity(0) == allowed
                crowds.add(world.swarm.dispatcher._home.core is not None)
            return os.sched_getaffinity(0)

        for _ in range(3):
            assert run_threads([call] * 24) == [allowed] * 24

        async def of_loop() -> set[int]:
            return os.sched_getaffinity(0)

        assert world.swarm.run(of_loop()) == allowed
        assert world.swarm.dispatcher._home.core is None
        assert crowds >= {len(allowed) > 1}, "they shared one in between"


def test_a_call_leaves_no_garbage() -> None:
    """A call and its group must not refer to each other in the end: their tensors would stay until a collection."""
    x = torch.ones(1, 4)
    with open_world({"alice": [make_backend("ffn.0")]}, carrier="http") as world:
        expert = world.swarm.expert("ffn.0")

        def call() -> None:
            for _ in range(10):
                forward(expert, x)

        for callers in (1, 12):
            run_threads([call] * callers)
            gc.collect()
            gc.disable()
            try:
                run_threads([call] * callers)
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                left = [type(each).__name__ for each in gc.garbage]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()
            assert "Call" not in left
            assert "CallGroup" not in left
            assert "Tensor" not in left


def test_new_calls_are_not_held_back_by_slow_ones() -> None:
    """While more than a crowd of calls hangs at one node, calls to another one are sent and answered."""
    gate, x = Gate(), torch.ones(1, 4)
    hosts = {"alice": [make_backend("ffn.0", gate)], "bob": [make_backend("ffn.1")]}
    with open_world(hosts, carrier="http") as world:
        slow, quick = world.swarm.expert("ffn.0"), world.swarm.expert("ffn.1")
        forward(slow, x)
        forward(quick, x)
        gate.armed = True
        threads = [threading.Thread(target=forward, args=(slow, x)) for _ in range(16)]
        for thread in threads:
            thread.start()
        assert gate.begun.wait(WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while world.swarm.dispatcher.unanswered < 16 and time.monotonic() < deadline:
            time.sleep(0.001)
        durations = sorted(timed(quick, x) for _ in range(20))
        gate.go.set()
        for thread in threads:
            thread.join(WAIT_S)
        assert durations[10] < 0.1


def test_a_caller_that_left_keeps_nobody_from_waking() -> None:
    """Calls that are given up at once: their bells are rung when nobody listens any more."""
    x, stop = torch.ones(1, 4), threading.Event()
    protos = (p2pmoe.BatchTensorProto(4),)
    many = LimitsConfig(max_handshakes_per_s=1e6, max_source_handshakes_per_s=1e6, max_source_connections=4096)
    with open_world({"alice": [make_backend("ffn.0")]}, carrier="http", limits=many) as world:
        expert = world.swarm.expert("ffn.0")
        forward(expert, x)

        def leave() -> int:
            left = 0
            while not stop.is_set():
                call = make_call(world.alice.endpoint, "ffn.0", "forward", (x,), protos, protos, timeout_s=WAIT_S)
                world.swarm.call(CallGroup([call]), 1e-4)
                left += call.result is None
            return left

        def stay() -> float:
            durations, ends_at = [], time.monotonic() + WAIT_S / 2  # a busy machine gets through fewer than 100
            try:
                while len(durations) < 100 and time.monotonic() < ends_at:
                    durations.append(timed(expert, x))
            finally:
                stop.set()
            return max(durations)

        *left, longest = run_threads([leave] * 8 + [stay])
        assert sum(left) > 10
        assert longest < 2.0
