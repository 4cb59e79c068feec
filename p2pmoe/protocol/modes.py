"""torch's modes: what a thread, or whoever traces it, has set. Knows only torch.

Gradients, inference, autocast and the default device belong to a thread; the default dtype to the whole program. Work
that crosses threads must not depend on any of them:
1. A tensor that we make names its dtype and its device (a test reads the sources for that).
2. What another thread may write to is no tensor of ours, or is made outside of inference mode.
3. A call goes to another machine: nothing that only records or transforms operations can see through it. It is
   refused in words rather than recorded as a constant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from p2pmoe.errors import SchemaError, TorchModeError

R = TypeVar("R")


@contextlib.contextmanager
def as_in_a_new_thread() -> Iterator[None]:
    """Gradients on, no inference mode, no autocast, tensors on the CPU: what is made here may be used by any thread."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def keeps_graph() -> bool:
    """Whether autograd records what this thread does."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def usable_anywhere(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it was made in inference mode: such may be neither written to nor kept elsewhere."""
    return tensor.clone() if tensor.is_inference() else tensor


def out_of_compiled_graphs(function: Callable[..., R]) -> Callable[..., R]:
    """The function to call: itself, or while torch.compile reads the program one that ends the graph here.

    `torch.compiler.disable` as a decorator would import the compiler, some seconds, into every program.
    """
    if torch.compiler.is_compiling():
        disabled: Callable[..., R] = torch.compiler.disable(function, reason="an expert is called over the network")
        return disabled
    return function


def refuse_tracing(who: str) -> None:
    """Raises TorchModeError where a recorder would take the answer of a call for a constant."""
    is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]  # noqa: TID251 - runs no code
    if is_tracing() or get_proxy_mode() is not None:
        raise TorchModeError(
            f"{who} is called over the network, which torch.jit.trace, make_fx and torch.export cannot record: they "
            f"would keep this one answer for all inputs. Record the parts before and after it"
        )


def require_plain(who: str, name: str, tensor: torch.Tensor) -> None:
    """That a tensor has values that can be sent. Raises SchemaError or TorchModeError."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise SchemaError(
            f"{who}: {name} is a {kind} tensor on {tensor.device.type}; only dense tensors with values can travel, "
            f"e.g. its to_dense() or to_padded_tensor(0.0)"
        )
    try:
        tensor.data_ptr()
    except RuntimeError as error:
        raise TorchModeError(
            f"{who}: {name} is a {type(tensor).__name__} without values of its own, as inside torch.func (vmap, grad, "
            f"jvp) or a fake tensor mode; a remote call cannot be transformed. Use torch.autograd, and rows for vmap"
        ) from error


def refuse_tangents(who: str, tensors: tuple[Any, ...]) -> None:
    """Raises TorchModeError for inputs of forward-mode differentiation, whose tangents would be lost."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise TorchModeError(
                f"{who}: forward-mode differentiation does not reach through a remote call; use backward()"
            )
