"""A call's arguments against an expert's schema, and the dtype that its outputs go back in.

Knows schemas and tensors; nothing of calls. Floats are cast to the schema's dtype on the way out; what comes back is
cast to what the caller uses, so that a bfloat16 or float64 model goes on in its own precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from p2pmoe.client.directory import ExpertInfo
from p2pmoe.errors import SchemaError
from p2pmoe.protocol.modes import require_plain
from p2pmoe.protocol.nested import nested_compare, nested_flatten
from p2pmoe.protocol.schema import BatchTensorProto, format_schema, format_tensor
from p2pmoe.rpc.base import Flat


def check_arguments(
    uid: str, info: ExpertInfo, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Flat, torch.dtype | None]:
    """Arguments as flat tensors in wire order, floating ones cast to the schema's dtype.

    The second is the dtype for the floating outputs: that of the first floating argument if it was cast, else None
    for the schema's own. Raises SchemaError, and TorchModeError for tensors without values of their own.
    """
    if info.takes_plain_args and not kwargs and len(args) == len(info.inputs):
        flat = args  # no nesting to compare and to take apart
    elif nested_compare((args, kwargs), info.forward_schema):
        flat = nested_flatten((args, kwargs))
    else:
        given = ", ".join([*(["…"] * len(args)), *(f"{key}=…" for key in kwargs)])
        raise SchemaError(
            f"{uid} takes positional {format_schema(info.forward_schema[0])} and keywords "
            f"{sorted(info.forward_schema[1])}; it was called as ({given})"
        )
    tensors = tuple(
        _cast(uid, index, value, proto) for index, (value, proto) in enumerate(zip(flat, info.inputs, strict=True))
    )
    if len(tensors) > 1 and len({len(tensor) for tensor in tensors}) != 1:
        raise SchemaError(f"{uid}: all tensors must have the same batch size, got {[len(each) for each in tensors]}")
    for value, tensor in zip(flat, tensors, strict=True):
        if tensor.is_floating_point():
            return tensors, None if value is tensor else value.dtype
    return tensors, None


def give_back(outputs: Iterable[torch.Tensor], dtype: torch.dtype | None) -> Flat:
    """Floating outputs in this dtype; None leaves them as they are."""
    if dtype is None:
        return tuple(outputs)
    return tuple(output.to(dtype) if output.is_floating_point() else output for output in outputs)


def _cast(uid: str, index: int, value: Any, proto: BatchTensorProto) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise SchemaError(f"{uid}: argument {index} must be a tensor {proto}, got {type(value).__name__}")
    require_plain(uid, index, value)
    if value.dtype is proto.dtype and value.shape[1:] == proto.shape and value.ndim:
        return value
    both_floating = value.is_floating_point() and proto.dtype.is_floating_point
    if value.ndim == 0 or not proto.takes(value.shape[1:]) or not (value.dtype == proto.dtype or both_floating):
        got = format_tensor(tuple(value.shape), str(value.dtype).removeprefix("torch."))
        raise SchemaError(f"{uid}: argument {index} must be {proto}, got {got}")
    return value.to(proto.dtype)
