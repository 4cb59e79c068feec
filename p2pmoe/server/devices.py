"""How a batch is put on a device, computed and brought back. Knows nothing of queues' order or of the network.

A batch goes through three steps: `stage` (merge the tasks, copy to the device), `launch` (compute), `finish`
(results on the CPU). On CUDA the first and the last only queue work on streams, so that the runtime can stage the
next batch while this one computes; on the CPU they are plain function calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from p2pmoe.errors import SchemaError
from p2pmoe.protocol.finite import SMALL
from p2pmoe.protocol.modes import usable_anywhere
from p2pmoe.server.task_pool import Batch

Flat = tuple[torch.Tensor, ...]
_JOINED_ALONE: Final = 8 * SMALL


@dataclass(slots=True)
class Staged:
    """A batch whose merged inputs are, or will be, on the device."""

    batch: Batch
    inputs: Flat
    ready: Any = None  # CUDA event: the copy to the device is done


@dataclass(slots=True)
class Launched:
    """A batch whose results are, or will be, on the CPU."""

    batch: Batch
    outputs: Flat
    done: Any = None  # CUDA event: the copy from the device is done


class Device(Protocol):
    """CPU and CUDA behave alike."""

    prefetches: bool
    """Whether staging the next batch while one computes gains anything."""

    def stage(self, batch: Batch) -> Staged:
        """Merge the tasks and start copying them to the device."""

    def launch(self, staged: Staged) -> Launched:
        """Compute and start copying the results back."""

    def finish(self, launched: Launched) -> Flat:
        """The results, on the CPU and complete."""

    def is_lost(self, error: BaseException) -> bool:
        """Whether nothing can be computed here any more after this error."""


def open_device(name: str) -> Device:
    """The device of a torch name such as "cpu" or "cuda:1"."""
    device = torch.device(name)
    return CudaDevice(device) if device.type == "cuda" else PlainDevice(device)


def merge(batch: Batch) -> Flat:
    """Inputs of all tasks, one after the other. A batch of one task is handed on as it lies."""
    if len(batch.tasks) == 1:
        return tuple(map(usable_anywhere, batch.tasks[0].tensors))
    return tuple(_join(column) for column in zip(*(task.tensors for task in batch.tasks), strict=True))


def _join(column: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`torch.cat`, in pieces where that is much quicker than to wake threads that spin for a while afterwards."""
    first = column[0]
    numel = sum(tensor.numel() for tensor in column)
    if not SMALL <= numel <= _JOINED_ALONE:
        return torch.cat(column)
    joined = torch.empty((sum(map(len, column)), *first.shape[1:]), dtype=first.dtype, device="cpu")
    row = 0
    for piece in _pieces(column):
        rows = sum(map(len, piece))
        torch.cat(piece, out=joined[row : row + rows])
        row += rows
    return joined


def _pieces(column: tuple[torch.Tensor, ...]) -> Iterator[list[torch.Tensor]]:
    """Neighbours together, `SMALL` numbers or more of one tensor alone."""
    piece: list[torch.Tensor] = []
    numel = 0
    for tensor in column:
        if piece and numel + tensor.numel() >= SMALL:
            yield piece
            piece, numel = [], 0
        piece.append(tensor)
        numel += tensor.numel()
    yield piece


def check_results(batch: Batch, outputs: Flat) -> None:
    """That a pool's function gave as many rows as it got, and what the pool's schema says. Raises SchemaError."""
    expected = batch.pool.results
    if expected is not None and len(outputs) != len(expected):
        raise SchemaError(f"{batch.pool.uid}: {len(outputs)} outputs were given where the schema has {len(expected)}")
    for index, output in enumerate(outputs):
        if output.ndim == 0 or len(output) != batch.rows:
            got = list(output.shape)
            raise SchemaError(f"{batch.pool.uid}: output {index} has shape {got} for a batch of {batch.rows} rows")
        if expected is not None and not expected[index].fits(output):
            raise SchemaError(
                f"{batch.pool.uid}: output {index} is {output.dtype} of {list(output.shape)} for a batch of "
                f"{batch.rows} rows, the schema says {expected[index]}"
            )


class PlainDevice:
    """The CPU, and any device that needs no staging of its own."""

    prefetches = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cpu = device.type == "cpu"

    def __repr__(self) -> str:
        return f"<PlainDevice {self._device}>"

    def stage(self, batch: Batch) -> Staged:
        inputs = merge(batch)
        return Staged(batch, inputs if self._is_cpu else tuple(tensor.to(self._device) for tensor in inputs))

    def launch(self, staged: Staged) -> Launched:
        outputs = staged.batch.compute(staged.inputs)
        check_results(staged.batch, outputs)
        return Launched(staged.batch, outputs)

    def finish(self, launched: Launched) -> Flat:
        return tuple(output.detach() if output.is_cpu else output.detach().to("cpu") for output in launched.outputs)

    def is_lost(self, error: BaseException) -> bool:
        return False


class CudaDevice:
    """One GPU: pinned staging, copies on streams of their own, so that they overlap with computing."""

    prefetches = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_in = torch.cuda.Stream(device)
        self._copy_out = torch.cuda.Stream(device)
        self._compute = torch.cuda.Stream(device)

    def __repr__(self) -> str:
        return f"<CudaDevice {self._device}>"

    def stage(self, batch: Batch) -> Staged:
        with torch.cuda.stream(self._copy_in):
            inputs = tuple(
                self._pin(column).to(self._device, non_blocking=True)
                for column in zip(*(task.tensors for task in batch.tasks), strict=True)
            )
            ready = torch.cuda.Event()
            ready.record(self._copy_in)
        return Staged(batch, inputs, ready)

    def launch(self, staged: Staged) -> Launched:
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(staged.ready)
            for tensor in staged.inputs:
                tensor.record_stream(self._compute)
            outputs = staged.batch.compute(staged.inputs)
            check_results(staged.batch, outputs)
            computed = torch.cuda.Event()
            computed.record(self._compute)
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(computed)
            on_cpu = []
            for output in outputs:
                output.record_stream(self._copy_out)
                pinned = torch.empty(output.shape, dtype=output.dtype, device="cpu", pin_memory=True)
                on_cpu.append(pinned.copy_(output.detach(), non_blocking=True))
            done = torch.cuda.Event()
            done.record(self._copy_out)
        return Launched(staged.batch, tuple(on_cpu), done)

    def finish(self, launched: Launched) -> Flat:
        launched.done.synchronize()
        return launched.outputs

    def is_lost(self, error: BaseException) -> bool:
        # An index out of range trips an assertion in the kernel, and ends the whole process's use of CUDA.
        return issubclass(type(error), torch.AcceleratorError)

    @staticmethod
    def _pin(column: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The tasks' rows merged straight into pinned memory: one copy, as the plain merge needs too."""
        rows = sum(len(tensor) for tensor in column)
        first = column[0]
        pinned = torch.empty((rows, *first.shape[1:]), dtype=first.dtype, device="cpu", pin_memory=True)
        return torch.cat(column, out=pinned)
