"""Puts an expert's buffers back when a pass spoilt them: running statistics take up what callers send.

Knows modules; nothing of batches. torch counts the writes to a tensor, but batch normalisation writes its running
statistics past that count; so only large buffers are believed to be unchanged when their count is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from p2pmoe.server.gate import is_finite

_SMALL = 1 << 16  # elements; statistics have one a channel, tables and masks more


@dataclass(slots=True)
class _Kept:
    tensor: torch.Tensor
    version: int
    copy: torch.Tensor


class KeptBuffers:
    """Copies of a module's buffers as they were when they were last known to be good."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [each._buffers for each in module.modules()]  # noqa: SLF001
        self._kept: dict[tuple[int, str], _Kept] = {}
        self.keep()

    def __repr__(self) -> str:
        return f"<KeptBuffers: {len(self._kept)} buffers>"

    def changes_are_finite(self) -> bool:
        """Whether what may have been written since `keep` holds neither NaN nor infinity."""
        return all(is_finite(buffer) for _, buffer in self._touched())

    def keep(self) -> None:
        """The buffers are good as they are now."""
        for key, buffer in self._touched():
            kept = self._kept.get(key)
            if kept is not None and kept.tensor is buffer:
                kept.copy.copy_(buffer.detach())
                kept.version = buffer._version  # noqa: SLF001
            else:
                self._kept[key] = _Kept(buffer, buffer._version, buffer.detach().clone())  # noqa: SLF001

    @torch.no_grad()
    def put_back(self) -> None:
        """As they were at the last `keep`: values, and which tensors they are."""
        for (index, name), buffer in self._touched():
            buffers, kept = self._buffers[index], self._kept.get((index, name))
            if kept is None:
                del buffers[name]
                continue
            kept.tensor.copy_(kept.copy)  # also one that was replaced: it may have been written to before
            kept.version = kept.tensor._version  # noqa: SLF001
            if buffer is not kept.tensor:
                buffers[name] = kept.tensor

    def _touched(self) -> list[tuple[tuple[int, str], torch.Tensor]]:
        """Buffers that a pass may have written, replaced or added."""
        if not any(self._buffers):
            return []
        return [
            ((index, name), buffer)
            for index, buffers in enumerate(self._buffers)
            for name, buffer in buffers.items()
            if buffer is not None and self._may_differ(self._kept.get((index, name)), buffer)
        ]

    @staticmethod
    def _may_differ(kept: _Kept | None, buffer: torch.Tensor) -> bool:
        if kept is None or kept.tensor is not buffer or buffer.numel() <= _SMALL:
            return True
        return kept.version != buffer._version  # noqa: SLF001
