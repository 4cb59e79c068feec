"""Copies of models with remote layers share the swarm; pickles are refused; parameters behave as any module's."""

from __future__ import annotations

import copy
import io
import pickle  # noqa: TID251 - to see it refused
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler  # noqa: TID251 - to see it refused
from typing import Any

import pytest
import torch
from swarm_kit import World, grid_backends, make_backend, open_world, run_threads, same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

import p2pmoe
from p2pmoe.client.directory import StaticDirectory
from p2pmoe.errors import LocalError, NotPicklableError

D = 4


@pytest.fixture
def world() -> Iterator[World]:
    hosts = {"alice": [*grid_backends([0], lr=0.0), make_backend("lone.0", lr=0.0)], "bob": grid_backends([1], lr=0.0)}
    with open_world(hosts) as world:
        yield world


def model_of(world: World) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, D), world.mixture(), world.swarm.expert("lone.0"), nn.Linear(D, 1))


def test_a_deep_copy_shares_the_swarm_and_copies_the_parameters(world: World) -> None:
    model = model_of(world)
    for called_before in (False, True):
        if called_before:
            model(torch.randn(2, D))
        other = copy.deepcopy(model)
        assert other[1].swarm is other[2].swarm is world.swarm
        assert other[1]._passes._swarm is world.swarm
        assert other[1].gate.proj.weight is not model[1].gate.proj.weight
        x = torch.randn(3, D)
        assert same_bits(other(x), model(x))
        with torch.no_grad():
            other[1].gate.proj.weight.mul_(-3.0)
        assert not same_bits(other(x), model(x))
        other(x).sum().backward()
        assert model[1].gate.proj.weight.grad is None
    assert copy.copy(world.swarm) is copy.deepcopy(world.swarm) is world.swarm
    assert [each.name for each in threading.enumerate()].count("p2pmoe-swarm") == 1


def test_a_copy_of_a_layer_before_the_swarm_is_opened() -> None:
    swarm = p2pmoe.Swarm(directory=StaticDirectory({}))
    layer = p2pmoe.RemoteMixtureOfExperts(swarm, in_features=D, grid_size=(2,), uid_prefix="ffn", k_best=1)
    assert copy.deepcopy(layer).swarm is swarm


def test_averaged_models_work(world: World) -> None:
    model = model_of(world)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    x = torch.randn(3, D)
    torch.testing.assert_close(averaged(x), model(x))


def save(model: Any) -> None:
    torch.save(model, io.BytesIO())  # noqa: TID251 - to see it refused


@pytest.mark.parametrize("write", [pickle.dumps, ForkingPickler.dumps, save])
def test_pickling_is_refused_and_says_what_to_do(world: World, write: Callable[[Any], Any]) -> None:
    model = model_of(world)
    model(torch.randn(2, D))
    for each in (world.swarm, model, model[1], model[2], {"layer": model[2]}):
        with pytest.raises(NotPicklableError, match="state_dict") as caught:
            write(each)
        assert isinstance(caught.value, (LocalError, TypeError))
    model(torch.randn(2, D))


class Items(Dataset[torch.Tensor]):
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((D,), float(index))


def test_a_data_loader_that_starts_processes_anew_says_it_too(world: World) -> None:
    loader = DataLoader(Items(world.swarm.expert("lone.0")), num_workers=1, multiprocessing_context="spawn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch adds its own advice
        with pytest.raises(NotPicklableError, match="data loader"):
            next(iter(loader))


def test_state_goes_through_state_dict(world: World) -> None:
    model, other = model_of(world), model_of(world)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)  # noqa: TID251 - as users do
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))  # noqa: TID251 - as users do
    assert sorted(model[1].state_dict()) == ["gate.proj.bias", "gate.proj.weight"]
    assert model[2].state_dict() == {}
    x = torch.randn(3, D)
    assert same_bits(other(x), model(x))
    other.load_state_dict(model.state_dict(), assign=True)
    assert same_bits(other(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_may_be_cast_as_a_whole(world: World, dtype: torch.dtype) -> None:
    model = model_of(world).to(dtype)
    x = torch.randn(3, D, dtype=dtype)
    y = model(x)
    assert y.dtype is dtype
    y.float().sum().backward()
    assert all(parameter.grad.dtype is dtype for parameter in model.parameters())


def test_shared_memory_and_replicas_in_threads(world: World) -> None:
    """What DataParallel makes of a module, without its devices."""
    model = model_of(world).share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    x = torch.randn(3, D)
    expected = model(x).detach()
    replicas = [each._replicate_for_data_parallel() for each in (model[1], model[1])]
    assert all(each.swarm is world.swarm for each in replicas)
    for replica in replicas:
        replica.gate = model[1].gate
    hidden = model[0](x).detach()
    mixed = [each.detach() for each in run_threads([lambda each=each: each(hidden) for each in replicas])]
    for each in mixed:
        torch.testing.assert_close(model[3](model[2](each)), expected)
    assert same_bits(nn.DataParallel(model)(x), expected)
