"""Training through real nodes on loopback, DHT and HTTP included: it is the local training, bit for bit."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator

import pytest
import torch
from swarm_kit import grid_backends, make_backend, run_threads, same_bits
from torch import nn

import p2pmoe

Nodes = list[p2pmoe.Node]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with p2pmoe.background_node(p2pmoe.NodeConfig(), grid_backends([0], optimizer=torch.optim.Adam, lr=0.02)) as alice:
        join = p2pmoe.NodeConfig.from_tree({"dht": {"initial_peers": [alice.dht_address]}})
        backends = [*grid_backends([1], optimizer=torch.optim.Adam, lr=0.02), make_backend("solo.0", lr=0.05)]
        with p2pmoe.background_node(join, backends) as bob:
            yield [alice, bob]


@pytest.fixture
def swarm(nodes: Nodes) -> Iterator[p2pmoe.Swarm]:
    with p2pmoe.Swarm(initial_peers=[nodes[0].dht_address]) as swarm:
        yield swarm


def backend(nodes: Nodes, uid: str) -> p2pmoe.ExpertBackend:
    return next(each for node in nodes for each in node.backends if each.name == uid)


def mixture(swarm: p2pmoe.Swarm, **options: object) -> p2pmoe.RemoteMixtureOfExperts:
    options = {"in_features": 4, "grid_size": (2, 2), "uid_prefix": "ffn", "k_best": 4} | options
    return p2pmoe.RemoteMixtureOfExperts(swarm, **options)  # type: ignore[arg-type]


def test_an_expert_trains_as_it_would_locally(nodes: Nodes, swarm: p2pmoe.Swarm) -> None:
    remote = nn.Sequential(nn.Linear(4, 4), swarm.expert("solo.0"), nn.Linear(4, 1))
    local = nn.Sequential(*(copy.deepcopy(each) for each in (remote[0], backend(nodes, "solo.0").expert, remote[2])))
    ours = torch.optim.SGD(remote.parameters(), lr=0.05)
    theirs = torch.optim.SGD(local.parameters(), lr=0.05)
    x, target = torch.randn(32, 4), torch.randn(32, 1)
    losses = []
    for _ in range(20):
        pair = []
        for model, optimizer in ((remote, ours), (local, theirs)):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            pair.append(loss)
        assert same_bits(*pair)
        losses.append(pair[0].item())
    assert losses[-1] < losses[0]
    for a, b in zip(local[1].parameters(), backend(nodes, "solo.0").expert.parameters(), strict=True):
        assert same_bits(a, b)


def test_a_mixture_with_every_expert_trains_as_it_would_locally(nodes: Nodes, swarm: p2pmoe.Swarm) -> None:
    """k_best is the whole grid: every row goes to all four, so the local mixture is a weighted sum."""
    moe = mixture(swarm)
    uids = ["ffn.0.0", "ffn.0.1", "ffn.1.0", "ffn.1.1"]
    experts = nn.ModuleList(copy.deepcopy(backend(nodes, uid).expert) for uid in uids)
    gate = copy.deepcopy(moe.gate)
    ours = torch.optim.SGD(moe.parameters(), lr=0.1)
    theirs = [torch.optim.SGD(gate.parameters(), lr=0.1), *(torch.optim.Adam(e.parameters(), lr=0.02) for e in experts)]
    x, target = torch.randn(16, 4), torch.randn(16, 4)
    losses = []
    for _ in range(15):
        loss = (moe(x) - target).square().mean()
        loss.backward()
        ours.step()
        ours.zero_grad()
        first, second = gate(x)
        weights = torch.softmax((first.unsqueeze(2) + second.unsqueeze(1)).flatten(1), 1)
        mixed = sum(weights[:, i : i + 1] * expert(x) for i, expert in enumerate(experts))
        local_loss = (mixed - target).square().mean()
        local_loss.backward()
        for optimizer in theirs:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(loss, local_loss, rtol=1e-4, atol=1e-5)
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.8


def test_one_exchange_per_node_and_pass_through_the_real_directory(nodes: Nodes, swarm: p2pmoe.Swarm) -> None:
    moe = mixture(swarm)
    moe(torch.randn(1, 4))
    exchanges = swarm.dispatcher.exchanges
    y = moe(torch.randn(40, 3, 4))
    assert swarm.dispatcher.exchanges - exchanges == 2
    y.sum().backward()
    assert swarm.dispatcher.exchanges - exchanges == 4


def test_trainers_beside_each_other_share_the_experts(nodes: Nodes) -> None:
    before = backend(nodes, "ffn.0.0").update_count

    def train(seed: int) -> float:
        with p2pmoe.Swarm(initial_peers=[nodes[seed % 2].dht_address]) as swarm:
            moe = mixture(swarm, k_best=2)
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            for _ in range(5):
                loss = (moe(x) - x).square().mean()
                loss.backward()
            return loss.item()

    losses = run_threads([lambda seed=seed: train(seed) for seed in range(4)], timeout_s=40)
    assert all(loss < 100 for loss in losses)
    updates = sum(backend(nodes, f"ffn.{i}.{j}").update_count for i in range(2) for j in range(2))
    assert updates > before


async def test_from_a_notebook(nodes: Nodes) -> None:
    """A loop runs already: the blocking form, the awaited form, and both kinds of `with`."""
    with p2pmoe.Swarm(initial_peers=[nodes[0].dht_address]) as swarm:
        moe = mixture(swarm)
        x = torch.randn(3, 4, requires_grad=True)
        y = moe(x)
        async with asyncio.timeout(20):
            torch.testing.assert_close(await moe.acall(x), y)
        y.sum().backward()
        assert x.grad is not None
    async with asyncio.timeout(20), p2pmoe.Swarm(initial_peers=[nodes[1].dht_address]) as swarm:
        assert (await swarm.expert("solo.0").acall(torch.ones(2, 4))).shape == (2, 4)


def test_the_state_dict_of_a_mixture_is_its_gate(swarm: p2pmoe.Swarm) -> None:
    moe = mixture(swarm)
    assert set(moe.state_dict()) == {"gate.proj.weight", "gate.proj.bias"}
    other = mixture(swarm)
    other.load_state_dict(moe.state_dict())
    assert same_bits(moe.gate.proj.weight, other.gate.proj.weight)
