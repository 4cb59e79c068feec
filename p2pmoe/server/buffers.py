"""Puts an expert's buffers back when a pass was not to change them, or spoilt them.

Knows modules; nothing of batches. torch counts the writes to a tensor, but batch normalisation writes its running
statistics past that count; so only large buffers are believed to be unchanged when their count is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from p2pmoe.server.gate import is_finite
from p2pmoe.server.module_state import write_back

_SMALL = 1 << 16  # elements; statistics have one a channel, tables and masks more
_Key = tuple[int, str]


@dataclass(slots=True)
class _Kept:
    tensor: torch.Tensor
    version: int
    copy: torch.Tensor


Snapshot = list[tuple[torch.Tensor, torch.Tensor]]


class KeptBuffers:
    """Copies of a module's buffers as they were when they were last known to be good.

    Args:
        module: whose buffers.
        parameters: those that the module's forward writes to, as an embedding with `max_norm` does: kept as well.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> None:
        self._buffers = [each._buffers for each in module.modules()]  # noqa: SLF001
        self._parameters = list(parameters)
        self._values: Snapshot = []  # of these parameters
        self._kept: dict[_Key, _Kept] = {}
        self.keep()

    def __repr__(self) -> str:
        return f"<KeptBuffers: {len(self._kept)} buffers, {len(self._parameters)} parameters>"

    def __bool__(self) -> bool:
        """Whether there is anything to keep now."""
        return any(self._buffers) or bool(self._parameters or self._kept)

    def changes_are_finite(self) -> bool:
        """Whether what may have been written since `keep` holds no NaN or infinity that was not there: masks do."""
        return all(is_finite(buffer) or self._was_so(key, buffer) for key, buffer in self._touched())

    def keep(self) -> None:
        """The buffers are good as they are now."""
        for key, buffer in self._touched():
            kept = self._kept.get(key)
            if kept is not None and kept.tensor is buffer and kept.copy.shape == buffer.shape:
                kept.copy.copy_(buffer.detach())
                kept.version = buffer._version  # noqa: SLF001
            else:
                self._kept[key] = _Kept(buffer, buffer._version, buffer.detach().clone())  # noqa: SLF001
        for key in [key for key in self._kept if self._now(key) is None]:
            del self._kept[key]
        self._values = [(each, each.detach().clone()) for each in self._parameters]

    @torch.no_grad()
    def put_back(self) -> None:
        """As they were at the last `keep`: values, and which tensors they are."""
        for (index, name), buffer in self._touched():
            buffers, kept = self._buffers[index], self._kept.get((index, name))
            if kept is None:
                del buffers[name]
            elif kept.tensor.shape != kept.copy.shape:  # resized in place
                buffers[name] = kept.tensor = kept.copy.clone()
                kept.version = kept.tensor._version  # noqa: SLF001
            else:
                write_back(kept.tensor, kept.copy)  # also one that was replaced: it may have been written to before
                kept.version = kept.tensor._version  # noqa: SLF001
                if buffer is not kept.tensor:
                    buffers[name] = kept.tensor
        for index, name in [key for key in self._kept if self._now(key) is None]:
            self._buffers[index][name] = self._kept[index, name].tensor
        for parameter, value in self._values:
            write_back(parameter, value)

    def snapshot(self) -> Snapshot:
        """The values of those that may have been written since `keep`, as they are now; see `return_to`."""
        return [(buffer, buffer.detach().clone()) for _, buffer in self._touched()]

    @staticmethod
    @torch.no_grad()
    def return_to(snapshot: Snapshot) -> None:
        """Values as they were at a `snapshot`: what is computed again within a pass must not count twice."""
        for tensor, value in snapshot:
            write_back(tensor, value)

    # -- private

    def _was_so(self, key: _Key, buffer: torch.Tensor) -> bool:
        kept = self._kept.get(key)
        return (
            kept is not None
            and kept.copy.shape == buffer.shape
            and torch.equal(torch.isfinite(kept.copy), torch.isfinite(buffer))
        )

    def _now(self, key: _Key) -> torch.Tensor | None:
        buffers, name = self._buffers[key[0]], key[1]
        return buffers[name] if name in buffers else None  # noqa: SIM401 - those of scripted modules have no get

    def _touched(self) -> list[tuple[_Key, torch.Tensor]]:
        """Buffers that a pass may have written, replaced or added."""
        return list(self._find_touched()) if any(self._buffers) else []

    def _find_touched(self) -> Iterator[tuple[_Key, torch.Tensor]]:
        for index, buffers in enumerate(self._buffers):
            for name, buffer in buffers.items():
                if buffer is not None and self._may_differ(self._kept.get((index, name)), buffer):
                    yield (index, name), buffer

    @staticmethod
    def _may_differ(kept: _Kept | None, buffer: torch.Tensor) -> bool:
        if kept is None or kept.tensor is not buffer or buffer.numel() <= _SMALL:
            return True
        return kept.version != buffer._version  # noqa: SLF001
