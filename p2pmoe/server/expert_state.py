"""Everything that decides what an expert's next update will be, taken out of it and put back. Knows torch, no files.

What is taken (`take`): parameters, buffers (also those that no state dict has), gradients that an `apply_gradients` of
the user's has gathered, the optimizer's state and options, statistics of the gate, and what modules of the user's give
as `get_extra_state`. What is not: torch's generators (a call that draws brings its own seed) and plain attributes
(an expert that keeps state in them is refused when it is made, `trial.py`).

Options of the optimizer that the config says differently now than when the expert was made are the config's: a learning
rate can be changed. All others, a schedule's position among them, are those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import torch
from torch import nn

from p2pmoe.errors import StateError
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.birth import Groups, Origin, describe_tensor, options_of
from p2pmoe.server.checkpoints import Checkpoint, Made
from p2pmoe.server.module_state import write_back
from p2pmoe.server.screening import PassGate
from p2pmoe.server.state_tree import TreeReader, TreeWriter

Tensors = Mapping[str, torch.Tensor]
_PLAIN: Final = (bool, int, float, str)


@dataclass(frozen=True, slots=True)
class ExpertState:
    """A consistent copy of an expert."""

    updates: int
    schedule_step: int | None
    state: dict[str, Any]
    """JSON."""
    tensors: dict[str, torch.Tensor]
    """On the CPU, contiguous, the owner's alone."""


def take(backend: ExpertBackend) -> ExpertState:
    """A copy of everything. No pass may run meanwhile: on the device thread, with the expert `at_rest`.

    Raises StateError when something of it can be kept in no file.
    """
    writer = TreeWriter(_copy)
    expert, optimizer = backend.expert, backend.opt
    order = {id(each): index for index, each in enumerate(_trained(optimizer))}
    if any(id(each) not in order for each in optimizer.state):
        raise StateError(f"{type(optimizer).__qualname__} keeps state beside that of its parameters")
    state = {
        "parameters": {name: writer.write(f"parameter/{name}", each) for name, each in expert.named_parameters()},
        "buffers": {name: writer.write(f"buffer/{name}", each) for name, each in expert.named_buffers()},
        "gradients": {
            name: writer.write(f"gradient/{name}", each.grad)
            for name, each in expert.named_parameters()
            if each.grad is not None
        },
        "optimizer": {
            str(order[id(parameter)]): writer.write(f"optimizer/{order[id(parameter)]}", dict(each))
            for parameter, each in optimizer.state.items()
        },
        "born": writer.write("born", backend.birth.groups),
        "options": writer.write("options", options_of(optimizer)),
        "extra": {
            name: writer.write(f"extra/{name}", module.get_extra_state()) for name, module in _with_extras(backend)
        },
        "gate": gate.get_state() if isinstance(gate := backend.backward_pool.gate, PassGate) else None,
    }
    return ExpertState(backend.update_count, _schedule_step(optimizer), state, writer.tensors)


def made_of(backend: ExpertBackend) -> Made:
    """What a checkpoint must have been made as to fit."""
    birth = backend.birth
    origin = birth.origin or Origin("", 0, {})
    return Made(
        module=birth.module,
        schema_digest=backend.schema_digest,
        layout=birth.layout,
        optimizer=birth.optimizer,
        trained=birth.trained,
        kind=origin.kind or None,
        hidden_dim=origin.hidden_dim or None,
        options={key: _plain(value) for key, value in origin.options.items()},
    )


