"""Which row goes to which expert: rows sorted by expert, so that each call's input is one slice of one tensor.

Knows tensors only. Shapes: B rows, K experts a row, P pairs (a row and one of its experts), E distinct experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """Pairs sorted by expert.

    rows_P, slots_P: int64, which row and which of its K places; experts: coordinates of each distinct expert;
    bounds: where each expert's pairs begin and end.
    """

    rows_P: torch.Tensor
    slots_P: torch.Tensor
    experts: list[tuple[int, ...]]
    bounds: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.experts)


def route(coordinates: torch.Tensor, valid: torch.Tensor, grid_size: tuple[int, ...]) -> Routing:
    """Group the valid entries of int64 [B, K, L] by expert."""
    rows, slots = valid.nonzero(as_tuple=True)
    chosen = coordinates[rows, slots]
    key = chosen[:, 0].clone()
    for level in range(1, len(grid_size)):
        key = key * grid_size[level] + chosen[:, level]
    key, order = key.sort(stable=True)
    _, counts = torch.unique_consecutive(key, return_counts=True)
    ends = counts.cumsum(0).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
    firsts = chosen[order[[start for start, _ in bounds]]].tolist() if bounds else []
    return Routing(rows[order], slots[order], [tuple(each) for each in firsts], bounds)
