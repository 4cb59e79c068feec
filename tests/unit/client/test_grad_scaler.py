"""skip_non_finite: a loss scaler tries a scale that is too large, nobody is told, and it goes on with a smaller one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from swarm_kit import World, grid_backends, make_backend, open_world, same_bits
from torch import nn

import p2pmoe
from p2pmoe import BatchTensorProto as P
from p2pmoe.config import GateConfig
from p2pmoe.errors import BadRequestError, ExpertsUnavailableError
from p2pmoe.metrics import NodeMetrics
from p2pmoe.server.screening import guard_experts

D = 4


@pytest.fixture
def world(carrier: str) -> Iterator[World]:
    """Two nodes with the gates that every node has by default."""
    hosts = {"alice": grid_backends([0], lr=0.0), "bob": grid_backends([1], lr=0.0)}
    for backends in hosts.values():
        guard_experts(backends, GateConfig(), NodeMetrics())
    with open_world(hosts, carrier=carrier) as world:
        yield world


def updates(world: World) -> int:
    return sum(backend.update_count for peer in world.peers.values() for backend in peer.backends.values())


def make_layers(world: World, **options: Any) -> dict[str, nn.Module]:
    switch = p2pmoe.RemoteSwitchMixtureOfExperts(
        world.swarm, in_features=D, grid_size=(2, 2), uid_prefix="ffn", jitter_eps=0.0, **options
    )
    return {
        "expert": world.swarm.expert("ffn.0.0", **options),
        "mixture": world.mixture(k_best=4, **options),
        "switch": switch,
    }


def output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_sent_and_the_scaler_sees_it(world: World, bad: float) -> None:
    for name, layer in make_layers(world, skip_non_finite=True).items():
        x = torch.randn(3, D, requires_grad=True)
        y = output(layer, x)
        gradient = torch.ones(3, D)
        gradient[1, 2] = bad
        exchanges = world.swarm.dispatcher.exchanges
        y.backward(gradient)
        assert world.swarm.dispatcher.exchanges == exchanges, name
        assert not x.grad.isfinite().any(), name
        for parameter in layer.parameters():
            assert not parameter.grad.isfinite().all(), name
    assert updates(world) == 0
    assert world.swarm.trust.standing.snapshot() == []


def test_finite_gradients_go_as_ever(world: World) -> None:
    for layer in make_layers(world, skip_non_finite=True).values():
        x = torch.randn(3, D, requires_grad=True)
        before = updates(world)
        output(layer, x).sum().backward()
        assert x.grad.isfinite().all()
        assert updates(world) > before


def test_without_the_option_it_is_a_typed_error_that_names_it(world: World) -> None:
    layers = make_layers(world)
    for name, error in (
        ("expert", BadRequestError),
        ("mixture", ExpertsUnavailableError),
        ("switch", ExpertsUnavailableError),
    ):
        y = output(layers[name], torch.randn(3, D, requires_grad=True))
        with pytest.raises(error, match="skip_non_finite=True"):
            y.backward(torch.full((3, D), math.inf))
    assert updates(world) == 0


class Trunk(nn.Module):
    """A float16 model around a remote layer, as autocast makes one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner, self.layer, self.head = nn.Linear(D, D), layer, nn.Linear(D, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(output(self.layer, self.inner(x)))


@pytest.mark.parametrize("kind", ["expert", "mixture", "switch"])
def test_a_real_scaler_backs_off_and_then_trains(world: World, kind: str) -> None:
    """2**40 overflows float16 in the backward pass; the scaler halves its scale until it does not."""
    torch.manual_seed(5)
    model = Trunk(make_layers(world, skip_non_finite=True)[kind])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-8, growth_interval=1000)
    x, target = torch.randn(8, D), torch.randn(8, 1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sent, scales = [], []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        sent.append(updates(world))
        if not sent[-1]:
            assert all(same_bits(a, b) for a, b in zip(before, model.parameters(), strict=True)), "the step was skipped"
    assert sent[0] == 0, "the first scale was too large, and nobody was told"
    assert scales[0] == 2.0**32
    assert sent[-1] > 0
    assert scales[-1] == scales[-2], "in the end it fits"
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not same_bits(before[0], next(iter(model.parameters())))


def test_what_a_codec_would_make_infinite_is_not_sent(carrier: str) -> None:
    schema = {"args_schema": (P(D),), "outputs_schema": P(D, codec="fp16")}
    with open_world({"alice": [make_backend("ffn.0", lr=0.0, **schema)]}, carrier=carrier) as world:
        expert = world.swarm.expert("ffn.0", skip_non_finite=True)
        x = torch.randn(3, D, requires_grad=True)
        expert(x).backward(torch.full((3, D), 1e6))
        assert x.grad.isnan().all()
        assert world.backend("ffn.0").update_count == 0


def test_integer_and_unneeded_inputs_get_no_gradient() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor, index: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * self.weight + index + y

    schema = {"args_schema": (P(D), P(D, dtype=torch.int64), P(D))}
    with open_world({"alice": [make_backend("ffn.0", Table(), **schema)]}) as world:
        expert = world.swarm.expert("ffn.0", skip_non_finite=True)
        x, index, y = torch.randn(2, D, requires_grad=True), torch.ones(2, D).long(), torch.randn(2, D)
        expert(x, index, y).backward(torch.full((2, D), math.nan))
        assert x.grad.isnan().all()
        assert y.grad is None
        assert world.backend("ffn.0").update_count == 0


def test_nothing_is_looked_at_where_nobody_asks(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """The check costs nothing where it is not wanted."""
    from p2pmoe.client import graph

    seen: list[Callable[..., Any]] = []
    monkeypatch.setattr(graph, "is_finite", lambda tensors: seen.append(tensors) or True)
    world.swarm.expert("ffn.0.0")(torch.randn(3, D, requires_grad=True)).sum().backward()
    assert seen == []
