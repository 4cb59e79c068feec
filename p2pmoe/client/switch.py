"""The switch form of the mixture: one expert a row, jitter on the gate, a loss that balances the load.

Source: Switch Transformers (arXiv 2101.03961), sections 2.1 and 2.2, over a product-key grid. Shapes: B rows,
G size of one grid dimension, L dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from p2pmoe.client.mixture import RemoteMixtureOfExperts
from p2pmoe.client.swarm import Swarm


class RemoteSwitchMixtureOfExperts(RemoteMixtureOfExperts):
    """A mixture of one: each row goes to its best live expert, scaled by that expert's gate probability.

    Args:
        swarm, in_features, grid_size, uid_prefix, options: as in `RemoteMixtureOfExperts`; `k_best` is 1.
        jitter_eps: while training, the gate reads its input times uniform noise in [1 - eps, 1 + eps].

    Calling it gives `(output, balancing_loss)`: the loss is 1 when rows and probabilities are spread evenly over
    every dimension of the grid, and larger otherwise; add it to the task's loss with a small factor such as 0.01.
    """

    def __init__(
        self,
        swarm: Swarm,
        *,
        in_features: int,
        grid_size: Sequence[int],
        uid_prefix: str,
        jitter_eps: float = 1e-2,
        **options: Any,
    ) -> None:
        options.setdefault("k_best", 1)
        super().__init__(swarm, in_features=in_features, grid_size=grid_size, uid_prefix=uid_prefix, **options)
        self.jitter_eps = jitter_eps

    def _scores(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        if self.training and self.jitter_eps:
            x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 has two numbers between 0.99 and 1.01
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_eps, 1 + self.jitter_eps)
        return super()._scores(x)

    def _weights(self, scores: Sequence[torch.Tensor], coordinates: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        parts = [torch.softmax(score, dim=-1).gather(1, coordinates[..., level]) for level, score in enumerate(scores)]
        return torch.stack(parts).prod(0) * alive

    def _finish(self, mixed: Any, scores: Sequence[torch.Tensor], coordinates: torch.Tensor) -> Any:
        losses = []
        for level, score in enumerate(scores):
            grid = score.shape[1]
            rows = max(1, len(score))  # no rows at all are balanced, not NaN
            routed = functional.one_hot(coordinates[:, 0, level], grid).to(score.dtype).sum(0) / rows
            losses.append(grid * (routed * torch.softmax(score, dim=-1).sum(0) / rows).sum())
        return mixed, torch.stack(losses).mean()
