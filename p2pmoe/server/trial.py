"""What an expert does when it is run: found out by dummy runs before it serves anybody. Knows modules and schemas.

Rules:
1. The runs leave no trace: parameters, buffers, gradients, modes, plain attributes and generators are put back.
2. Two batch sizes are run: what only looks like rows at one of them is refused.
3. Both modes are run, so that a call that trains and one that evaluates get outputs of one schema.
4. The same run twice must give the same: an expert that keeps state where nobody sees it, or draws numbers that
   torch's seed does not decide, cannot have its forward pass computed again, and is refused.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import nn

from p2pmoe.errors import SchemaError
from p2pmoe.protocol.nested import nested_compare, nested_flatten, nested_map, nested_packer
from p2pmoe.protocol.schema import FREE_GROWTH, BatchTensorProto, format_schema, format_tensor
from p2pmoe.server.buffers import KeptBuffers
from p2pmoe.server.module_state import Evaluating, generator_states, seeded, untouched, write_back
from p2pmoe.types import MODES, Mode

DUMMY_BATCH_SIZE: Final = 3
"""Rows of the dummy run that finds `outputs_schema`."""
OTHER_BATCH_SIZE: Final = 5
"""Rows of the one that it is compared with."""
FREE_SIZE: Final = 4
"""Size of free dimensions in these runs."""
OTHER_FREE_SIZE: Final = 7
"""Their size in one more run, where there are any."""
_SEED: Final = 0x5EED
_MIXING: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPPING: Final = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

Flat = tuple[torch.Tensor, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Findings:
    """What the dummy runs showed."""

    outputs_schema: Any
    dtypes: tuple[torch.dtype, ...]
    """Of the outputs as the expert gives them; a schema that was given may name other floating ones."""
    draws: frozenset[Mode]
    """In which modes it draws random numbers."""
    mixes_rows: frozenset[Mode]
    """In which modes an output row depends on other rows of its batch."""
    works_in_place: bool
    """It writes to its inputs."""
    shares_state: bool
    """It gives outputs that are memory of its parameters or buffers."""
    rewritten: tuple[nn.Parameter, ...]
    """Parameters that forward writes to."""

    @property
    def repeatable(self) -> tuple[Mode, ...]:
        """In which modes the answer to a row depends on that row and the parameters alone."""
        return tuple(mode for mode in MODES if mode not in self.draws and mode not in self.mixes_rows)


def examine(name: str, expert: nn.Module, forward_schema: Any, device: torch.device, given: Any = None) -> Findings:
    """Run an expert on made-up rows. `given` is the schema of the outputs where the owner has stated one.

    Raises SchemaError when the expert cannot be served as it is, in words that say what to change.
    """
    return in_short_thread(lambda: _Trial(name, expert, forward_schema, device).findings(given))


def materialize(name: str, expert: nn.Module, forward_schema: Any) -> None:
    """Lazy modules get their parameters, drawn by torch's generator as it is. Raises SchemaError."""
    if _is_lazy(expert):
        in_short_thread(lambda: _materialize(name, expert, forward_schema, torch.device("cpu")))


def _materialize(name: str, expert: nn.Module, schema: Any, device: torch.device) -> None:
    if not _is_lazy(expert):
        return
    args, kwargs = nested_map(lambda proto: _sample(proto, device), schema)
    with Evaluating(list(expert.modules())), torch.no_grad():  # evaluating, so that it trains no statistics
        try:
            expert(*args, **kwargs)
        except Exception as error:
            raise SchemaError(
                f"{name}: the expert's lazy parameters cannot be made from its schema {format_schema(schema)}: "
                f"{type(error).__name__}: {_text(error)}"
            ) from error
    if _is_lazy(expert):
        raise SchemaError(f"{name}: some lazy parameters are used by no forward pass; make them, or leave them out")


def _is_lazy(expert: nn.Module) -> bool:
    return any(map(nn.parameter.is_lazy, (*expert.parameters(), *expert.buffers())))


