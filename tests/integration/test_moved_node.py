"""A node's process that is killed and started again with its key: it has another port, and calls find it there."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from swarm_kit import WAIT_S, make_ffn, same_bits
from test_faults import NodeProcess

import p2pmoe

RESTART_S = 40.0
"""A process that imports torch, on a loaded machine, and the refresh of its records."""


@pytest.fixture
def bootstrap() -> Iterator[p2pmoe.Node]:
    """A node of the DHT that stays; it hosts nothing."""
    with p2pmoe.background_node() as node:
        yield node


@pytest.mark.timeout(180)
def test_calls_follow_a_node_that_was_killed(bootstrap: p2pmoe.Node, tmp_path: Path) -> None:
    """In flight, begun while nobody is there, through a module and through a mixture of one expert a row."""
    key = f"identity={tmp_path / 'bob.pem'}"
    with contextlib.ExitStack() as stack:

        def start() -> NodeProcess:
            node = NodeProcess(bootstrap.dht_address, key, "ffn.0")
            stack.callback(node.close)
            return node

        first = start()
        first.wait_until_ready()
        swarm = stack.enter_context(p2pmoe.Swarm(initial_peers=[bootstrap.dht_address]))
        expert = swarm.expert("ffn.0")
        moe = p2pmoe.RemoteMixtureOfExperts(swarm, in_features=8, grid_size=(1,), uid_prefix="ffn", k_best=1)
        x = torch.randn(4, 8, requires_grad=True)
        right = make_ffn("ffn.0", 8)(x)
        assert same_bits(expert(x), right)
        mixed, y = moe(x), expert(x)
        where = {each.endpoint for each in swarm.find_experts("ffn.0")}
        first.kill()
        second = start()
        answers: dict[str, torch.Tensor] = {}
        calls = {
            "module": lambda: expert(x),
            "mixture": lambda: moe(x),
            "gradients": lambda: torch.autograd.grad(y.sum(), x)[0],
        }
        threads = [
            threading.Thread(target=lambda name=name, call=call: answers.update({name: call()}), daemon=True)
            for name, call in calls.items()
        ]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        second.wait_until_ready()
        announced = time.monotonic()
        for thread in threads:
            thread.join(RESTART_S)
        print(f"node back after {announced - started:.1f} s, answers {time.monotonic() - announced:.1f} s later")
        assert set(answers) == set(calls), "none failed, none hung"
        assert time.monotonic() - announced < WAIT_S
        assert answers["gradients"].isfinite().all()
        assert answers["module"].shape == answers["mixture"].shape == mixed.shape
        assert {each.endpoint for each in swarm.find_experts("ffn.0")}.isdisjoint(where), "the same key elsewhere"
        assert swarm.trust.standing.snapshot() == []
