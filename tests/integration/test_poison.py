"""A node under callers who send poison, beside a trainer who does not notice."""

from __future__ import annotations

import math
import threading
import urllib.request
from typing import Any

import pytest
import torch
from swarm_kit import WAIT_S, make_backend, same_bits
from torch import nn

import p2pmoe
from p2pmoe.errors import BadRequestError, CallError, ExpertFailedError
from p2pmoe.server.gate import is_finite

MAX = torch.finfo(torch.float32).max
POISON = {
    "nan in the input": (math.nan, 1.0),
    "infinity in the input": (-math.inf, 1.0),
    "nan in the gradient": (1.0, math.nan),
    "infinity in the gradient": (1.0, math.inf),
    "an input that overflows the gradients": (1e30, 0.01),
    "an input that overflows the outputs": (MAX, 0.01),
    "an outlier": (1.0, 1e9),
    "the largest gradient": (1.0, MAX),
}


def rows(value: float) -> torch.Tensor:
    return torch.ones(2, 4) * value


def metrics_of(node: p2pmoe.Node) -> str:
    with urllib.request.urlopen(f"http://{node.endpoint.host}:{node.endpoint.port}/metrics", timeout=WAIT_S) as answer:
        return str(answer.read().decode())


@pytest.mark.timeout(100)
def test_an_honest_trainer_learns_while_others_poison_the_same_expert() -> None:
    torch.manual_seed(0)
    backend = make_backend("ffn.0", dim=4, lr=0.05)
    config = p2pmoe.NodeConfig.from_tree({"gate": {"warmup_calls": 8}, "http": {"tls": False}})
    errors: dict[str, list[Exception]] = {name: [] for name in POISON}
    stop = threading.Event()

    def poison(expert: Any) -> None:
        while not stop.is_set():
            for name, (x, gradient) in POISON.items():
                try:
                    expert.call_backward((rows(x),), (rows(gradient),))
                except CallError as error:
                    errors[name].append(error)

    with (
        p2pmoe.background_node(config, [backend]) as node,
        p2pmoe.Swarm(initial_peers=[node.dht_address]) as swarm,
        p2pmoe.Swarm(initial_peers=[node.dht_address]) as hostile,
    ):
        x, head = torch.randn(32, 4), nn.Linear(4, 4)
        target = torch.tanh(x @ torch.randn(4, 4))
        expert = swarm.expert("ffn.0")
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        losses = []
        attackers: list[threading.Thread] = []
        try:
            for step in range(120):
                if step == 10:  # after the warm-up
                    attackers = [threading.Thread(target=poison, args=(hostile.expert("ffn.0"),)) for _ in range(2)]
                    for thread in attackers:
                        thread.start()
                loss = (head(expert(x.clone().requires_grad_())) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        finally:
            stop.set()
            for thread in attackers:
                thread.join(WAIT_S)
        text = metrics_of(node)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[9] * 0.8
    assert all(map(is_finite, backend.expert.parameters()))
    assert all(errors.values()), "every kind of poison was refused"
    for name, raised in errors.items():
        expected = ExpertFailedError if "overflows" in name else BadRequestError
        assert {type(error) for error in raised} == {expected}, name
    for reason in ("non_finite", "overflow", "outlier"):
        assert f'p2pmoe_rejected_gradients_total{{expert="ffn.0",reason="{reason}"}}' in text
    assert 'p2pmoe_requests_total{expert="ffn.0",outcome="400",pass="backward"}' in text


def test_a_forward_call_with_nan_is_refused_with_the_place_and_the_count() -> None:
    backend = make_backend("ffn.0", lr=0.0)
    with (
        p2pmoe.background_node(p2pmoe.NodeConfig(), [backend]) as node,
        p2pmoe.Swarm(initial_peers=[node.dht_address]) as swarm,
    ):
        expert = swarm.expert("ffn.0")
        x = torch.ones(2, 4)
        x[1, 2] = math.nan
        with pytest.raises(BadRequestError, match=r"tensor '0' .*ffn\.0 \(forward\) holds NaN or infinity in 1 of 8"):
            expert(x)
        good = torch.randn(2, 4)
        assert same_bits(expert(good), backend.expert(good))
