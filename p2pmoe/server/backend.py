"""One expert: its module, its optimizer, its schemas, and the two functions that batches are computed with.

The seed is Learning@home's `ExpertBackend` (arXiv 2002.04013, section 3.2). Knows nothing of queues, threads, HTTP.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from p2pmoe.errors import NonFiniteResultError, SchemaError
from p2pmoe.protocol.nested import nested_compare, nested_flatten, nested_map, nested_packer
from p2pmoe.protocol.schema import BatchTensorProto, format_schema, schema_digest
from p2pmoe.server.task_pool import TaskPool

DUMMY_BATCH_SIZE = 3
"""Rows of the dummy run that finds `outputs_schema`."""

Flat = tuple[torch.Tensor, ...]
T = TypeVar("T")


class ExpertBackend(nn.Module):
    """An expert that can be served: forward, and backward with an optimizer step inside.

    Args:
        name: the expert's uid, e.g. "ffn.3.17".
        expert: any module whose arguments and outputs are tensors (nested tuples, lists and dicts of them) with
            the batch dimension first.
        opt: its optimizer; stepped once a backward batch.
        args_schema: nested BatchTensorProto of the positional arguments.
        kwargs_schema: the same of the keyword arguments.
        outputs_schema: the same of the outputs; found by a dummy run of `DUMMY_BATCH_SIZE` rows when left out.
        pool_options: batching options of both pools, see `TaskPool`.

    Raises:
        SchemaError: there is no argument at all, a schema is malformed, or the dummy run does not fit it.
    """

    def __init__(
        self,
        name: str,
        expert: nn.Module,
        opt: torch.optim.Optimizer,
        *,
        args_schema: Any = None,
        kwargs_schema: Mapping[str, Any] | None = None,
        outputs_schema: Any = None,
        **pool_options: Any,
    ) -> None:
        super().__init__()
        self.name, self.expert, self.opt = name, expert, opt
        self.args_schema: tuple[Any, ...] = _as_args(args_schema)
        self.kwargs_schema: dict[str, Any] = dict(kwargs_schema or {})
        self.forward_schema = (self.args_schema, self.kwargs_schema)
        self._pack_forward = nested_packer(self.forward_schema)
        if not nested_flatten(self.forward_schema):
            raise SchemaError(f"{name}: at least one positional or keyword argument is needed in args_schema")
        _check_leaves(name, self.forward_schema)
        if outputs_schema is None:
            outputs_schema = _in_short_thread(self._find_outputs_schema)
        self.outputs_schema = outputs_schema
        _check_leaves(name, outputs_schema)
        self.backward_schema = (self.forward_schema, outputs_schema)
        self._pack_backward = nested_packer(self.backward_schema)
        self.grad_inputs_schema = self.forward_schema
        self.schema_digest = schema_digest(self.forward_schema, outputs_schema)
        self.update_count = 0
        """Optimizer steps applied since the expert was made."""
        self._computing = threading.Lock()
        self._works_in_place = False
        self.before_step: Callable[[Flat], None] | None = None
        """Sees the inputs' gradients of a pass before its optimizer step; raises NonFiniteResultError to stop it."""
        self.forward_pool = TaskPool(self.forward, uid=f"{name}/forward", **pool_options)
        self.backward_pool = TaskPool(self.backward, uid=f"{name}/backward", **pool_options)

    def __repr__(self) -> str:
        schemas = f"{format_schema(self.forward_schema)} -> {format_schema(self.outputs_schema)}"
        return f"<ExpertBackend {self.name}: {schemas}, {self.update_count} updates>"

    @property
    def device(self) -> torch.device:
        """Where the expert's parameters are."""
        return next((parameter.device for parameter in self.expert.parameters()), torch.device("cpu"))

    def forward(self, *inputs: torch.Tensor) -> Flat:
        """Outputs of a batch, without gradients.

        Args:
            inputs: flat tensors in the order of `(args_schema, kwargs_schema)`, [rows, …] each.

        Returns:
            The flattened outputs, [rows, …] each.
        """
        args, kwargs = self._pack_forward(inputs)
        with self._computing, torch.no_grad():
            outputs = self.expert(*args, **kwargs)
        return (outputs,) if isinstance(outputs, torch.Tensor) else nested_flatten(outputs)

    def backward(self, *inputs: torch.Tensor) -> Flat:
        """Gradients with respect to the inputs; one optimizer step happens inside.

        Args:
            inputs: `flatten((forward_schema, outputs_schema))`: the inputs, then a gradient for every output.

        Returns:
            A gradient for every input, in wire order; zeros for unused and for integer inputs.
        """
        (args, kwargs), grad_outputs = self._pack_backward(inputs)
        with self._computing, torch.enable_grad():
            args, kwargs = nested_map(_as_leaf, (args, kwargs))
            earlier = self._set_gradients_aside()
            try:
                self._back_propagate(self._run_with_grad(args, kwargs), grad_outputs)
                gradients = tuple(
                    torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                    for tensor in nested_flatten((args, kwargs))
                )
                if self.before_step is not None:
                    self.before_step(gradients)
                for parameter, gradient in earlier:
                    parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
                self.apply_gradients()
            except BaseException as error:
                self.opt.zero_grad(set_to_none=True)  # half a gradient must not leak into the next step
                if isinstance(error, NonFiniteResultError):  # no step was taken
                    for parameter, gradient in earlier:
                        parameter.grad = gradient
                raise
        return gradients

    def apply_gradients(self) -> None:
        """Step the optimizer and clear the gradients. Override to train differently."""
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.update_count += 1

    def get_info(self) -> dict[str, Any]:
        """Schemas and keyword names, as the seed gives them, and the number of updates."""
        return {
            "forward_schema": self.forward_schema,
            "outputs_schema": self.outputs_schema,
            "keyword_names": tuple(self.kwargs_schema),
            "schema_digest": self.schema_digest,
            "updates": self.update_count,
        }

    def get_pools(self) -> Sequence[TaskPool]:
        """The forward and the backward pool."""
        return self.forward_pool, self.backward_pool

    # -- private

    def _set_gradients_aside(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """What an `apply_gradients` that steps only now and then has gathered: a bad pass must not spoil it."""
        parameters = [each for group in self.opt.param_groups for each in group["params"]]
        gathered = [(each, each.grad) for each in parameters if each.grad is not None]
        for parameter, _ in gathered:
            parameter.grad = None
        return gathered

    def _run_with_grad(self, args: Any, kwargs: Any) -> Any:
        """The outputs in the graph of the inputs; copies of the inputs where the expert works on them in place."""
        if not self._works_in_place:
            try:
                return self.expert(*args, **kwargs)
            except RuntimeError as error:
                if "in-place operation" not in str(error):
                    raise
                self._works_in_place = True
        args, kwargs = nested_map(torch.clone, (args, kwargs))
        return self.expert(*args, **kwargs)

    def _back_propagate(self, outputs: Any, grad_outputs: Any) -> None:
        if not nested_compare(outputs, grad_outputs):
            raise SchemaError(f"{self.name}: the outputs do not have the structure of outputs_schema")
        pairs = [
            (output, gradient.to(device=output.device, dtype=output.dtype, non_blocking=True))
            for output, gradient in zip(nested_flatten(outputs), nested_flatten(grad_outputs), strict=True)
            if output.requires_grad
        ]
        if pairs:
            torch.autograd.backward([pair[0] for pair in pairs], grad_tensors=[pair[1] for pair in pairs])

    def _find_outputs_schema(self) -> Any:
        """One dummy run that leaves parameters, buffers, gradients, mode and RNG state as they were."""
        device = self.device
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), _kept_state(self.expert):
            args, kwargs = nested_map(lambda proto: proto.make_zeros(DUMMY_BATCH_SIZE, device), self.forward_schema)
            try:
                outputs = self.expert(*args, **kwargs)
            except Exception as error:
                schema = format_schema(self.forward_schema)
                raise SchemaError(
                    f"{self.name}: the expert does not take its schema {schema}: {type(error).__name__}: {error}"
                ) from error
        return nested_map(self._output_schema, outputs)

    def _output_schema(self, output: Any) -> BatchTensorProto:
        if not isinstance(output, torch.Tensor) or output.ndim == 0 or len(output) != DUMMY_BATCH_SIZE:
            shown = (
                f"[{', '.join(map(str, output.shape))}]" if isinstance(output, torch.Tensor) else type(output).__name__
            )
            raise SchemaError(
                f"{self.name}: every output must be a tensor with the batch dimension first; "
                f"a run of {DUMMY_BATCH_SIZE} rows gave {shown}"
            )
        return BatchTensorProto.from_tensor(output)


