"""Finiteness of tensors by their norm, of many small ones at once. Knows only torch.

Every call into torch gives up the interpreter's lock; among many threads each time costs a switch there and one back,
some 30 µs, ten times what looking at 16 kB takes (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

SMALL: Final = 1 << 15
"""Elements below which torch looks at a tensor in one thread. Above, it wakes a team that spins for milliseconds after,
on cores where a node beside us may be computing."""
_HANDFUL: Final = 64
_DTYPES: Final = (torch.float32, torch.float64)


def quick_norm(tensor: torch.Tensor) -> float:
    """The 2-norm of a floating tensor in one pass of the calling thread. Finite only when every value is.

    Not finite also when squares overflow (float32: values over 1e19).

    `vector_norm` reads 30 GB/s. `sum`, `dot` and `isfinite` wake torch's team of threads, which costs more than the
    pass itself, and is felt by whoever computes beside us (docs/benchmarks.md). For a handful of numbers calling torch
    at all costs more than they do.
    """
    tensor = tensor.detach()
    if tensor.is_complex():
        return quick_norm(torch.view_as_real(tensor))
    if tensor.numel() <= _HANDFUL:
        return math.hypot(*tensor.flatten().tolist())
    if tensor.dtype in _DTYPES:
        return float(torch.linalg.vector_norm(tensor).item())
    if tensor.numel() < SMALL:
        return float(torch.linalg.vector_norm(tensor, dtype=torch.float32).item())
    return math.hypot(*map(quick_norm, tensor.flatten().split(SMALL - 1)))


def small_and_alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether `norms_at_once` may be asked: small, one real dtype of 32 or 64 bits, on the CPU, of no gradient."""
    dtype = tensors[0].dtype
    return dtype in _DTYPES and all(
        tensor.dtype is dtype and tensor.numel() < SMALL and tensor.is_cpu and not tensor.requires_grad
        for tensor in tensors
    )


def norms_at_once(tensors: Sequence[torch.Tensor]) -> list[float]:
    """The 2-norm of each, finite only when every value is; not finite also when squares overflow."""
    norms: list[float] = torch.stack(torch._foreach_norm(tuple(tensors))).tolist()  # noqa: SLF001
    return norms


def all_surely_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """True only when no value of the floating ones is NaN or infinite; False also where a closer look is needed."""
    floating = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    return not floating or (small_and_alike(floating) and math.isfinite(sum(norms_at_once(floating))))
