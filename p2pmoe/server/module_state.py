"""A module as a call finds it and as the next one must: modes, random numbers, parameters and plain attributes.

Knows torch; nothing of schemas, batches or calls. Buffers that passes write are `buffers.py`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn

from p2pmoe.protocol.drawing import our_turn

_PLAIN: Final = (torch.Tensor, int, float, complex, str, tuple, type(None))
"""Attributes that forward replaces. Others, such as a cache in a dict, are written in place or belong to a library."""


class Evaluating:
    """All of these modules in `eval()`, and afterwards each as it was: the owner may have frozen some of them."""

    __slots__ = ("_modules", "_training")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._training: list[nn.Module] = []

    def __enter__(self) -> None:
        self._training = [module for module in self._modules if module.training]
        for module in self._training:
            _set_mode(module, is_training=False)

    def __exit__(self, *_: object) -> None:
        for module in self._training:
            _set_mode(module, is_training=True)


def _set_mode(module: nn.Module, *, is_training: bool) -> None:
    attributes = vars(module)
    if "training" in attributes:
        attributes["training"] = is_training  # `nn.Module.__setattr__` takes twenty times as long
    else:
        module.training = is_training  # a property, as compiled and scripted modules have it


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers of torch begin with `seed`, on the CPU and on `device`; the generators are put back afterwards.

    Of this process no other expert draws meanwhile. Other code that does would draw from the same generators.
    """
    with our_turn():
        generators = _generators(device)
        states = [each.get_state() for each in generators]
        try:
            for each in generators:
                each.manual_seed(seed)
            yield
        finally:
            for each, state in zip(generators, states, strict=True):
                each.set_state(state)


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """What tells whether anything was drawn in between."""
    return [each.get_state() for each in _generators(device)]


class _DeviceGenerator:
    """The generator of a device whose module has functions for it, such as `torch.mps`."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def get_state(self) -> torch.Tensor:
        state: torch.Tensor = self._module.get_rng_state()
        return state

    def set_state(self, state: torch.Tensor) -> None:
        self._module.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        self._module.manual_seed(seed)


def _generators(device: torch.device) -> list[Any]:
    generators: list[Any] = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.init()  # the tuple is empty before
        generators.append(torch.cuda.default_generators[index])
    elif device.type not in ("cpu", "meta"):
        module = torch.get_device_module(device)
        if hasattr(module, "get_rng_state") and hasattr(module, "manual_seed"):
            generators.append(_DeviceGenerator(module))
    return generators


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[list[tuple[nn.Parameter, torch.Tensor]]]:
    """Puts everything back: parameters and buffers (also those that were replaced or added), gradients, modes, and
    what plain attributes held. Gives the parameters with copies of their values.
    """
    modules = list(module.modules())
    values = [(each, each.detach().clone()) for each in module.parameters()]
    buffers_then = [(each, each.detach().clone()) for each in module.buffers()]
    gradients = [(each, each.grad, None if each.grad is None else each.grad.clone()) for each in module.parameters()]
    registers: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (register, dict(register))
        for each in modules
        for register in (each._parameters, each._buffers, each._modules)  # noqa: SLF001
        if isinstance(register, dict)  # of a scripted module they are views, into which nothing new can be put
    ]
    attributes = [dict(vars(each)) for each in modules]
    try:
        yield values
    finally:
        for each, before in zip(modules, attributes, strict=True):
            _put_back_attributes(each, before)
        for now, then in registers:
            if len(now) != len(then) or any(now.get(key) is not value for key, value in then.items()):
                now.clear()
                now.update(then)
        with torch.no_grad():
            for tensor, value in (*values, *buffers_then):
                write_back(tensor, value)
            for parameter, gradient, copy in gradients:
                parameter.grad = gradient
                if gradient is not None and copy is not None:
                    write_back(gradient, copy)


def _put_back_attributes(module: nn.Module, before: dict[str, Any]) -> None:
    now = vars(module)
    for name in [name for name, value in now.items() if name not in before and isinstance(value, _PLAIN)]:
        del now[name]
    for name, value in before.items():
        if isinstance(value, _PLAIN) and now.get(name) is not value:
            now[name] = value


def write_back(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`copy_`, but for tensors that hold one number in several places, which torch never writes in place."""
    if tensor.layout is torch.strided and any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        return
    tensor.detach().copy_(value)