def in_short_thread(function: Callable[[], T]) -> T:
    """The result of a function that ran in a thread of its own.

    Every thread that computes gets a team of OpenMP threads for as long as it lives, and with more teams than cores
    the runtime stops spinning between parallel sections: batches on the device thread would take 1.6 times as long
    (docs/adr/0002-threads.md). So the thread that makes experts must not keep a team. Nor do the modes of the thread
    that calls, such as `inference_mode`, reach into the run.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="p2pmoe-dummy-run") as executor:
        return executor.submit(function).result()


@dataclass(slots=True)
class _Run:
    outputs: Any
    flat: tuple[Any, ...]
    drew: bool
    drew_python: bool
    wrote_inputs: bool
    shares_state: bool


class _Trial:
    def __init__(self, name: str, expert: nn.Module, schema: Any, device: torch.device) -> None:
        self._name, self._expert, self._schema, self._device = name, expert, schema, device
        self._pack = nested_packer(schema)
        self._modules = list(expert.modules())
        self._is_free = any(proto.is_free for proto in nested_flatten(schema))
        self._values: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._rewritten: list[nn.Parameter] = []

    def findings(self, given: Any) -> Findings:
        _materialize(self._name, self._expert, self._schema, self._device)
        _refuse_inference_tensors(self._name, self._expert)
        with untouched(self._expert) as values, torch.no_grad():
            self._values = values
            runs = {mode: self._run_mode(mode) for mode in self._modes()}
        if len(runs) > 1:
            self._compare(runs["train"][0], runs["eval"][0], "in train mode", "in eval mode")
        first = next(iter(runs.values()))[0]
        every = [run for pair in runs.values() for run in pair]
        longer = next(iter(runs.values()))[2]
        found = nested_map(_as_proto, first.outputs, longer.outputs)
        draws = frozenset(mode for mode, pair in runs.items() if any(run.drew for run in pair) or self._drops(mode))
        mixes = frozenset(mode for mode in runs if self._mixes(mode, runs[mode], draws))
        return Findings(
            found if given is None else self._checked(given, found),
            tuple(output.dtype for output in first.flat),
            _also_eval(draws, runs),
            _also_eval(mixes, runs),
            any(run.wrote_inputs for run in every),
            any(run.shares_state for run in every),
            tuple(self._rewritten),
        )

    def _modes(self) -> tuple[Mode, ...]:
        return ("train", "eval") if any(module.training for module in self._modules) else ("train",)

    def _run_mode(self, mode: Mode) -> tuple[_Run, _Run, _Run]:
        with Evaluating(self._modules) if mode == "eval" else contextlib.nullcontext():
            first = self._run(DUMMY_BATCH_SIZE)
            self._check_rows(first, DUMMY_BATCH_SIZE)
            again, other = self._run(DUMMY_BATCH_SIZE), self._run(OTHER_BATCH_SIZE)
        self._check_rows(other, OTHER_BATCH_SIZE)
        self._compare(first, other, f"of {DUMMY_BATCH_SIZE} rows", f"of {OTHER_BATCH_SIZE} rows")
        if first.drew_python and again.drew_python and other.drew_python:  # else it was another thread
            raise SchemaError(
                f"{self._name}: the expert draws numbers from Python's random or from numpy.random while it computes; "
                "a backward pass could not draw them again. Draw with torch"
            )
        if not nested_compare(first.outputs, again.outputs) or not all(map(_same, first.flat, again.flat)):
            raise SchemaError(
                f"{self._name}: the expert gave two answers to the same call with the same seed. It keeps state "
                "between calls outside its parameters and buffers, or draws numbers elsewhere than from torch, and a "
                "backward pass could not compute its forward pass again; keep the state in buffers, or pass it in, and "
                "draw with torch"
            )
        return first, other, self._run_longer(mode, first) if self._is_free else first

    def _run_longer(self, mode: Mode, first: _Run) -> _Run:
        """With another size of the free dimensions."""
        with Evaluating(self._modules) if mode == "eval" else contextlib.nullcontext():
            longer = self._run(DUMMY_BATCH_SIZE, OTHER_FREE_SIZE)
        self._check_rows(longer, DUMMY_BATCH_SIZE)
        self._compare(
            first, longer, f"of length {FREE_SIZE}", f"of length {OTHER_FREE_SIZE}", lambda a, b: a.ndim == b.ndim
        )
        for run, free in ((first, FREE_SIZE), (longer, OTHER_FREE_SIZE)):
            for a, b, output in zip(first.flat, longer.flat, run.flat, strict=True):
                sizes = [size for size, x, y in zip(output.shape, a.shape, b.shape, strict=True) if x != y]
                if max(sizes, default=0) > FREE_GROWTH * free:
                    raise SchemaError(
                        f"{self._name}: an output is over {FREE_GROWTH} times longer than the arguments; "
                        f"{_shown(output)} came of a length of {free}"
                    )
        return longer

    def _run(self, rows: int, free: int = FREE_SIZE) -> _Run:
        inputs = tuple(_sample(proto, self._device, free)[:rows] for proto in nested_flatten(self._schema))
        versions = [tensor._version for tensor in inputs]  # noqa: SLF001
        args, kwargs = self._pack(inputs)
        buffers = KeptBuffers(self._expert)
        marks = [each._version for each, _ in self._values]  # noqa: SLF001
        python = _python_states()
        with seeded(self._device, _SEED):
            before = generator_states(self._device)
            try:
                outputs = self._expert(*args, **kwargs)
            except Exception as error:
                raise SchemaError(
                    f"{self._name}: the expert does not take {rows} rows of its schema {format_schema(self._schema)}: "
                    f"{type(error).__name__}: {_text(error)}"
                ) from error
            drew = not all(map(torch.equal, before, generator_states(self._device)))
        flat = nested_flatten(outputs)
        shares = bool(_memories(flat) & _memories((*self._expert.parameters(), *self._expert.buffers())))
        if shares:
            outputs = nested_map(lambda each: each.clone() if isinstance(each, torch.Tensor) else each, outputs)
            flat = nested_flatten(outputs)
        drew_python = _python_states() != python
        buffers.put_back()
        self._put_parameters_back(marks)
        wrote = any(tensor._version != version for tensor, version in zip(inputs, versions, strict=True))  # noqa: SLF001
        return _Run(outputs, flat, drew, drew_python, wrote, shares)

    def _put_parameters_back(self, marks: list[int]) -> None:
        now = {id(each) for each in self._expert.parameters()}
        if now != {id(each) for each, _ in self._values}:
            raise SchemaError(
                f"{self._name}: the expert makes or replaces parameters in its forward pass, where no optimizer knows "
                "them; make them in its constructor, or run it once before its optimizer is made"
            )
        for (each, value), mark in zip(self._values, marks, strict=True):
            if each._version != mark or not _same(each.detach(), value):  # noqa: SLF001
                write_back(each, value)
                if not any(each is known for known in self._rewritten):
                    self._rewritten.append(each)

    def _check_rows(self, run: _Run, rows: int) -> None:
        if not run.flat:
            raise SchemaError(f"{self._name}: the expert gives no output at all; give at least one tensor")
        for output in run.flat:
            if isinstance(output, torch.Tensor) and output.layout is not torch.strided:
                raise SchemaError(f"{self._name}: an output is {output.layout}; only dense tensors can travel")
            if not isinstance(output, torch.Tensor) or output.ndim == 0 or len(output) != rows:
                raise SchemaError(
                    f"{self._name}: every output must be a tensor with the batch dimension first; "
                    f"a run of {rows} rows gave {_shown(output)}"
                )

    def _compare(
        self,
        first: _Run,
        other: _Run,
        this: str,
        that: str,
        alike: Callable[[torch.Tensor, torch.Tensor], bool] = lambda a, b: a.shape[1:] == b.shape[1:],
    ) -> None:
        """That another batch size or mode changes nothing but the number of rows."""
        same = nested_compare(first.outputs, other.outputs) and all(
            alike(a, b) and a.dtype is b.dtype for a, b in zip(first.flat, other.flat, strict=True)
        )
        if not same:
            raise SchemaError(
                f"{self._name}: every output must have the batch dimension first and be the same but for the number of "
                f"rows; a run {this} gave ({_list(first.flat)}), one {that} gave ({_list(other.flat)})"
            )

    def _checked(self, given: Any, found: Any) -> Any:
        """The owner's schema of the outputs; floating outputs may be stated, and sent, in another floating dtype."""
        same = nested_compare(given, found) and all(
            len(a.shape) == len(b.shape)
            and all(size is None or size == other for size, other in zip(a.shape, b.shape, strict=True))
            and (a.dtype is b.dtype or (a.dtype.is_floating_point and b.dtype.is_floating_point))
            for a, b in zip(nested_flatten(given), nested_flatten(found), strict=True)
        )
        if not same:
            raise SchemaError(
                f"{self._name}: outputs_schema says {format_schema(given)}, a dummy run gave {format_schema(found)}"
            )
        return given

    def _drops(self, mode: Mode) -> bool:
        """Layers that draw in training, whether or not this run came through them."""
        return mode == "train" and any(
            isinstance(module, _DROPPING) and module.training and module.p > 0 for module in self._modules
        )

    def _mixes(self, mode: Mode, runs: tuple[_Run, _Run, _Run], draws: frozenset[Mode]) -> bool:
        if any(
            isinstance(module, _MIXING)
            and ((mode == "train" and module.training) or not module.track_running_stats)
            for module in self._modules
        ):  # fmt: skip
            return True
        first, other, _ = runs
        return mode not in draws and not all(
            _same(a, b[:DUMMY_BATCH_SIZE]) for a, b in zip(first.flat, other.flat, strict=True)
        )