def misfit(then: Made, now: Made) -> str | None:
    """Why a checkpoint is of another expert than the one that is to go on from it; None when it fits."""
    if then.kind is not None and now.kind is not None:
        for what in ("kind", "hidden_dim", "options"):
            was, wanted = getattr(then, what), getattr(now, what)
            if was != wanted:
                return f"it was made with experts.{what} = {_shown(was)}, and is to be hosted with {_shown(wanted)}"
    if then.module != now.module:
        return f"it is a {then.module}, and a {now.module} is to be hosted"
    for name in sorted(then.layout.keys() | now.layout.keys()):
        was, wanted = then.layout.get(name, "nothing"), now.layout.get(name, "nothing")
        if was != wanted:
            return f"its {name} was made as {was}, and is {wanted} now"
    if then.optimizer != now.optimizer:
        return f"it was trained with {then.optimizer}, and is to be with {now.optimizer}"
    if then.trained != now.trained:
        return "its optimizer trains other parameters, or in another order"
    if then.schema_digest != now.schema_digest:
        return f"its schema was {then.schema_digest}, and is {now.schema_digest} now"
    return None


@torch.no_grad()
def put_back(backend: ExpertBackend, checkpoint: Checkpoint, tensors: Tensors) -> None:
    """Let an expert that was just made go on from a checkpoint.

    Raises StateError, with its tensors as they were, when the checkpoint does not fit it.
    """
    reason = misfit(checkpoint.made, made_of(backend))
    if reason is not None:
        raise StateError(reason)
    parts = _Parts(checkpoint.state, TreeReader(tensors))
    expert, optimizer = backend.expert, backend.opt
    parameters = dict(expert.named_parameters())
    values, buffers, gradients = parts.tensors("parameters"), parts.tensors("buffers"), parts.tensors("gradients")
    _check_parameters(parameters, values, gradients)
    trained = list(_trained(optimizer))
    states = _optimizer_states(parts, trained)
    options = _merged(parts.groups("born"), parts.groups("options"), backend.birth.groups, optimizer)
    extras = {name: parts.value("extra", name) for name, _ in _with_extras(backend)}
    _put_gate(backend, checkpoint.state.get("gate"))

    for name, parameter in parameters.items():
        write_back(parameter, values[name])
        parameter.grad = gradients[name].to(parameter.device).clone() if name in gradients else None
    _put_buffers(expert, buffers)
    optimizer.state.clear()
    for index, each in states.items():
        optimizer.state[trained[index]] = {
            key: _beside(trained[index], key, value, options[_group_of(optimizer, index)])
            for key, value in each.items()
        }
    for group, its_options in zip(optimizer.param_groups, options, strict=True):
        group.update(its_options)
    for name, module in _with_extras(backend):
        module.set_extra_state(extras[name])
    backend.kept.keep()
    backend.update_count = checkpoint.updates
    backend.birth.incarnation = checkpoint.incarnation


# -- private


class _Parts:
    """The state of a checkpoint. Raises StateError for what is not there or of another form."""

    def __init__(self, state: Mapping[str, Any], reader: TreeReader) -> None:
        self._state, self._reader = state, reader

    def value(self, part: str, name: str) -> Any:
        try:
            return self._reader.read(self._state[part][name])
        except (KeyError, TypeError) as error:
            raise StateError(f"it has no {part} of {name or 'the expert'}") from error

    def values(self, part: str) -> dict[str, Any]:
        tree = self._state.get(part)
        if not isinstance(tree, dict):
            raise StateError(f"it has no {part}")
        return {name: self._reader.read(each) for name, each in tree.items()}

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        values = self.values(part)
        if not all(isinstance(each, torch.Tensor) for each in values.values()):
            raise StateError(f"its {part} are no tensors")
        return values

    def groups(self, part: str) -> Groups:
        groups = self._reader.read(self._state.get(part))
        if not isinstance(groups, list) or not all(isinstance(each, dict) for each in groups):
            raise StateError(f"it has no {part} of the optimizer")
        return groups


def _check_parameters(parameters: Mapping[str, nn.Parameter], values: Tensors, gradients: Tensors) -> None:
    for name, parameter in parameters.items():
        for what, given in (("value", values.get(name)), ("gradient", gradients.get(name, parameter))):
            if given is None or given.shape != parameter.shape or given.dtype != parameter.dtype:
                got = "missing" if given is None else describe_tensor(given)
                raise StateError(f"the {what} of {name} is {got} where {describe_tensor(parameter)} is needed")


