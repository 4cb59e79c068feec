"""Optimizers by name, with clipping, warm-up and decay as hooks of the step itself. Knows only torch.

The position in the schedule lives in the optimizer's own param groups, so its state dict carries it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

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


_SPARSE_ONLY: Final[dict[str, Callable[..., torch.optim.Optimizer]]] = {"sparse_adam": torch.optim.SparseAdam}
_SPARSE_TOO: Final = ("sgd", "adagrad", "sparse_adam")
_DENSE_ONLY: Final = (
    torch.optim.Adam,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


class NoOptimizer(torch.optim.Optimizer):
    """Of experts that are not trained, those without parameters among them: a step does nothing."""

    def __init__(self) -> None:
        super().__init__([{"params": []}], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that a config section describes. Raises ConfigError."""
    if config.name == "none":
        return NoOptimizer()
    kind = OPTIMIZERS.get(config.name) or _SPARSE_ONLY.get(config.name)
    if kind is None:
        known_names = ", ".join([*OPTIMIZERS, *_SPARSE_ONLY, "none"])
        why = " (it computes a step's loss several times, which a node cannot)" if config.name == "lbfgs" else ""
        raise ConfigError(f"optimizer.name: unknown optimizer {config.name!r}{why}; known: {known_names}")
    if config.decay != "none" and config.total_steps is None:
        raise ConfigError(f"optimizer.total_steps: needed by decay = {config.decay!r}")
    parameters = list(parameters)
    if not parameters:
        raise ConfigError("optimizer.name: the experts have no parameters to train; set optimizer.name = 'none'")
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()
    }
    known = _parameters_of(kind)
    if unknown := [key for key in options if key not in known or key in ("params", "lr")]:
        raise ConfigError(f"optimizer.options.{unknown[0]}: {config.name} takes {', '.join(list(known)[2:])}")
    suits = all(each.is_floating_point() for each in parameters if not nn.parameter.is_lazy(each))
    if "fused" in known and suits and not {"foreach", "capturable", "differentiable"} & options.keys():
        options.setdefault("fused", True)  # one pass over memory a step instead of several
    try:
        optimizer = kind(parameters, lr=config.lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer.options: {config.name} does not take {config.options}: {error}") from error
    guard_steps(optimizer, config.clip_grad_norm)  # before the schedule: a refused step must not move it
    if config.warmup_steps or config.decay != "none":
        _Schedule(config).attach(optimizer)
    return optimizer


@functools.lru_cache(maxsize=64)
def _parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Of a class or a function of one: to read them takes half as long as to make an expert."""
    return inspect.signature(function).parameters


def check_optimizer(name: str, expert: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """That an optimizer can step with the gradients of an expert. Raises ConfigError in words.

    Sparse gradients are known by the modules that say `sparse=True`, as `nn.Embedding` does.
    """
    if "step" in vars(optimizer):  # as schedulers of torch wrap it
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    else:
        closure = _parameters_of(type(optimizer).step).get("closure")
    kind = type(optimizer).__name__
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{name}: {kind} needs a closure that computes the loss again, which is not here but with the caller; use "
            f"one of {', '.join(OPTIMIZERS)}"
        )
    sparse = {
        id(parameter)
        for module in expert.modules()
        if getattr(module, "sparse", False) is True
        for parameter in module.parameters(recurse=False)
    }
    trained = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    takes = " and ".join(_SPARSE_TOO[:2])
    if isinstance(optimizer, torch.optim.SparseAdam):
        if any(id(parameter) not in sparse for _, parameter in trained):
            raise ConfigError(
                f"{name}: SparseAdam trains nothing but embeddings with sparse=True, and the expert has other "
                f"parameters; use {takes}, which take both"
            )
        return
    for group, parameter in trained:
        if id(parameter) not in sparse:
            continue
        if isinstance(optimizer, _DENSE_ONLY):
            raise ConfigError(
                f"{name}: {kind} takes no sparse gradients, which the expert's embedding with sparse=True gives; use "
                f"{', '.join(_SPARSE_TOO)}, or sparse=False"
            )
        if group.get("weight_decay"):
            raise ConfigError(
                f"{name}: {kind} takes no weight_decay with sparse gradients; leave it out, or sparse=True"
            )


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