def _in_short_thread(function: Callable[[], T]) -> T:
    """The result of a function that ran in a thread of its own.

    Every thread that computes gets a team of OpenMP threads for as long as it lives, and with more teams than cores
    the runtime stops spinning between parallel sections: batches on the device thread would take 1.6 times as long
    (docs/adr/0002-threads.md). So the thread that makes experts must not keep a team.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="p2pmoe-dummy-run") as executor:
        return executor.submit(function).result()


@contextlib.contextmanager
def _kept_state(expert: nn.Module) -> Iterator[None]:
    """Puts every parameter and buffer back, a buffer also when forward has replaced or added it."""
    kept = [(tensor, tensor.clone()) for tensor in (*expert.parameters(), *expert.buffers())]
    buffers = [(module._buffers, dict(module._buffers)) for module in expert.modules()]  # noqa: SLF001
    try:
        yield
    finally:
        for now, before in buffers:
            now.clear()
            now.update(before)
        for tensor, value in kept:
            tensor.copy_(value)


def _as_args(schema: Any) -> tuple[Any, ...]:
    if schema is None:
        return ()
    return (schema,) if isinstance(schema, BatchTensorProto) else tuple(schema)


def _as_leaf(tensor: torch.Tensor) -> torch.Tensor:
    leaf = tensor.detach()
    return leaf.requires_grad_(True) if leaf.is_floating_point() or leaf.is_complex() else leaf


def _check_leaves(name: str, schema: Any) -> None:
    for leaf in nested_flatten(schema):
        if not isinstance(leaf, BatchTensorProto):
            raise SchemaError(f"{name}: a schema is made of BatchTensorProto, got {type(leaf).__name__}")
