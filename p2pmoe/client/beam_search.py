"""Finds the k best live experts of each row in a grid, level by level. Synchronous; the caller fetches prefixes.

    search = BeamSearch(scores, "ffn", beam_size)
    while (wanted := search.wanted()):
        search.advance(fetch(wanted))

A grid's score is a sum over dimensions (product keys, arXiv 1907.05242), so on a full grid a beam of k finds the
exact k best; a wider beam makes up for coordinates that nobody hosts. Source: Learning@home, section 3.2.

Shapes: B batch, G grid size of one dimension, K beam, L levels, U unique prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from p2pmoe.experts.directory import Children, Provider
from p2pmoe.experts.uid import prefix_of

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    coordinates: int64 [B, K, L]; valid: bool [B, K], False where a row has fewer than K live experts; best first.
    children: what the last level's prefixes hold.
    """

    coordinates: torch.Tensor
    valid: torch.Tensor
    children: Mapping[str, Children]

    def providers(self, name: str, coordinates: tuple[int, ...]) -> tuple[Provider, ...]:
        """Who hosts an expert that was found."""
        return self.children.get(prefix_of(name, coordinates[:-1]), {}).get(coordinates[-1], ())


class BeamSearch:
    """One search for a batch of rows.

    Args:
        scores: one float tensor [B, G] for every dimension of the grid.
        name: the name in front of the coordinates: "ffn" of "ffn.3.17".
        beam_size: prefixes kept for each row at every level, and experts found at the last.
        masks: remembers which children were seen as which mask, from search to search.
    """

    def __init__(self, scores: Sequence[torch.Tensor], name: str, beam_size: int, masks: MaskCache) -> None:
        self._scores = scores
        self._name = name
        self._beam_size = beam_size
        self._masks = masks
        rows = len(scores[0])
        self._coordinates = torch.zeros(rows, 1, 0, dtype=torch.int64)
        self._totals = torch.zeros(rows, 1)
        self._level = 0
        self._children: Mapping[str, Children] = {}
        self._group()

    def __repr__(self) -> str:
        return f"<BeamSearch {self._name}: level {self._level} of {len(self._scores)}, {len(self._prefixes)} prefixes>"

    def wanted(self) -> list[str]:
        """The prefixes that the next step needs; empty when the search is over."""
        return self._prefixes if self._level < len(self._scores) else []

    def advance(self, children: Mapping[str, Children]) -> None:
        """Take one step with the children of every wanted prefix."""
        scores_BG = self._scores[self._level]
        alive_UG = torch.stack([self._masks.mask(p, children.get(p, {}), scores_BG.shape[1]) for p in self._prefixes])
        totals_BKG = self._totals.unsqueeze(-1) + scores_BG.unsqueeze(1).to(self._totals.dtype)
        totals_BKG = totals_BKG.masked_fill(~alive_UG[self._prefix_of_beam], _NEVER)
        grid = scores_BG.shape[1]
        flat = totals_BKG.flatten(1)
        self._totals, best_BK = flat.topk(min(self._beam_size, flat.shape[1]), dim=1)
        parents = self._coordinates.gather(
            1, best_BK.div(grid, rounding_mode="floor").unsqueeze(-1).expand(-1, -1, self._level)
        )
        self._coordinates = torch.cat([parents, (best_BK % grid).unsqueeze(-1)], dim=-1)
        self._children = children
        self._level += 1
        self._group()

    def found(self, k: int) -> Found:
        """The `k` best of each row."""
        return Found(self._coordinates[:, :k], self._totals[:, :k] > _NEVER, self._children)

    def _group(self) -> None:
        """Which distinct prefixes the beams stand on, and which beam stands on which."""
        flat = self._coordinates.flatten(0, 1)
        if self._level == 0:
            unique, inverse = flat[:1], torch.zeros(len(flat), dtype=torch.int64)
        else:
            key = flat[:, 0].clone()  # one integer for each prefix: unique() over rows is slow
            for level in range(1, self._level):
                key = key * self._scores[level].shape[1] + flat[:, level]
            _, inverse = key.unique(return_inverse=True)
            first = torch.empty(int(inverse.max()) + 1 if len(inverse) else 0, dtype=torch.int64)
            first[inverse] = torch.arange(len(flat))
            unique = flat[first]
        self._prefix_of_beam = inverse.view(self._coordinates.shape[:2])
        self._prefixes = [prefix_of(self._name, tuple(row)) for row in unique.tolist()]


class MaskCache:
    """Live-children masks by prefix, rebuilt only when the directory hands out another object."""

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        self._masks: dict[str, tuple[Children, torch.Tensor]] = {}

    def mask(self, prefix: str, children: Children, grid: int) -> torch.Tensor:
        """Bool [G]: which coordinates somebody hosts."""
        known = self._masks.get(prefix)
        if known is not None and known[0] is children and len(known[1]) == grid:
            return known[1]
        mask = torch.zeros(grid, dtype=torch.bool)
        mask[[coordinate for coordinate in children if coordinate < grid]] = True
        if len(self._masks) >= self._limit:
            self._masks.clear()
        self._masks[prefix] = (children, mask)
        return mask
