"""Plain values that hold tensors, as JSON beside named tensors, and back. Knows torch; nothing of experts or files.

None, true, 3, "text", 0.1    themselves
nan, inf, -inf                {"float": "nan"}
[1, 2]                        [1, 2]
(1, 2)                        {"tuple": [1, 2]}
{"a": 1}                      {"dict": {"a": 1}}
a tensor                      {"tensor": "its name"}, {"complex": "its name"} for pairs of real numbers,
{"sparse": {"size": […], "indices": "…", "values": …}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from p2pmoe.errors import StateError

MAX_DEPTH: Final = 16
Copy = Callable[[torch.Tensor], torch.Tensor]


class TreeWriter:
    """Takes tensors out of values. `copy` gives what is kept of a dense tensor: on the CPU and contiguous."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self.tensors: dict[str, torch.Tensor] = {}

    def write(self, name: str, value: Any, depth: int = MAX_DEPTH) -> Any:
        """A value as JSON; its tensors are called `name`, `name/key`, `name/0`. Raises StateError."""
        if isinstance(value, torch.Tensor):
            return self._write_tensor(name, value)
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int) and type(value) is int and -(2**63) <= value < 2**63:
            return value
        if isinstance(value, float) and type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if depth and type(value) in (list, tuple):
            items = [self.write(f"{name}/{index}", each, depth - 1) for index, each in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if depth and isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: self.write(f"{name}/{key}", each, depth - 1) for key, each in value.items()}}
        raise StateError(f"{name}: {type(value).__name__} cannot be kept; numbers, texts, lists, dicts and tensors can")

    def _write_tensor(self, name: str, tensor: torch.Tensor) -> Any:
        tensor = tensor.detach()
        if tensor.layout is torch.sparse_coo:
            tensor = tensor.coalesce()
            return {
                "sparse": {
                    "size": list(tensor.shape),
                    "indices": self._write_tensor(f"{name}/indices", tensor.indices()),
                    "values": self._write_tensor(f"{name}/values", tensor.values()),
                }
            }
        if tensor.layout is not torch.strided:
            raise StateError(f"{name}: a tensor of layout {tensor.layout} cannot be kept")
        if tensor.is_complex():
            self.tensors[name] = self._copy(torch.view_as_real(tensor.resolve_conj()))
            return {"complex": name}
        self.tensors[name] = self._copy(tensor)
        return {"tensor": name}


class TreeReader:
    """Puts tensors back into values. Raises StateError for what `TreeWriter` never wrote."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def read(self, tree: Any, depth: int = MAX_DEPTH + 4) -> Any:
        """The value."""
        if tree is None or isinstance(tree, bool | str | int | float):
            return tree
        if depth and isinstance(tree, list):
            return [self.read(each, depth - 1) for each in tree]
        if not depth or not isinstance(tree, dict) or len(tree) != 1:
            raise StateError("a value of the checkpoint is of no known form")
        ((kind, inside),) = tree.items()
        if kind == "tuple" and isinstance(inside, list):
            return tuple(self.read(each, depth - 1) for each in inside)
        if kind == "dict" and isinstance(inside, dict):
            return {key: self.read(each, depth - 1) for key, each in inside.items()}
        if kind == "float" and inside in ("nan", "inf", "-inf"):
            return float(inside)
        return self._read_tensor(kind, inside)

    def _read_tensor(self, kind: str, inside: Any) -> torch.Tensor:
        try:
            if kind == "tensor":
                return self._tensors[inside]
            if kind == "complex":
                return torch.view_as_complex(self._tensors[inside])
            if kind == "sparse":
                indices, values = (self.read(inside[key], 2) for key in ("indices", "values"))
                return torch.sparse_coo_tensor(
                    indices, values, inside["size"], check_invariants=True, is_coalesced=True
                )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StateError(f"a tensor of the checkpoint cannot be read: {error}") from error
        raise StateError(f"the checkpoint has a value of an unknown form, {kind!r:.40}")
