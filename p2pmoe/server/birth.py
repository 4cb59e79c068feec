"""What an expert was when it was made: who it is from then on, and what a checkpoint of it must fit. Knows torch."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from p2pmoe.protocol.schema import format_tensor

Groups = list[dict[str, Any]]
"""The options of an optimizer's groups, without the parameters."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The settings that an expert was made with."""

    kind: str
    hidden_dim: int
    options: dict[str, Any]


@dataclass(slots=True)
class Birth:
    """Of one expert."""

    module: str
    optimizer: str
    layout: dict[str, str]
    """Parameters and buffers by name: `float32[64, 16]`."""
    trained: list[list[str]]
    """The parameters of each of the optimizer's groups by name."""
    groups: Groups
    incarnation: str = field(default_factory=lambda: secrets.token_hex(16))
    """128 random bits in hexadecimal; an expert that is restored has that of its checkpoint."""
    run: str = field(default_factory=lambda: secrets.token_hex(4))
    """Of this process: an expert that is restored has another one."""
    origin: Origin | None = None


def birth_of(expert: nn.Module, optimizer: torch.optim.Optimizer) -> Birth:
    """As it is now."""
    names = {id(parameter): name for name, parameter in expert.named_parameters()}
    tensors = (*expert.named_parameters(), *expert.named_buffers())
    return Birth(
        module=type(expert).__qualname__,
        optimizer=type(optimizer).__qualname__,
        layout={name: describe_tensor(each) for name, each in tensors},
        trained=[[names.get(id(each), "") for each in group["params"]] for group in optimizer.param_groups],
        groups=options_of(optimizer),
    )


def describe_tensor(tensor: torch.Tensor) -> str:
    """`float32[64, 16]`."""
    return format_tensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def options_of(optimizer: torch.optim.Optimizer) -> Groups:
    """Copies of the options of its groups."""
    return [
        {
            key: value.detach().clone() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key != "params"
        }
        for group in optimizer.param_groups
    ]
