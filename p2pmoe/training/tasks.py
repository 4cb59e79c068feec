"""The tasks that can be trained, by name, and what a task is. Loads none of them; knows nothing of the swarm."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from p2pmoe.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What every task is made with."""

    hidden_dim: int
    batch_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Task:
    """Something to train: a model with a mixture inside, samples, and how good the model is on held-out ones."""

    model: nn.Module
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]]
    """Endless; each is (inputs, targets) with the batch first."""
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(outputs, targets) -> a scalar."""
    evaluate: Callable[[], float]
    """Held-out accuracy, from 0 to 1."""
    learning_rate: float


MakeTask = Callable[["nn.Module", TaskOptions], Task]
"""Puts a mixture, [B, hidden] -> [B, hidden], into a model of its own."""

TASKS: Final = {"digits": "p2pmoe.training.digits:make_digits_task"}
"""Name -> `module:function` that is a MakeTask."""


def find_task(name: str) -> MakeTask:
    """Load a task. Raises ConfigError for an unknown name, ImportError when its packages are missing."""
    home = TASKS.get(name)
    if home is None:
        raise ConfigError(f"unknown task {name!r}; tasks: {', '.join(sorted(TASKS))}")
    module, _, function = home.partition(":")
    make: MakeTask = getattr(importlib.import_module(module), function)  # noqa: TID251 - from the table above
    return make
