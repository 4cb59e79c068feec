"""What tensors an expert takes and gives: `BatchTensorProto`, and schemas as JSON. Knows nothing of calls.

Datatype names are those of the Open Inference Protocol (KServe v2), "Tensor Data Types".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from p2pmoe.errors import DecodeError, EncodeError, SchemaError
from p2pmoe.protocol.nested import nested_flatten
from p2pmoe.protocol.schema_digest import digest_of_json

DTYPE_TO_DATATYPE: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}
DATATYPE_TO_DTYPE = {name: dtype for dtype, name in DTYPE_TO_DATATYPE.items()}
WIRE_CODECS: dict[str, torch.dtype | None] = {"raw": None, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Codec name -> the dtype that travels instead; `None` is the tensor's own. Only floating tensors may be cast."""

FREE_GROWTH: Final = 16
"""A free dimension of an output is at most so many times the largest one of the call's arguments."""
Shape = tuple[int | None, ...]
_MAX_SCHEMA_DEPTH = 32


@dataclass(frozen=True, slots=True, init=False)
class BatchTensorProto:
    """One tensor of an expert's schema: its shape without the batch dimension, its dtype and its wire codec.

    A dimension that is None is free: each call has its own size there, at least 1 where the tensor is an argument, the
    same for all rows (`BatchTensorProto(None, 64)`: sequences of any length). Calls of other sizes do not share a
    batch. `codec` is "raw", "fp16" or "bf16": what travels instead of the tensor's own bytes.
    """

    shape: Shape
    dtype: torch.dtype
    requires_grad: bool
    codec: str

    def __init__(
        self,
        *shape: int | None,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = False,
        codec: str | None = None,
    ) -> None:
        if dtype not in DTYPE_TO_DATATYPE:
            raise SchemaError(
                f"dtype {dtype} has no wire datatype; use one of {', '.join(map(str, DTYPE_TO_DATATYPE))}"
            )
        if any(size is not None and (not isinstance(size, int) or size < 0) for size in shape):
            raise SchemaError(
                f"shape {shape} must be sizes ≥ 0, or None for a free one, without the batch dimension, e.g. "
                "BatchTensorProto(512)"
            )
        codec = codec or "raw"
        if codec not in WIRE_CODECS:
            raise SchemaError(f"unknown codec {codec!r}; use one of {', '.join(WIRE_CODECS)}")
        if codec != "raw" and not dtype.is_floating_point:
            raise SchemaError(f"codec {codec!r} is for floating tensors, not {dtype}")
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "requires_grad", requires_grad)
        object.__setattr__(self, "codec", codec)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> BatchTensorProto:
        """The schema of a batch: `tensor` is [batch, *shape]."""
        if tensor.ndim == 0:
            raise SchemaError("a batch tensor needs a batch dimension in front; got a scalar")
        return cls(*tensor.shape[1:], dtype=tensor.dtype, requires_grad=tensor.requires_grad)

    @property
    def datatype(self) -> str:
        return DTYPE_TO_DATATYPE[self.dtype]

    @property
    def is_free(self) -> bool:
        """Whether a dimension has another size in each call."""
        return None in self.shape

    def sized(self, free: int) -> tuple[int, ...]:
        """The shape with this size for free dimensions."""
        return tuple(free if size is None else size for size in self.shape)

    def takes(self, shape: Sequence[int], least: int = 1, most: int | None = None) -> bool:
        """Whether a shape without the batch is one of these, free sizes within these bounds."""
        if len(shape) != len(self.shape):
            return False
        return all(
            size == wanted if wanted is not None else least <= size and (most is None or size <= most)
            for size, wanted in zip(shape, self.shape, strict=True)
        )

    def make_empty(self, batch_size: int, device: torch.device | str | None = None, *, free: int = 1) -> torch.Tensor:
        """Uninitialised [batch_size, *shape], free dimensions of size `free`."""
        return torch.empty(batch_size, *self.sized(free), dtype=self.dtype, device=device)

    def make_zeros(self, batch_size: int, device: torch.device | str | None = None, *, free: int = 1) -> torch.Tensor:
        """Zeros of [batch_size, *shape], free dimensions of size `free`."""
        return torch.zeros(batch_size, *self.sized(free), dtype=self.dtype, device=device)

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a [batch, …] tensor is one of these, whatever its number of rows."""
        shape = tensor.shape[1:]
        is_shape = shape == self.shape or (self.is_free and self.takes(shape, least=0))
        return is_shape and tensor.dtype is self.dtype and tensor.layout is torch.strided

    def __str__(self) -> str:
        return format_tensor((-1, *self.shape), self.datatype)


def largest_free(protos: Sequence[BatchTensorProto], shapes: Iterable[Sequence[int]]) -> int:
    """The largest size of a free dimension in shapes that have the batch in front; 0 where none is free."""
    return max(
        (
            size
            for proto, shape in zip(protos, shapes, strict=False)
            if proto.is_free
            for size, wanted in zip(shape[1:], proto.shape, strict=False)
            if wanted is None
        ),
        default=0,
    )


def format_tensor(shape: Sequence[int | None], datatype: str) -> str:
    """`FP32[batch, any, 512]`: how messages show a tensor. -1 in front stands for the batch, None for any size."""
    sizes = [
        "batch" if index == 0 and size == -1 else "any" if size is None else str(size)
        for index, size in enumerate(shape)
    ]
    return f"{datatype}[{', '.join(sizes)}]"


def format_schema(schema: Any) -> str:
    """All tensors of a schema in wire order, for messages."""
    return "(" + ", ".join(map(str, nested_flatten(schema))) + ")"


def schema_to_json(schema: Any) -> Any:
    """Nested BatchTensorProto as plain JSON values; `schema_from_json` reads it back."""
    if isinstance(schema, BatchTensorProto):
        return {
            "type": "tensor",
            "shape": list(schema.shape),
            "datatype": schema.datatype,
            "requires_grad": schema.requires_grad,
            "codec": schema.codec,
        }
    if isinstance(schema, dict):
        return {"type": "dict", "items": {key: schema_to_json(schema[key]) for key in sorted(schema)}}
    if isinstance(schema, (list, tuple)):
        kind = "list" if isinstance(schema, list) else "tuple"
        return {"type": kind, "items": [schema_to_json(item) for item in schema]}
    raise EncodeError(f"a schema is made of BatchTensorProto in tuples, lists and dicts, not {type(schema).__name__}")


def schema_from_json(value: Any, depth: int = 0) -> Any:
    """The inverse of `schema_to_json` for a peer's words. Raises DecodeError."""
    if depth > _MAX_SCHEMA_DEPTH:
        raise DecodeError(f"a schema is nested deeper than {_MAX_SCHEMA_DEPTH} levels")
    if not isinstance(value, dict):
        raise DecodeError(f"a schema node must be an object, got {type(value).__name__}")
    kind, items = value.get("type"), value.get("items")
    if kind == "tensor":
        return _tensor_from_json(value)
    if kind == "dict" and isinstance(items, dict):
        return {key: schema_from_json(item, depth + 1) for key, item in items.items()}
    if kind in ("list", "tuple") and isinstance(items, list):
        parts = [schema_from_json(item, depth + 1) for item in items]
        return parts if kind == "list" else tuple(parts)
    raise DecodeError(f"a schema node of type {kind!r} is unknown or has no items")


def schema_digest(forward_schema: Any, outputs_schema: Any) -> str:
    """16 hexadecimal characters naming a schema: equal digests mean that calls are interchangeable."""
    return digest_of_json(schema_to_json(forward_schema), schema_to_json(outputs_schema))


def _tensor_from_json(value: dict[str, Any]) -> BatchTensorProto:
    shape, datatype = value.get("shape"), value.get("datatype")
    if (
        not isinstance(shape, list)
        or len(shape) > 64
        or not all(size is None or (type(size) is int and 0 <= size < 2**48) for size in shape)
    ):
        raise DecodeError("a tensor of a schema needs a shape of sizes ≥ 0, null for a free one")
    dtype = DATATYPE_TO_DTYPE.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        raise DecodeError(f"datatype {datatype!r} is not one of the Open Inference Protocol's")
    codec = value.get("codec") or "raw"
    if not isinstance(codec, str) or codec not in WIRE_CODECS or (codec != "raw" and not dtype.is_floating_point):
        raise DecodeError(f"unknown codec {codec!r} in a schema; known: {', '.join(WIRE_CODECS)}")
    return BatchTensorProto(*shape, dtype=dtype, requires_grad=value.get("requires_grad") is True, codec=codec)
