"""One expert: its module, its optimizer, its schemas, and the two functions that batches are computed with.

The seed is Learning@home's `ExpertBackend` (arXiv 2002.04013, section 3.2). Knows nothing of queues, threads, HTTP.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from p2pmoe.errors import NonFiniteResultError, SchemaError
from p2pmoe.protocol.modes import usable_anywhere
from p2pmoe.protocol.nested import nested_flatten, nested_map, nested_packer
from p2pmoe.protocol.schema import (
    BatchTensorProto,
    format_schema,
    schema_digest,
)
from p2pmoe.server.birth import birth_of
from p2pmoe.server.buffers import KeptBuffers
from p2pmoe.server.module_state import Evaluating, seeded
from p2pmoe.server.optimizers import NoOptimizer, check_optimizer
from p2pmoe.server.outputs import ExpectedOutputs
from p2pmoe.server.shared_trials import SharedTrials
from p2pmoe.server.task_pool import TaskPool, manner_now
from p2pmoe.server.trial import DUMMY_BATCH_SIZE, examine
from p2pmoe.types import Mode

__all__ = ["DUMMY_BATCH_SIZE", "ExpertBackend"]

Flat = tuple[torch.Tensor, ...]
_AS_IT_IS: Final = contextlib.nullcontext()


class ExpertBackend(nn.Module):
    """An expert that can be served: forward, and backward with an optimizer step inside.

    Args:
        name: the expert's uid, e.g. "ffn.3.17".
        expert: any module whose arguments and outputs are tensors (nested tuples, lists and dicts of them) with
            the batch dimension first.
        opt: its optimizer; stepped once a backward batch. None for an expert that is not trained: backward calls then
            give gradients and change nothing.
        args_schema: nested BatchTensorProto of the positional arguments.
        kwargs_schema: the same of the keyword arguments.
        outputs_schema: the same of the outputs; found by dummy runs (`trial.py`) when left out, checked by them when
            given. Floating outputs may be stated in another floating dtype, and are cast to it.
        device: where an expert without parameters and buffers is computed; others are where these are.
        trials: what was found of experts of the same making that are alike; left out, this one has its own dummy runs.
        pool_options: batching options of both pools, see `TaskPool`.

    Raises:
        SchemaError: there is no argument at all, a schema is malformed, or the expert does not fit it or cannot be
            served as it is; `trial.py` lists why.

    A call's `Manner` (mode and seed) is that of the batch which its pool is computing. Called directly, `forward` and
    `backward` run the module as its owner has set it up, and draw from torch's generators as they are.
    """

    def __init__(
        self,
        name: str,
        expert: nn.Module,
        opt: torch.optim.Optimizer | None,
        *,
        args_schema: Any = None,
        kwargs_schema: Mapping[str, Any] | None = None,
        outputs_schema: Any = None,
        device: torch.device | str | None = None,
        trials: SharedTrials | None = None,
        **pool_options: Any,
    ) -> None:
        super().__init__()
        self.name, self.expert = name, expert
        self._own_device = torch.device(device or "cpu")
        self.opt: torch.optim.Optimizer = NoOptimizer() if opt is None else opt
        check_optimizer(name, expert, self.opt)
        self.args_schema: tuple[Any, ...] = _as_args(args_schema)
        self.kwargs_schema: dict[str, Any] = dict(kwargs_schema or {})
        self.forward_schema = (self.args_schema, self.kwargs_schema)
        self._pack_forward = nested_packer(self.forward_schema)
        if not nested_flatten(self.forward_schema):
            raise SchemaError(f"{name}: at least one positional or keyword argument is needed in args_schema")
        _check_leaves(name, self.forward_schema)
        _check_trainable(name, expert)
        if outputs_schema is not None:
            _check_leaves(name, outputs_schema)
        find = examine if trials is None else trials.examine
        self.findings = find(name, expert, self.forward_schema, self.device, outputs_schema)
        """What dummy runs showed of the expert."""
        self.outputs_schema = outputs_schema = self.findings.outputs_schema
        inputs: tuple[BatchTensorProto, ...] = nested_flatten(self.forward_schema)
        self._outputs = ExpectedOutputs(name, outputs_schema, self.findings.dtypes, inputs)
        self._modules_of_expert = list(expert.modules())
        self.backward_schema, self.grad_inputs_schema = (self.forward_schema, outputs_schema), self.forward_schema
        self._pack_backward = nested_packer(self.backward_schema)
        self.schema_digest = schema_digest(self.forward_schema, outputs_schema)
        self.update_count = 0
        """Optimizer steps applied since the expert was made."""
        self.birth = birth_of(expert, self.opt)
        """What it was when it was made; whose checkpoints are its own."""
        self._computing, self._works_in_place = threading.Lock(), self.findings.works_in_place
        with torch.inference_mode(False):  # other threads write to these copies
            self.kept = KeptBuffers(expert, self.findings.rewritten)
        """What passes write besides parameters; a batch that trains changes them, nothing else does."""
        trained = {id(each) for group in self.opt.param_groups for each in group["params"]}
        self._untrained = [each for each in expert.parameters() if id(each) not in trained]
        if type(self).apply_gradients is not ExpertBackend.apply_gradients:
            self._untrained.clear()  # it may train them by other means
        self.before_step: Callable[[Flat], None] | None = None
        """Sees the inputs' gradients of a pass before its optimizer step; raises NonFiniteResultError to stop it.

        Where it is set, a forward pass in which the buffers overflow is stopped too."""
        self._applying = False  # from the moment on that this pass's gradients may have been applied
        self.forward_pool = TaskPool(self.forward, uid=f"{name}/forward", **pool_options)
        self.backward_pool = TaskPool(self.backward, uid=f"{name}/backward", **pool_options)
        self.forward_pool.results, self.backward_pool.results = self._outputs.protos, inputs
        for pool in self.get_pools():
            pool.splits_by_shape = any(proto.is_free for proto in inputs)
        self.forward_pool.may_repeat = lambda: True
        if type(self).backward is ExpertBackend.backward:  # nobody knows when another one steps
            self.backward_pool.may_repeat = lambda: not self._applying

    def __repr__(self) -> str:
        schemas = f"{format_schema(self.forward_schema)} -> {format_schema(self.outputs_schema)}"
        return f"<ExpertBackend {self.name}: {schemas}, {self.update_count} updates>"

    @property
    def device(self) -> torch.device:
        """Where the expert's parameters are, or its buffers where it has none."""
        tensors = itertools.chain(self.expert.parameters(), self.expert.buffers())
        return next((tensor.device for tensor in tensors), self._own_device)

    def forward(self, *inputs: torch.Tensor) -> Flat:
        """Outputs of a batch, without gradients. Buffers are as they were afterwards.

        Args:
            inputs: flat tensors in the order of `(args_schema, kwargs_schema)`, [rows, …] each.

        Returns:
            The flattened outputs, [rows, …] each.

        Raises:
            SchemaError: the expert gave something else than its schema says.
        """
        args, kwargs = self._pack_forward(map(torch.clone, inputs) if self._works_in_place else inputs)
        with self._computing, torch.inference_mode(False), torch.no_grad(), self._conduct():
            if self.kept:
                self.kept.keep()
            try:
                outputs = self._outputs.to_send(self.expert(*args, **kwargs), inputs)
                if self.kept and self.before_step is not None and not self.kept.changes_are_finite():
                    raise NonFiniteResultError("the expert's buffers overflowed")
                return tuple(map(torch.clone, outputs)) if self.findings.shares_state else outputs
            finally:
                if self.kept:
                    self.kept.put_back()

    def backward(self, *inputs: torch.Tensor) -> Flat:
        """Gradients with respect to the inputs; one optimizer step happens inside.

        Buffers that forward writes are written once, when the batch trains and its step is taken.

        Args:
            inputs: `flatten((forward_schema, outputs_schema))`: the inputs, then a gradient for every output.

        Returns:
            A gradient for every input, in wire order; zeros for unused and for integer inputs.

        Raises:
            SchemaError: the expert gave something else than its schema says.
        """
        (args, kwargs), grad_outputs = self._pack_backward(inputs)
        with self._computing, torch.inference_mode(False), torch.enable_grad(), self._conduct():
            self._applying = False
            args, kwargs = nested_map(_as_leaf, (args, kwargs))
            earlier = self._set_gradients_aside()
            self.kept.keep()
            try:
                outputs = self._run_with_grad(args, kwargs)
                written = self.kept.snapshot()
                self._back_propagate(outputs, grad_outputs)
                if manner_now().mode == "eval":
                    self.kept.put_back()
                else:
                    self.kept.return_to(written)  # checkpointing inside the expert runs parts of it twice
                gradients = tuple(map(_gradient_of, nested_flatten((args, kwargs))))
                if self.before_step is not None:
                    self.before_step(gradients)
                for parameter, gradient in earlier:
                    parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
                self._applying = True
                self.apply_gradients()
            except BaseException as error:
                self.opt.zero_grad(set_to_none=True)  # half a gradient must not leak into the next step
                self.kept.put_back()
                if not self._applying or issubclass(type(error), NonFiniteResultError):  # no step was taken
                    for parameter, gradient in earlier:
                        parameter.grad = gradient
                raise
            finally:
                for parameter in self._untrained:
                    parameter.grad = None
        return gradients

    def apply_gradients(self) -> None:
        """Step the optimizer and clear the gradients. Override to train differently."""
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.update_count += self.is_trained

    @property
    def is_trained(self) -> bool:
        """Whether backward calls change it."""
        return not isinstance(self.opt, NoOptimizer)

    def get_info(self) -> dict[str, Any]:
        """Schemas and keyword names, as the seed gives them, and how old it is: incarnation and number of updates."""
        return {
            "forward_schema": self.forward_schema,
            "outputs_schema": self.outputs_schema,
            "keyword_names": tuple(self.kwargs_schema),
            "schema_digest": self.schema_digest,
            "repeatable": self.findings.repeatable,
            "updates": self.update_count,
            "incarnation": self.birth.incarnation,
        }

    @contextlib.contextmanager
    def at_rest(self, timeout_s: float = -1.0) -> Iterator[bool]:
        """While the block runs no pass does; False when one still did after `timeout_s`."""
        is_ours = self._computing.acquire(timeout=timeout_s)
        try:
            yield is_ours
        finally:
            if is_ours:
                self._computing.release()

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

    def _conduct(self) -> contextlib.AbstractContextManager[object]:
        """The module's mode and the random numbers that the call being computed asks for."""
        mode, seed = manner_now()
        if seed is not None and mode in self.findings.draws:
            return self._seeded(mode, seed)
        return _AS_IT_IS if mode == "train" else Evaluating(self._modules_of_expert)

    @contextlib.contextmanager
    def _seeded(self, mode: Mode, seed: int) -> Iterator[None]:
        with _AS_IT_IS if mode == "train" else Evaluating(self._modules_of_expert), seeded(self.device, seed):
            yield

    def _run_with_grad(self, args: Any, kwargs: Any) -> Any:
        """The outputs in the graph of the inputs; copies of the inputs where the expert works on them in place."""
        if not self._works_in_place:
            try:
                return self.expert(*args, **kwargs)
            except RuntimeError as error:
                if "in-place operation" not in str(error):
                    raise
                self._works_in_place = True  # only sometimes, and not in the dummy runs
                self.kept.put_back()
        args, kwargs = nested_map(torch.clone, (args, kwargs))
        with self._conduct():
            return self.expert(*args, **kwargs)

    def _back_propagate(self, outputs: Any, grad_outputs: Any) -> None:
        pairs = self._outputs.pairs(outputs, grad_outputs)
        if pairs:
            torch.autograd.backward([pair[0] for pair in pairs], grad_tensors=[pair[1] for pair in pairs])