def _optimizer_states(parts: _Parts, trained: list[torch.Tensor]) -> dict[int, dict[str, Any]]:
    states: dict[int, dict[str, Any]] = {}
    for key, state in parts.values("optimizer").items():
        if not key.isascii() or not key.isdigit() or int(key) >= len(trained) or not isinstance(state, dict):
            raise StateError(f"it has optimizer state of a parameter {key!r:.20} that is not there")
        states[int(key)] = state
    return states


def _merged(born: Groups, saved: Groups, now: Groups, optimizer: torch.optim.Optimizer) -> Groups:
    """The checkpoint's options, but for those that are made otherwise now."""
    if not len(born) == len(saved) == len(now) == len(optimizer.param_groups):
        raise StateError("its optimizer has another number of groups")
    return [
        {
            key: value.to(made[key].device) if isinstance(value, torch.Tensor) else value
            for key, value in then.items()
            if key in made and key in first and _same(made[key], first[key])
        }
        for first, then, made in zip(born, saved, now, strict=True)
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one.cpu(), other.cpu())
    return type(one) is type(other) and bool(one == other)


def _beside(parameter: torch.Tensor, key: str, value: Any, options: Mapping[str, Any]) -> Any:
    """A value of the optimizer's state where the optimizer wants it: with the parameter, but for most step counts."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.layout is torch.strided and value.shape == parameter.shape:
        memory = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
        return memory.copy_(value)
    on_device = key != "step" or options.get("fused") or options.get("capturable")
    return value.to(parameter.device if on_device else "cpu", copy=True)


def _put_gate(backend: ExpertBackend, state: Any) -> None:
    gate = backend.backward_pool.gate
    if not isinstance(gate, PassGate) or state is None:
        return
    try:
        gate.set_state(state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StateError(f"what the gate has learnt cannot be read: {error}") from error


def _put_buffers(expert: nn.Module, values: Tensors) -> None:
    """In place where they are alike: others may hold the same tensor. Passes may resize, replace, add buffers."""
    now = dict(expert.named_buffers())
    for name, value in values.items():
        buffer = now.get(name)
        if buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype:
            write_back(buffer, value)
            if torch.equal(buffer.cpu(), value):
                continue
        path, _, leaf = name.rpartition(".")
        copy = value.to(buffer.device if buffer is not None else next(_devices(expert), "cpu"), copy=True)
        owner = expert.get_submodule(path)
        if buffer is not None or leaf in dict(owner.named_buffers(recurse=False)) or hasattr(owner, leaf):
            setattr(owner, leaf, copy)
        else:
            owner.register_buffer(leaf, copy, persistent=False)
    for name in now.keys() - values.keys():
        path, _, leaf = name.rpartition(".")
        setattr(expert.get_submodule(path), leaf, None)


def _devices(expert: nn.Module) -> Iterator[torch.device]:
    for tensor in (*expert.parameters(), *expert.buffers()):
        yield tensor.device


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _group_of(optimizer: torch.optim.Optimizer, index: int) -> int:
    for number, group in enumerate(optimizer.param_groups):
        index -= len(group["params"])
        if index < 0:
            return number
    raise AssertionError(index)


def _schedule_step(optimizer: torch.optim.Optimizer) -> int | None:
    return next((group["schedule_step"] for group in optimizer.param_groups if "schedule_step" in group), None)


def _with_extras(backend: ExpertBackend) -> Iterator[tuple[str, nn.Module]]:
    """Modules that say what else they are, the backend itself among them."""
    for name, module in backend.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield name, module


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, its own memory."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor)


def _plain(value: Any) -> Any:
    """An option as JSON; what is none by its name, which is the same at every start."""
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()[:200]
