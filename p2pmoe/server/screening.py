"""The gate around an expert's batches: who may enter, what may leave, what is taken back. Runs on the device thread.

1. A call that holds NaN or infinity is refused before batching, so its neighbours are computed as if it had not come.
2. A backward call whose gradients are far over the expert's usual ones is scaled down before batching, and what it gets
   back is scaled up again; one that is beyond all measure is refused (`clipping.py`).
3. A backward pass that overflows all the same is stopped before the optimizer's step; a step that overflows is undone.
4. A batch that gave NaN or infinity is computed again in two parts, the extreme calls apart from the mild ones, until
   each culprit is alone and fails alone.
5. What such a pass wrote into the expert's buffers is put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch

from p2pmoe.config import GateConfig
from p2pmoe.errors import CallError, ExpertFailedError, NonFiniteError, NonFiniteResultError, OutlierGradientError
from p2pmoe.metrics import NodeMetrics, PassStats
from p2pmoe.protocol.finite import all_surely_finite
from p2pmoe.protocol.nested import nested_flatten
from p2pmoe.protocol.schema import BatchTensorProto
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.buffers import KeptBuffers
from p2pmoe.server.clipping import Extreme, GradientLimit
from p2pmoe.server.gate import (
    NormGate,
    count_non_finite,
    holds_floats,
    is_finite,
    magnitude,
    norm_of,
    quick_norms,
    split_by_magnitude,
)
from p2pmoe.server.step_guard import guard_steps, require_finite
from p2pmoe.server.task_pool import Batch, Task
from p2pmoe.types import may_be_many

Flat = tuple[torch.Tensor, ...]
_LARGEST_STEP: Final = 14  # 2^14 and 2^-14 are normal numbers in float16 too


def guard_experts(backends: Iterable[ExpertBackend], config: GateConfig, metrics: NodeMetrics) -> None:
    """Guard the optimizers of experts; put gates around their pools where the config says so."""
    for backend in backends:
        guard_steps(backend.opt)
        pools = backend.get_pools()
        if not config.enabled:
            backend.before_step = None
            for pool in pools:
                pool.gate = None
            continue
        buffers = backend.kept  # one for both passes: each writes what the other must not undo
        forward, backward = (
            PassGate(backend, buffers, config, metrics.stats(backend.name, each)) for each in ("forward", "backward")
        )
        pools[0].gate, pools[1].gate = forward, backward
        backend.before_step = backward.before_step


class PassGate:
    """A `BatchGate` of one expert and pass."""

    def __init__(self, backend: ExpertBackend, buffers: KeptBuffers, config: GateConfig, stats: PassStats) -> None:
        self._backend = backend
        self._stats = stats
        self._trains = stats.direction == "backward"
        self._buffers = buffers
        self._inputs = len(nested_flatten(backend.forward_schema))
        self._limit: GradientLimit | None = None
        if self._trains and config.outlier_factor is not None:
            factor, calls = config.outlier_factor, config.warmup_calls
            norms = NormGate(factor=factor, warmup_calls=calls)
            least = _least_norm(nested_flatten(backend.outputs_schema))
            self._limit = GradientLimit(norms, factor=factor, warmup_calls=calls, least=least)
        self._steps = 0  # that the optimizer made since a pass ended
        self._stepped = False  # whether it made one in the pass that was undone
        if self._trains:
            backend.opt.register_step_post_hook(self._count_step)
        # The user's own `apply_gradients` may leave gradients for a later step, where nobody can tell whose they are.
        self._may_gather = type(backend).apply_gradients is not ExpertBackend.apply_gradients

    def __repr__(self) -> str:
        return f"<PassGate {self._stats.expert}/{self._stats.direction}: {self._limit}, {dict(self._stats.rejected)}>"

    def screen(self, tasks: list[Task]) -> list[tuple[Task, CallError]]:
        """See `BatchGate.screen`."""
        if (
            self._limit is None
            and len(tasks) > 1
            and all_surely_finite([tensor for task in tasks for tensor in task.tensors])
        ):
            return []
        refused = []
        for task, norms in zip(tasks, self._norms_of(tasks), strict=True):
            error = self._judge(task, norms)
            if error is not None:
                self._stats.outcomes[str(error.code)] += 1
                refused.append((task, error))
        return refused

    def before_step(self, gradients: Flat) -> None:
        """See `ExpertBackend.before_step`. `gradients` are those of the inputs."""
        if not all(map(is_finite, gradients)):
            raise NonFiniteResultError("the inputs' gradients overflowed")
        if not self._buffers.changes_are_finite():
            raise NonFiniteResultError("the expert's buffers overflowed")
        if self._may_gather:
            parameters = self._backend.expert.parameters()
            require_finite(each.grad for each in parameters if each.grad is not None)

    def inspect(self, batch: Batch, outputs: Flat) -> list[tuple[Task, CallError]]:
        """See `BatchGate.inspect`. A backward batch, whose step was taken, is never computed anew."""
        self._steps = 0
        finite = all(map(is_finite, outputs))
        if self._buffers.changes_are_finite():
            if finite:
                self._buffers.keep()
                return []
        elif self._trains:
            self._buffers.put_back()
        if not self._trains:
            raise NonFiniteResultError("the outputs or the expert's buffers overflowed")
        return [] if finite else self._spoilt(batch, outputs)

    def give_back(self, task: Task, results: Flat) -> Flat | CallError:
        """See `BatchGate.give_back`."""
        grown = tuple(_scaled(each, task.halvings) if holds_floats(each) else each for each in results)
        if all(map(is_finite, grown)):
            return grown
        return self.failed_alone(
            task, NonFiniteResultError("the inputs' gradients overflowed, after the expert's step")
        )

    def undo(self) -> None:
        """See `BatchGate.undo`."""
        self._stepped, self._steps = self._steps > 0, 0
        self._buffers.put_back()

    def split(self, batch: Batch) -> tuple[Batch, Batch]:
        """See `BatchGate.split`."""
        mild, extreme = split_by_magnitude([magnitude(task.tensors) for task in batch.tasks])
        if self._stepped:
            raise NonFiniteResultError(f"{self._stats.expert}: its optimizer stepped before something overflowed")
        return tuple(batch.part([batch.tasks[index] for index in part]) for part in (mild, extreme))  # type: ignore[return-value]

    def failed_alone(self, task: Task, error: Exception) -> CallError:
        """See `BatchGate.failed_alone`."""
        if self._trains:
            self._stats.rejected["overflow"] += 1
        return ExpertFailedError(
            f"{self._stats.expert}/{self._stats.direction}: {error}. "
            f"{'The expert was changed' if self._stepped else 'Nothing was changed'} by this call, whose largest "
            f"value is {magnitude(task.tensors):.3g}; send smaller ones. If they are small, ask another provider"
        )

    def get_state(self) -> dict[str, Any] | None:
        """What it has learnt, as JSON; None where it learns nothing."""
        return None if self._limit is None else self._limit.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what another one has learnt. Raises KeyError, TypeError, ValueError for no such state."""
        if self._limit is not None:
            self._limit.set_state(state)

    # -- private

    def _count_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After the guard's own hook, which raises when it takes the step back."""
        self._steps += 1

    def _norms_of(self, tasks: list[Task]) -> Iterable[tuple[float, ...]]:
        """For each task the quick norm of each of its tensors; 0 for integers."""
        columns = zip(*(task.tensors for task in tasks), strict=True)
        return zip(
            *(quick_norms(each) if holds_floats(each[0]) else [0.0] * len(each) for each in columns), strict=True
        )

    def _judge(self, task: Task, norms: tuple[float, ...]) -> CallError | None:
        squares = 0.0
        for index, (tensor, quick) in enumerate(zip(task.tensors, norms, strict=True)):
            norm = norm_of(tensor, quick)
            if not math.isfinite(norm) and not is_finite(tensor):
                return self._non_finite(index, tensor)
            if index >= self._inputs:
                squares += min(norm, 1e150) ** 2
        if self._limit is None:
            return None
        norm = math.sqrt(squares / max(1, task.rows))
        verdict = self._limit.judge(task.caller, norm, is_one=not may_be_many(task.caller))
        if isinstance(verdict, Extreme):
            return self._outlier(norm, verdict)
        if verdict:
            self._scale_down(task, verdict)
        return None

    def _scale_down(self, task: Task, halvings: int) -> None:
        self._stats.clipped += 1
        task.halvings = halvings
        task.tensors = (
            *task.tensors[: self._inputs],
            *(_scaled(each, -halvings) if holds_floats(each) else each for each in task.tensors[self._inputs :]),
        )

    def _non_finite(self, index: int, tensor: torch.Tensor) -> NonFiniteError:
        if self._trains:
            self._stats.rejected["non_finite"] += 1
        return NonFiniteError(
            f"tensor '{index}' of the call to {self._stats.expert} ({self._stats.direction}) holds NaN or infinity in "
            f"{count_non_finite(tensor)} of {tensor.numel()} values; drop the step that made them"
        )

    def _outlier(self, norm: float, extreme: Extreme) -> OutlierGradientError:
        self._stats.rejected["outlier"] += 1
        again = (
            "gradients of this size are never taken"
            if extreme.forgiven_after is None
            else f"after {extreme.forgiven_after} more of this size in a row they are your new scale, and are taken"
        )
        return OutlierGradientError(
            f"the gradients of the call to {self._stats.expert} have a norm of {norm:.3g} for each row; yours are "
            f"usually {extreme.usual:.3g}, and over {extreme.limit:.3g} a call is refused, not scaled down: {again}. "
            f"Drop the step, or look at what the loss is multiplied with"
        )

    def _spoilt(self, batch: Batch, outputs: Flat) -> list[tuple[Task, CallError]]:
        spoilt = []
        first = 0
        for task in batch.tasks:
            if not all(is_finite(output[first : first + task.rows]) for output in outputs):
                error = NonFiniteResultError("the inputs' gradients overflowed, after the expert's own step")
                spoilt.append((task, self.failed_alone(task, error)))
            first += task.rows
        return spoilt


def _scaled(tensor: torch.Tensor, doublings: int) -> torch.Tensor:
    """`tensor` times 2 to this power, in steps that every floating dtype can hold."""
    with torch.no_grad():
        while doublings:
            step = max(-_LARGEST_STEP, min(_LARGEST_STEP, doublings))
            tensor = tensor * 2.0**step
            doublings -= step
    return tensor


def _least_norm(outputs: Iterable[BatchTensorProto]) -> float:
    """Under this norm a gradient's smaller numbers would be lost in the dtypes that the outputs have."""
    dtypes = [each.dtype for each in outputs if each.dtype.is_floating_point or each.dtype.is_complex]
    return max((16.0 * torch.finfo(dtype).tiny for dtype in dtypes), default=1.0)