def _as_args(schema: Any) -> tuple[Any, ...]:
    if schema is None:
        return ()
    return (schema,) if isinstance(schema, BatchTensorProto) else tuple(schema)


def _as_leaf(tensor: torch.Tensor) -> torch.Tensor:
    leaf = usable_anywhere(tensor).detach()
    return leaf.requires_grad_(True) if leaf.is_floating_point() or leaf.is_complex() else leaf


def _gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.grad is None:
        return torch.zeros_like(tensor)
    return tensor.grad if tensor.grad.layout is torch.strided else tensor.grad.to_dense()


def _check_trainable(name: str, expert: nn.Module) -> None:
    """That another thread can compute with the module's tensors and write to them."""
    for key, tensor in (*expert.named_parameters(), *expert.named_buffers()):
        if nn.parameter.is_lazy(tensor):  # the dummy run makes it, in a thread of its own
            continue
        if tensor.is_meta:
            raise SchemaError(
                f"{name}: {key} has no values, it is on the meta device; make the module on a real one, or to_empty() "
                f"and load its state"
            )
        if tensor.is_inference():
            raise SchemaError(
                f"{name}: {key} was made under torch.inference_mode(), where it can never be trained; make the module "
                f"and its optimizer outside of it"
            )


def _check_leaves(name: str, schema: Any) -> None:
    for leaf in nested_flatten(schema):
        if not isinstance(leaf, BatchTensorProto):
            raise SchemaError(f"{name}: a schema is made of BatchTensorProto, got {type(leaf).__name__}")