def _also_eval(found: frozenset[Mode], runs: Mapping[Mode, Any]) -> frozenset[Mode]:
    """An expert whose owner has put all of it in `eval()` was run once for both."""
    return frozenset(MODES) if found and len(runs) == 1 else found


def _as_proto(output: torch.Tensor, longer: torch.Tensor) -> BatchTensorProto:
    """What differs in length between the two is free."""
    sizes = (a if a == b else None for a, b in zip(output.shape[1:], longer.shape[1:], strict=True))
    return BatchTensorProto(*sizes, dtype=output.dtype)


def _sample(proto: BatchTensorProto, device: torch.device, free: int = FREE_SIZE) -> torch.Tensor:
    """Rows that differ and harm nobody: floats between 0.25 and 0.75, which are probabilities too and index 0; zeros of
    everything else.
    """
    tensor = proto.make_zeros(OTHER_BATCH_SIZE, device, free=free)
    if tensor.is_floating_point() and tensor.numel():
        ramp = torch.arange(tensor.numel(), dtype=torch.float32, device=device).mul_(0.6180339887).frac_()
        tensor.copy_(ramp.mul_(0.5).add_(0.25).view(tensor.shape))
    return tensor


def _python_states() -> tuple[Any, ...]:
    legacy: Any = np.random.get_state(legacy=True)
    return random.getstate(), legacy[1].tobytes(), legacy[2:]


