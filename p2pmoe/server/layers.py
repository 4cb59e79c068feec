"""Built-in experts and the register of the user's own. Plain modules: they know nothing of being served.

The built-in ones are float32 whatever torch's default dtype is: a swarm has one schema.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from p2pmoe.errors import ConfigError, P2PMoEError, SchemaError, describe
from p2pmoe.protocol.nested import nested_map
from p2pmoe.protocol.schema import BatchTensorProto
from p2pmoe.server.backend import DUMMY_BATCH_SIZE

logger = logging.getLogger(__name__)

ModuleClass = TypeVar("ModuleClass", bound=Callable[..., nn.Module])
SampleInput = Callable[[int, int], Any]


@dataclass(frozen=True, slots=True)
class ExpertClass:
    """A registered kind of expert."""

    make: Callable[..., nn.Module]
    sample_input: SampleInput


expert_classes: dict[str, ExpertClass] = {}


def register_expert_class(name: str, sample_input: SampleInput) -> Callable[[ModuleClass], ModuleClass]:
    """A decorator that makes a module class available as `[experts] kind` in node.toml.

    Args:
        name: the kind.
        sample_input: `(batch_size, hidden_dim)` -> what the module is called with: a tensor, a tuple of
            positional arguments, or a dict of keyword arguments; tensors of [batch_size, …] or BatchTensorProto.

    The class is made as `cls(hidden_dim, **options)`. An instance with attributes `args_schema` or `kwargs_schema`
    speaks for itself: then `sample_input` is not asked. A class of the same name from the same module replaces its
    former self, as when a cell of a notebook is run again. Raises ConfigError when another one has the name.
    """

    def register(make: ModuleClass) -> ModuleClass:
        known = expert_classes.get(name)
        if known is not None and known.make is not make:
            if not _is_former_self(known.make, make):
                raise ConfigError(
                    f"expert class {name!r} is registered already, as {_name_of(known.make)}; choose another name"
                )
            logger.info("expert class %r was registered before; %s replaces it", name, _name_of(make))
        expert_classes[name] = ExpertClass(make, sample_input)
        return make

    return register


def _is_former_self(known: object, make: object) -> bool:
    names = [(getattr(each, "__module__", None), getattr(each, "__qualname__", None)) for each in (known, make)]
    return None not in names[0] and (names[0] == names[1] or names[0][0] == names[1][0] == "__main__")


def _name_of(make: object) -> str:
    name = getattr(make, "__qualname__", None)
    return f"{getattr(make, '__module__', '?')}.{name}" if name else repr(make)


def make_expert(
    kind: str, hidden_dim: int, options: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A module of a registered kind, with the schemas of its arguments.

    Raises:
        ConfigError: the kind is unknown, does not take these options, or is no class of modules.
        SchemaError: its `sample_input` gives something else than tensors.
    """
    expert_class = expert_classes.get(kind)
    if expert_class is None:
        known = ", ".join(sorted(expert_classes))
        raise ConfigError(f"experts.kind: unknown kind {kind!r}; known: {known}; list your own in experts.modules")
    call = f"hidden_dim={hidden_dim}, {options}"
    with _blaming(f"experts.options: {kind} does not take {call}"):
        module = expert_class.make(hidden_dim, **options)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"experts.kind: {kind} gave a {type(module).__name__}, which is no torch.nn.Module")
    args = getattr(module, "args_schema", None)
    kwargs = getattr(module, "kwargs_schema", None)
    if args is None and kwargs is None:
        with _blaming(f"experts.kind: sample_input({DUMMY_BATCH_SIZE}, {hidden_dim}) of {kind} failed"):
            sample = expert_class.sample_input(DUMMY_BATCH_SIZE, hidden_dim)
        args, kwargs = ((), sample) if isinstance(sample, dict) else (sample, {})
        args = args if isinstance(args, tuple) else (args,)
    return module, nested_map(_as_proto, tuple(args or ())), nested_map(_as_proto, dict(kwargs or {}))


@contextlib.contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Whatever a user's code raises here becomes a ConfigError that says what was asked of it."""
    try:
        yield
    except P2PMoEError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {describe(error)}") from error


def _as_proto(value: Any) -> BatchTensorProto:
    if isinstance(value, BatchTensorProto):
        return value
    if isinstance(value, torch.Tensor):
        return BatchTensorProto.from_tensor(value)
    raise SchemaError(f"sample_input must give tensors or BatchTensorProto, got {type(value).__name__}")


def _rows(batch_size: int, hidden_dim: int) -> BatchTensorProto:
    del batch_size
    return BatchTensorProto(hidden_dim)


@register_expert_class("ffn", _rows)
class FeedforwardExpert(nn.Module):
    """[B, hidden] -> [B, hidden]: two linear layers with a GELU between them, `inner_dim` wide (4 × hidden)."""

    def __init__(self, hidden_dim: int, *, inner_dim: int | None = None) -> None:
        super().__init__()
        inner_dim = inner_dim or 4 * hidden_dim
        self.up = nn.Linear(hidden_dim, inner_dim, dtype=torch.float32)
        self.activation = nn.GELU()
        self.down = nn.Linear(inner_dim, hidden_dim, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.activation(self.up(x)))
        return y


@register_expert_class("transformer", lambda _, hidden_dim: BatchTensorProto(64, hidden_dim))
class TransformerExpert(nn.Module):
    """[B, seq_len, hidden] -> the same: one pre-norm transformer encoder layer without dropout. 0 takes any length."""

    def __init__(self, hidden_dim: int, *, seq_len: int = 64, num_heads: int = 8, inner_dim: int | None = None) -> None:
        super().__init__()
        self.args_schema = (BatchTensorProto(seq_len or None, hidden_dim),)
        self.layer = nn.TransformerEncoderLayer(
            hidden_dim,
            num_heads,
            inner_dim or 4 * hidden_dim,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
            dtype=torch.float32,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


@register_expert_class("nop", _rows)
class NopExpert(nn.Module):
    """[B, hidden] -> a copy. For tests and benchmarks: what a call costs when the expert costs nothing."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.weight = nn.Parameter(
            torch.zeros(0, dtype=torch.float32, device="cpu")
        )  # optimizers refuse to have nothing to train

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


@register_expert_class(
    "det_dropout",
    lambda _, hidden_dim: (BatchTensorProto(hidden_dim), BatchTensorProto(hidden_dim, dtype=torch.uint8)),
)
class DeterministicDropoutExpert(nn.Module):
    """([B, hidden], keep mask uint8 [B, hidden]) -> [B, hidden]: dropout whose mask the caller draws.

    The server recomputes forward in every backward call, so randomness must travel with the call.
    """

    def __init__(self, hidden_dim: int, *, dropout: float = 0.2) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.keep = 1.0 - dropout
        self.up = nn.Linear(hidden_dim, 2 * hidden_dim, dtype=torch.float32)
        self.down = nn.Linear(2 * hidden_dim, hidden_dim, dtype=torch.float32)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x * mask.to(x.dtype) / self.keep)))
        return y
