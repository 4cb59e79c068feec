"""One trial for experts that are alike: what dummy runs showed of one holds for the others. Knows modules and schemas.

Only code that is known is believed to behave alike: a tree of modules of torch.nn and of this package, with the same
settings, schema, device, and parameters and buffers of the same kind. What such modules do to shapes, generators and
rows is decided by those, never by the values of parameters. A class of somebody else may decide by anything, such as
a value, a global count or the time, so that every instance of it has a trial of its own, as every `ExpertBackend` has
that somebody makes himself.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Hashable, Iterable
from typing import Any, Final

import msgspec
import torch
from torch import nn

from p2pmoe.protocol.schema import BatchTensorProto, schema_to_json
from p2pmoe.server.trial import Findings, examine

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, BatchTensorProto)
_REGISTERS: Final = ("_parameters", "_buffers", "_modules")
_FUNCTIONS: Final = (types.FunctionType, types.BuiltinFunctionType)
_PACKAGES: Final = ("torch.", "p2pmoe.")


class SharedTrials:
    """The findings of one making of many experts. It holds nothing of the experts but descriptions."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Findings, tuple[int, ...]]] = {}

    def __repr__(self) -> str:
        return f"<SharedTrials: {len(self._known)} kinds>"

    def examine(
        self, name: str, expert: nn.Module, forward_schema: Any, device: torch.device, given: Any = None
    ) -> Findings:
        """As `trial.examine`, which runs only for the first of those that are alike. Raises SchemaError as it does."""
        description = describe_behaviour(expert)
        if description is None:
            return examine(name, expert, forward_schema, device, given)
        schemas = msgspec.json.encode((schema_to_json(forward_schema), given and schema_to_json(given)))
        key = (description, schemas, device)
        parameters = list(expert.parameters())
        if key not in self._known:
            findings = examine(name, expert, forward_schema, device, given)
            places = {id(each): index for index, each in enumerate(parameters)}
            rewritten = tuple(places[id(each)] for each in findings.rewritten)
            self._known[key] = dataclasses.replace(findings, rewritten=()), rewritten
            return findings
        findings, rewritten = self._known[key]
        return dataclasses.replace(findings, rewritten=tuple(parameters[index] for index in rewritten))


def describe_behaviour(expert: nn.Module) -> Hashable | None:
    """What decides the behaviour of modules whose code is known; None where something else may.

    Equal descriptions: the same classes with the same settings under the same names, and parameters and buffers of
    the same kind, shared between modules in the same way.
    """
    seen: dict[int, int] = {}
    parts: list[Hashable] = []
    for name, module in expert.named_modules(remove_duplicate=False):
        if not _is_known_class(type(module)):
            return None
        settings = _settings_of(module)
        if settings is None:
            return None
        tensors = tuple(
            (key, _tensor(value, seen))
            for register in (module._parameters, module._buffers)  # noqa: SLF001
            for key, value in register.items()
        )
        parts.append((name, type(module), seen.setdefault(id(module), len(seen)), settings, tensors))
    return tuple(parts)


def _is_known_class(kind: type) -> bool:
    """A class that its package has under this name: nobody's subclass, nor one made for an instance."""
    if not kind.__module__.startswith(("torch.nn.modules.", "p2pmoe.server.layers")):
        return False
    return getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind


def _settings_of(module: nn.Module) -> Hashable | None:
    found = []
    for key, value in vars(module).items():
        if key in _REGISTERS:
            continue
        frozen = _frozen(value)
        if frozen is None:
            return None
        found.append((key, frozen))
    return tuple(found)


def _frozen(value: Any) -> Hashable | None:
    """A setting as something to compare, with its type: 1 is not True. None where it may hide anything."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if isinstance(value, _FUNCTIONS):
        return value if (value.__module__ or "").startswith(_PACKAGES) else None
    if kind in (tuple, list):
        return _all_frozen(kind, value)
    return (kind,) if isinstance(value, (dict, set, frozenset)) and not value else None  # hooks that nobody has set


def _all_frozen(kind: type, values: Iterable[Any]) -> Hashable | None:
    frozen = tuple(map(_frozen, values))
    return None if None in frozen else (kind, frozen)


def _tensor(tensor: torch.Tensor | None, seen: dict[int, int]) -> Hashable:
    if tensor is None:
        return None
    return (
        seen.setdefault(id(tensor), len(seen)),
        type(tensor),
        tensor.dtype,
        tensor.shape,
        tensor.layout,
        tensor.device,
        tensor.requires_grad,
        tensor.is_inference(),
        tensor.stride() if tensor.layout is torch.strided else None,
    )