def _refuse_inference_tensors(name: str, expert: nn.Module) -> None:
    if any(each.is_inference() for each in (*expert.parameters(), *expert.buffers())):
        raise SchemaError(
            f"{name}: the expert was made under torch.inference_mode() and cannot be trained; make it outside"
        )


def _memories(tensors: Sequence[Any]) -> set[int]:
    return {
        each.untyped_storage().data_ptr()
        for each in tensors
        if isinstance(each, torch.Tensor) and each.layout is torch.strided and each.numel()
    }


def _same(first: Any, second: Any) -> bool:
    """Equal but for rounding; what is NaN in both is equal."""
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor) or first.shape != second.shape:
        return first is second
    if first.dtype is not second.dtype:
        return False
    if not (first.is_floating_point() or first.is_complex()) or not first.numel():
        return torch.equal(first, second)
    epsilon = math.sqrt(torch.finfo(first.dtype).eps)
    return torch.allclose(first, second, rtol=epsilon, atol=epsilon, equal_nan=True)


def _shown(output: Any) -> str:
    return f"[{', '.join(map(str, output.shape))}]" if isinstance(output, torch.Tensor) else type(output).__name__


def _list(flat: Sequence[torch.Tensor]) -> str:
    return ", ".join(format_tensor(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for each in flat)


def _text(error: BaseException) -> str:
    """What an exception says, whatever its own `__str__` does."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001
        return "(it cannot say why)"
