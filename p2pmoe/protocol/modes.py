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
from typing import TypeVar

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


def mode_of_now() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Contexts in which autograd does what it does now.

    A coroutine goes on in whatever mode its thread is in by then: other tasks leave `no_grad` on while they wait.
    """
    with_grad, with_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with torch.inference_mode(with_inference), torch.set_grad_enabled(with_grad):
            yield

    return again


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


def require_plain(who: str, what: str | int, tensor: torch.Tensor) -> None:
    """That a tensor has values that can be sent, and nothing besides. `what` is a name, or the number of an argument.

    Raises SchemaError, and TorchModeError for what transforms and forward-mode differentiation make.
    """
    try:
        if type(tensor) is not torch.Tensor:
            _require_memory(tensor)
        tensor.data_ptr()
        if tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta:
            if forward_ad.unpack_dual(tensor).tangent is None:
                return
            raise TorchModeError(
                f"{who}: forward-mode differentiation does not reach through a remote call; use backward()"
            )
    except RuntimeError as error:
        if isinstance(error, TorchModeError):
            raise
        if tensor.layout is torch.strided and not tensor.is_nested:
            raise TorchModeError(
                f"{who}: {_name(what)} is a {type(tensor).__name__} without values of its own, as inside torch.func "
                f"(vmap, grad, jvp) or a fake tensor mode; a remote call cannot be transformed. Use torch.autograd, "
                f"and rows for vmap"
            ) from error
    kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    raise SchemaError(
        f"{who}: {_name(what)} is a {kind} tensor on {tensor.device.type}; only dense tensors with values can travel, "
        f"e.g. its to_dense() or to_padded_tensor(0.0)"
    )


def _require_memory(tensor: torch.Tensor) -> None:
    """Classes with a `__torch_dispatch__` of their own stand for tensors: fake, functional, distributed ones."""
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not tensor.is_nested:
        raise RuntimeError(f"{type(tensor).__name__} has no memory")


def _name(what: str | int) -> str:
    return f"argument {what}" if isinstance(what, int) else what
