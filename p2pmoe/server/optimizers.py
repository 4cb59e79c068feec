"""Optimizers by name, with clipping, warm-up and decay as hooks of the step itself. Knows only torch.

The position in the schedule lives in the optimizer's own param groups, so its state dict carries it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from p2pmoe.config import OptimizerConfig
from p2pmoe.errors import ConfigError
from p2pmoe.server.step_guard import guard_steps

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that a config section describes. Raises ConfigError."""
    kind = OPTIMIZERS.get(config.name)
    if kind is None:
        raise ConfigError(f"optimizer.name: unknown optimizer {config.name!r}; known: {', '.join(OPTIMIZERS)}")
    if config.decay != "none" and config.total_steps is None:
        raise ConfigError(f"optimizer.total_steps: needed by decay = {config.decay!r}")
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()
    }
    known = inspect.signature(kind).parameters
    if unknown := [key for key in options if key not in known or key in ("params", "lr")]:
        raise ConfigError(f"optimizer.options.{unknown[0]}: {config.name} takes {', '.join(list(known)[2:])}")
    if "fused" in known and not {"foreach", "capturable", "differentiable"} & options.keys():
        options.setdefault("fused", True)  # one pass over memory a step instead of several
    try:
        optimizer = kind(parameters, lr=config.lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer.options: {config.name} does not take {config.options}: {error}") from error
    guard_steps(optimizer, config.clip_grad_norm)  # before the schedule: a refused step must not move it
    if config.warmup_steps or config.decay != "none":
        _Schedule(config).attach(optimizer)
    return optimizer


def schedule_factor(config: OptimizerConfig, step: int) -> float:
    """What the learning rate is multiplied with at a step, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "none" or config.total_steps is None:
        return 1.0
    length = max(1, config.total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / length)
    remaining = 1.0 - progress if config.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * remaining


class _Schedule:
    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
            group["schedule_step"] = 0
        optimizer.register_step_pre_hook(self)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule_factor(self._config, group["schedule_step"])
            group["schedule_step"] += 1
