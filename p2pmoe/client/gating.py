"""Product-key gating: scores for a grid of experts without a score for each expert. Knows no peers.

Source: Learning@home (arXiv 2002.04013) section 3.2, after product key memory (arXiv 1907.05242).

Shapes: B batch, D features, K experts a row, L grid dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import nn

from p2pmoe.errors import SchemaError


class ProductKeyGating(nn.Module):
    """A linear layer whose outputs are split over the dimensions of the grid; an expert's score is their sum."""

    def __init__(self, in_features: int, grid_size: Sequence[int]) -> None:
        super().__init__()
        try:
            self.grid_size = tuple(map(operator.index, grid_size))
        except TypeError as error:
            raise SchemaError(f"grid_size must be whole numbers such as (16, 16), got {grid_size!r}") from error
        if not 1 <= len(self.grid_size) <= 4 or any(size < 1 for size in self.grid_size):
            raise SchemaError(f"grid_size must have 1 to 4 dimensions of at least 1, got {self.grid_size}")
        self.proj = nn.Linear(in_features, sum(self.grid_size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, D] -> one [B, grid_size[l]] for every dimension l, computed in the parameters' dtype (or autocast's)."""
        return self.proj(x.to(self.proj.weight.dtype)).split(list(self.grid_size), dim=-1)  # type: ignore[no-any-return]

    @staticmethod
    def score(scores: Sequence[torch.Tensor], coordinates: torch.Tensor) -> torch.Tensor:
        """Scores [B, K] of the experts at int64 [B, K, L], differentiable."""
        parts = [scores[level].gather(1, coordinates[..., level]) for level in range(len(scores))]
        return torch.stack(parts).sum(0)


def masked_softmax(scores: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Softmax of [B, K] over the entries that are alive; zeros elsewhere, and in rows without any. Never NaN."""
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~alive, lowest), dim=-1) * alive
