"""Remote calls in torch's autograd graph: what a Function keeps, the gradients it sends, and those it gives.

Knows autograd; nothing of experts, peers or sockets. Rules:
1. Nothing is differentiated twice: the second derivative lies on another machine. Whoever asks for it gets an error,
   also where torch's own `once_differentiable` would leave it out without a word (a gradient penalty on `y.sum()`).
2. With `skip_non_finite` gradients that hold NaN or infinity are not sent; the gradients of the inputs are NaN then,
   so that a `torch.amp.GradScaler` sees them and skips its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from p2pmoe.client.replies import is_finite
from p2pmoe.errors import BadRequestError, TorchModeError
from p2pmoe.protocol.modes import usable_anywhere
from p2pmoe.protocol.schema import WIRE_CODECS, BatchTensorProto
from p2pmoe.rpc.base import Flat

_REMEDY = (
    "the gradients of the loss hold NaN or infinity; drop the step, or make the layer with skip_non_finite=True, which "
    "sends nothing then and lets a torch.amp.GradScaler skip it"
)


def always_differentiable() -> torch.Tensor:
    """Autograd skips a Function none of whose inputs need a gradient; the expert must be trained all the same."""
    return torch.empty(0, dtype=torch.float32, device="cpu", requires_grad=True)


def keep_for_backward(ctx: Any, inputs: Sequence[torch.Tensor], outputs: Flat) -> Flat:
    """Note in an autograd context what `input_gradients` will need; gives the outputs back."""
    ctx.save_for_backward(*map(usable_anywhere, inputs))
    ctx.outputs = [(output.shape, output.dtype, output.device) for output in outputs]
    ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
    return outputs


def input_gradients(
    ctx: Any,
    gradients: tuple[torch.Tensor | None, ...],
    call: Callable[[Flat, Flat], Flat],
    *,
    protos: Sequence[BatchTensorProto],
    skip_non_finite: bool,
) -> tuple[torch.Tensor | None, ...]:
    """What a Function's backward gives for its inputs, the last of its arguments.

    Args:
        ctx: its context, as `keep_for_backward` left it.
        gradients: with respect to the outputs.
        call: sends the inputs and the gradients of the outputs; gives the gradients of the inputs.
        protos: the schema of the outputs.
        skip_non_finite: rule 2.
    """
    twice = torch.is_grad_enabled()  # create_graph=True
    with torch.no_grad():
        inputs = ctx.saved_tensors
        filled = _fill(ctx, gradients)
        if skip_non_finite and not _travel_finite(filled, protos):
            results: Flat = tuple(torch.full_like(each, math.nan if each.is_floating_point() else 0) for each in inputs)
        else:
            try:
                results = call(inputs, filled)
            except BadRequestError as error:
                if is_finite(filled):
                    raise
                raise BadRequestError(f"{error}: {_REMEDY}") from error
        needed = ctx.needs_input_grad[-len(inputs) :]
        wanted = tuple(
            result.to(tensor.device) if need else None
            for result, tensor, need in zip(results, inputs, needed, strict=True)
        )
    return _end_graph(wanted, (*inputs, *(each for each in gradients if each is not None))) if twice else wanted


def explain(reason: str, gradients: Flat) -> str:
    """A failed backward pass's reason, with what to do about it where the gradients themselves are to blame."""
    return reason if is_finite(gradients) else f"{reason}: {_REMEDY}"


def _fill(ctx: Any, gradients: tuple[torch.Tensor | None, ...]) -> Flat:
    """A dense gradient of each kept output's dtype; zeros where autograd has none."""
    return tuple(
        torch.zeros(shape, dtype=dtype, device=device) if gradient is None else _dense(gradient).to(dtype)
        for gradient, (shape, dtype, device) in zip(gradients, ctx.outputs, strict=True)
    )


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """An embedding looked up with `sparse=True` in an expert's output gives a sparse gradient."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def _travel_finite(gradients: Flat, protos: Sequence[BatchTensorProto]) -> bool:
    """Whether what arrives is finite: a codec's dtype may be too narrow for what is finite here."""
    return is_finite(gradients) and is_finite(
        [
            gradient.to(WIRE_CODECS[proto.codec])
            for gradient, proto in zip(gradients, protos, strict=True)
            if WIRE_CODECS[proto.codec] is not None
        ]
    )


def _end_graph(results: tuple[torch.Tensor | None, ...], causes: Flat) -> tuple[torch.Tensor | None, ...]:
    """The same gradients, hanging on all that they depend on by a Function that raises (rule 1)."""
    kept = tuple(each for each in results if each is not None)
    ended = iter(_NoSecondDerivative.apply(kept, *causes) if kept else ())  # type: ignore[no-untyped-call]
    return tuple(None if each is None else next(ended) for each in results)


class _NoSecondDerivative(torch.autograd.Function):
    """Where the graph of a gradient ends."""

    @staticmethod
    def forward(ctx: Any, gradients: Flat, *causes: torch.Tensor) -> Flat:
        del ctx, causes
        return gradients

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        raise TorchModeError(
            "a remote expert's backward pass is once_differentiable: it gives first derivatives only. Take second ones "
            "(gradient penalties, Hessians) of what lies outside of it: call it on detached inputs"
        )
