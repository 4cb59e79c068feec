"""What a reply must be beyond its schema: finite numbers. Knows tensors; nothing of experts, peers or sockets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Final

import torch

from p2pmoe.errors import NonFiniteReplyError
from p2pmoe.protocol.finite import quick_norm
from p2pmoe.protocol.schema import BatchTensorProto
from p2pmoe.rpc.base import Flat

ORDINARY: Final = 1e4
"""Inputs up to this size give no honest expert reason to overflow."""
_CHUNK: Final = 1 << 16  # numbers that are looked at in one go on an event loop: some 10 µs


def is_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all floating tensors are free of NaN and infinity. Some microseconds for a small tensor."""
    return all(_is_finite(tensor) for tensor in tensors if tensor.is_floating_point())


async def is_finite_async(tensors: Sequence[torch.Tensor]) -> bool:
    """The same in small pieces, so that an event loop turns in between."""
    for tensor in tensors:
        if tensor.numel() <= _CHUNK:
            if not is_finite((tensor,)):
                return False
            continue
        for chunk in tensor.flatten().split(_CHUNK):
            if not is_finite((chunk,)):
                return False
            await asyncio.sleep(0)
    return True


def blames_the_node(sent: Sequence[torch.Tensor], expected: Sequence[BatchTensorProto]) -> bool:
    """Whether a non-finite reply is the node's fault: what was sent is finite and ordinary, and float16 is no limit."""
    if any(proto.dtype is torch.float16 or proto.codec == "fp16" for proto in expected):
        return False
    return all(_largest(tensor) <= ORDINARY for tensor in sent if tensor.is_floating_point())


def non_finite(who: str, sent: Sequence[torch.Tensor], expected: Sequence[BatchTensorProto]) -> NonFiniteReplyError:
    """The error for a reply that is not finite."""
    error = NonFiniteReplyError(f"{who} answered NaN or infinite values")
    error.is_evidence = blames_the_node(sent, expected)
    return error


def check_finite(
    who: str, reply: Flat, sent: Sequence[torch.Tensor], expected: Sequence[BatchTensorProto], *, strict: bool = False
) -> NonFiniteReplyError | None:
    """What is wrong with a reply, if anything.

    Non-finite inputs or gradients of our own come back as such: that is an answer, unless `strict`.
    """
    if is_finite(reply) or not (strict or is_finite(sent)):
        return None
    return non_finite(who, sent, expected)


async def check_finite_async(
    who: str, reply: Flat, sent: Sequence[torch.Tensor], expected: Sequence[BatchTensorProto]
) -> NonFiniteReplyError | None:
    """`check_finite` on an event loop."""
    if await is_finite_async(reply) or not await is_finite_async(sent):
        return None
    return non_finite(who, sent, expected)


def _is_finite(tensor: torch.Tensor) -> bool:
    return math.isfinite(quick_norm(tensor)) or bool(tensor.detach().isfinite().all())


def _largest(tensor: torch.Tensor) -> float:
    if not tensor.numel():
        return 0.0
    largest = tensor.detach().abs().max().item()
    return math.inf if math.isnan(largest) else largest
