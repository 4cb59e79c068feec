"""What an expert must give, by its schema: checked for every batch, so that nothing else is ever sent.

Knows schemas and tensors; nothing of experts, batches or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from p2pmoe.errors import BadRequestError, SchemaError
from p2pmoe.protocol.nested import nested_compare, nested_flatten
from p2pmoe.protocol.schema import FREE_GROWTH, BatchTensorProto, Shape, format_tensor, largest_free

Flat = tuple[torch.Tensor, ...]


class ExpectedOutputs:
    """The outputs of one expert.

    Args:
        name: the expert's uid.
        schema: of the outputs.
        dtypes: what the expert gives; floating ones are cast where the schema says others.
        inputs: the schema of the arguments, flat.
    """

    def __init__(
        self, name: str, schema: Any, dtypes: tuple[torch.dtype, ...], inputs: tuple[BatchTensorProto, ...]
    ) -> None:
        self._name, self._schema, self._dtypes, self._inputs = name, schema, dtypes, inputs
        self.protos: tuple[BatchTensorProto, ...] = nested_flatten(schema)
        """Flat, in wire order."""
        self._shapes = tuple(proto.shape for proto in self.protos)
        self._sent = tuple(proto.dtype for proto in self.protos)
        self._casts = self._sent != dtypes
        self._is_plain = isinstance(schema, BatchTensorProto)
        self._is_free = any(proto.is_free for proto in self.protos)

    def __repr__(self) -> str:
        return f"<ExpectedOutputs of {self._name}: {len(self.protos)} tensors>"

    def to_send(self, outputs: Any, inputs: Sequence[torch.Tensor]) -> Flat:
        """An expert's answer to `inputs`, flat and in the schema's dtypes. Raises SchemaError."""
        rows = len(inputs[0])
        if (
            self._is_plain
            and isinstance(outputs, torch.Tensor)
            and outputs.shape == (rows, *self._shapes[0])
            and outputs.dtype is self._sent[0]
            and not self._casts
            and outputs.layout is torch.strided
        ):
            return (outputs,)  # what nearly every expert gives
        flat = self._checked(outputs, rows)
        if self._is_free:
            self._check_growth(flat, inputs)
        return tuple(map(torch.Tensor.to, flat, self._sent)) if self._casts else flat

    def pairs(self, outputs: Any, grad_outputs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The outputs that can be differentiated, each with its gradient on its device and in its dtype.

        Raises:
            SchemaError: the expert gave something else than its schema says.
            BadRequestError: a gradient has another free size than its output.
        """
        gradients = nested_flatten(grad_outputs)
        flat = self._checked(outputs, len(gradients[0]))
        for index, (output, gradient) in enumerate(zip(flat, gradients, strict=True)):
            if output.shape != gradient.shape:
                raise BadRequestError(
                    f"{self._name}: the gradient of output {index} is {list(gradient.shape)}, and the output of these "
                    f"arguments {list(output.shape)}"
                )
        return [
            (output, gradient.to(device=output.device, dtype=output.dtype, non_blocking=True))
            for output, gradient in zip(flat, gradients, strict=True)
            if output.requires_grad
        ]

    # -- private

    def _checked(self, outputs: Any, rows: int) -> Flat:
        flat: tuple[Any, ...] = (outputs,) if isinstance(outputs, torch.Tensor) else nested_flatten(outputs)
        for output, shape, dtype in zip(flat, self._shapes, self._dtypes, strict=False):
            if (
                not isinstance(output, torch.Tensor)
                or (output.shape != (rows, *shape) and not _is_free_size(output, rows, shape))
                or output.dtype is not dtype
                or output.layout is not torch.strided
            ):
                raise SchemaError(self._misfit(flat, rows))
        if len(flat) != len(self.protos) or not (
            isinstance(outputs, torch.Tensor) if self._is_plain else nested_compare(outputs, self._schema)
        ):
            raise SchemaError(f"{self._name}: the outputs do not have the structure of outputs_schema")
        return flat

    def _check_growth(self, outputs: Flat, inputs: Sequence[torch.Tensor]) -> None:
        """That nobody gets more than callers make room for."""
        most = FREE_GROWTH * largest_free(self._inputs, [each.shape for each in inputs])
        if largest_free(self.protos, [each.shape for each in outputs]) > most:
            raise SchemaError(f"{self._name}: an output is over {FREE_GROWTH} times longer than the arguments")

    def _misfit(self, flat: tuple[Any, ...], rows: int) -> str:
        gave = ", ".join(
            f"{_layout(each)}{format_tensor(tuple(each.shape), _name_of(each.dtype))}"
            if isinstance(each, torch.Tensor)
            else type(each).__name__
            for each in flat
        )
        wanted = ", ".join(
            format_tensor((rows, *shape), _name_of(dtype))
            for shape, dtype in zip(self._shapes, self._dtypes, strict=True)
        )
        return f"{self._name}: the expert gave ({gave}) where its schema says ({wanted})"


def _is_free_size(output: torch.Tensor, rows: int, shape: Shape) -> bool:
    if None not in shape or output.ndim != len(shape) + 1 or len(output) != rows:
        return False
    return all(wanted is None or size == wanted for size, wanted in zip(output.shape[1:], shape, strict=True))


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(tensor: torch.Tensor) -> str:
    return "" if tensor.layout is torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
