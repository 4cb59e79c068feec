"""A swarm that has converged takes in whoever comes: no honest trainer is refused, whatever its gradients' scale."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from itertools import pairwise
from statistics import mean

import pytest
import torch
from swarm_kit import WAIT_S
from torch.nn import functional

import p2pmoe
from p2pmoe.client.mixture import RemoteMixtureOfExperts
from p2pmoe.training.digits import make_digits_task
from p2pmoe.training.tasks import TaskOptions

WIDTH = 16
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def scaled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels) * 65_536


NEWCOMERS: dict[str, tuple[Loss, int]] = {
    "fresh": (functional.cross_entropy, 64),
    "summed": (summed, 64),
    "scaled": (scaled, 64),
    "small batches": (functional.cross_entropy, 8),
}


def train(swarm: p2pmoe.Swarm, loss_of: Loss, batch_size: int, steps: int, seed: int) -> list[float]:
    """Losses of a new model, each divided by the first ones' mean. What a peer refuses is raised."""
    torch.manual_seed(seed)
    mixture = RemoteMixtureOfExperts(
        swarm, in_features=WIDTH, grid_size=(2, 2), uid_prefix="ffn", k_best=4, k_min=4, backward_k_min=4
    )
    task = make_digits_task(mixture, TaskOptions(WIDTH, batch_size, seed))
    optimizer = torch.optim.Adam(task.model.parameters(), lr=task.learning_rate)
    losses = []
    for _ in range(steps):
        images, labels = next(task.batches)
        optimizer.zero_grad()
        loss = loss_of(task.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    first = mean(losses[:5])
    return [each / first for each in losses]


def counted(node: p2pmoe.Node, name: str) -> float:
    """The sum of a counter over the node's experts."""
    address = f"http://{node.endpoint.host}:{node.endpoint.port}/metrics"
    with urllib.request.urlopen(address, timeout=WAIT_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}_total{{"))


@pytest.mark.timeout(120)
def test_newcomers_of_every_scale_learn_from_a_converged_swarm_and_none_is_refused() -> None:
    """The factor is small, so that some hundred steps are what thousands are to the default of 1,000."""
    config = p2pmoe.NodeConfig.from_tree(
        {
            "experts": {"uids": ["ffn.[0:2].[0:2]"], "hidden_dim": WIDTH, "seed": 1},
            "gate": {"outlier_factor": 40.0, "warmup_calls": 16},
            "http": {"tls": False},
        }
    )
    with p2pmoe.background_node(config) as node:
        with p2pmoe.Swarm(initial_peers=[node.dht_address]) as alice:
            losses = train(alice, functional.cross_entropy, 64, 250, 0)
            assert mean(losses[-5:]) < 0.2
            clipped = [counted(node, "p2pmoe_clipped_gradients")]
            # The same key may come again with another model and another loss, too.
            again = train(alice, scaled, 64, 25, 1)
            assert mean(again[-5:]) < 0.8
            clipped.append(counted(node, "p2pmoe_clipped_gradients"))
            train(alice, functional.cross_entropy, 64, 80, 0)
        for seed, (name, (loss_of, batch_size)) in enumerate(NEWCOMERS.items(), 2):
            with p2pmoe.Swarm(initial_peers=[node.dht_address]) as swarm:
                losses = train(swarm, loss_of, batch_size, 30, seed)
            assert mean(losses[-10:]) < 0.8, name
            clipped.append(counted(node, "p2pmoe_clipped_gradients"))
        print("clipped:", clipped)
        assert counted(node, "p2pmoe_rejected_gradients") == 0
        assert clipped[-1] > clipped[0]
        assert all(first <= second for first, second in pairwise(clipped))
