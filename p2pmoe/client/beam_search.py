"""Finds the k best live experts of each row in a grid, level by level. Synchronous; the caller fetches prefixes.

    search = BeamSearch(scores, "ffn", beam_size)
    while (wanted := search.wanted()):
        search.advance(fetch(wanted))

A grid's score is a sum over dimensions (product keys, arXiv 1907.05242), so on a full grid a beam of k finds the
exact k best; a wider beam makes up for coordinates that nobody hosts. Source: Learning@home, section 3.2.

Shapes: B batch, G grid size of one dimension, K beam, L levels, T columns looked at first, U unique prefixes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from p2pmoe.client.directory import Directory
from p2pmoe.experts.directory import Children, Provider
from p2pmoe.experts.uid import prefix_of

_NEVER: Final = float("-inf")
_MIN_COLUMNS: Final = 64
_COLUMNS_PER_BEAM: Final = 4
_FEW_TOTALS: Final = 2**16
_MAX_TOTALS: Final = 2**22
"""Sums held at a time where every column of the grid is looked at."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    coordinates: int64 [B, K, L]; valid: bool [B, K], False where a row has fewer than K live experts, or a total
    is no number; best first.
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
        scores: one float32 or float64 tensor [B, G] on the CPU for every dimension of the grid.
        name: the name in front of the coordinates: "ffn" of "ffn.3.17".
        beam_size: prefixes kept for each row at every level, and experts found at the last.
        masks: remembers which children were seen as which mask, from search to search.
        schema_digest: the experts that count, and above them children that are prefixes; None counts all children.
        barren: prefixes to pass over, because nothing below them counts.
    """

    def __init__(
        self,
        scores: Sequence[torch.Tensor],
        name: str,
        beam_size: int,
        masks: MaskCache,
        schema_digest: str | None = None,
        barren: Collection[str] = (),
    ) -> None:
        self._scores = scores
        self._name = name
        self._beam_size = beam_size
        self._masks = masks
        self._schema_digest = schema_digest
        self._barren: dict[str, list[int]] = {}
        for prefix in barren:
            parent, _, child = prefix[:-1].rpartition(".")
            self._barren.setdefault(f"{parent}.", []).append(int(child))
        rows = len(scores[0])
        self._coordinates = torch.zeros(rows, 1, 0, dtype=torch.int64, device="cpu")
        self._totals = torch.zeros(rows, 1, dtype=scores[0].dtype, device="cpu")
        self._level = 0
        self._children: Mapping[str, Children] = {}
        self._last_prefixes: list[str] = []
        self._group()

    def __repr__(self) -> str:
        return f"<BeamSearch {self._name}: level {self._level} of {len(self._scores)}, {len(self._prefixes)} prefixes>"

    def wanted(self) -> list[str]:
        """The prefixes that the next step needs; empty when the search is over."""
        return self._prefixes if self._level < len(self._scores) else []

    def advance(self, children: Mapping[str, Children]) -> None:
        """Take one step with the children of every wanted prefix."""
        scores_BG = self._scores[self._level]
        alive_UG = torch.stack([self._alive(p, children.get(p, {}), scores_BG.shape[1]) for p in self._prefixes])
        self._totals, parents_BK, columns_BK = self._best(scores_BG.to(self._totals.dtype), alive_UG)
        parents = self._coordinates.gather(1, parents_BK.unsqueeze(-1).expand(-1, -1, self._level))
        self._coordinates = torch.cat([parents, columns_BK.unsqueeze(-1)], dim=-1)
        self._children, self._last_prefixes = children, self._prefixes
        self._level += 1
        self._group()

    def found(self, k: int) -> Found:
        """The `k` best of each row."""
        totals = self._totals[:, :k]
        return Found(self._coordinates[:, :k], (totals > _NEVER) & (totals < math.inf), self._children)

    def barren(self) -> list[str]:
        """After the search: the prefixes that it followed and that hold nothing that counts."""
        if self._level < max(2, len(self._scores)):
            return []
        size = self._scores[-1].shape[1]
        return [p for p in self._last_prefixes if not bool(self._alive(p, self._children.get(p, {}), size).any())]

    def _alive(self, prefix: str, children: Children, grid: int) -> torch.Tensor:
        """Bool [G]: the children that count."""
        is_last = prefix.count(".") == len(self._scores)
        digest = self._schema_digest if is_last or self._schema_digest is None else ""
        mask = self._masks.mask(prefix, children, grid, digest)
        if passed_over := [child for child in self._barren.get(prefix, ()) if child < grid]:
            mask = mask.clone()
            mask[passed_over] = False
        return mask

    def _best(self, scores_BG: torch.Tensor, alive_UG: torch.Tensor) -> _Best:
        """The best of every row's (parent, column) pairs: their totals, parents and columns, all [B, K].

        A row's best columns nearly always do; rows whose result they do not prove are looked at in full.
        """
        rows, parents = self._totals.shape
        grid = scores_BG.shape[1]
        columns = max(_MIN_COLUMNS, _COLUMNS_PER_BEAM * self._beam_size)
        if columns >= grid or rows * parents * grid <= _FEW_TOTALS:
            return self._best_of_all(slice(None), scores_BG, alive_UG)
        top_BT, columns_BT = scores_BG.topk(columns, dim=1)
        alive_BKT = alive_UG[self._prefix_of_beam.unsqueeze(-1), columns_BT.unsqueeze(1)]
        totals, parents_BK, places_BK = _pick(self._totals, top_BT, alive_BKT, self._beam_size)
        best = totals, parents_BK, columns_BT.gather(1, places_BK)
        # No column left out has a score above the last one taken, under whatever parent.
        unproven = totals[:, -1] < self._totals.max(1).values + top_BT[:, -1]
        for chunk in unproven.nonzero().flatten().split(max(1, _MAX_TOTALS // (parents * grid))):
            for whole, part in zip(best, self._best_of_all(chunk, scores_BG, alive_UG), strict=True):
                whole[chunk] = part
        return best

    def _best_of_all(self, rows: torch.Tensor | slice, scores_BG: torch.Tensor, alive_UG: torch.Tensor) -> _Best:
        return _pick(self._totals[rows], scores_BG[rows], alive_UG[self._prefix_of_beam[rows]], self._beam_size)

    def _group(self) -> None:
        """Which distinct prefixes the beams stand on, and which beam stands on which."""
        flat = self._coordinates.flatten(0, 1)
        if self._level == 0:
            unique, inverse = flat[:1], torch.zeros(len(flat), dtype=torch.int64, device="cpu")
        else:
            key = flat[:, 0].clone()  # one integer for each prefix: unique() over rows is slow
            for level in range(1, self._level):
                key = key * self._scores[level].shape[1] + flat[:, level]
            _, inverse = key.unique(return_inverse=True)
            count = int(inverse.max()) + 1 if len(inverse) else 0
            first = torch.empty(count, dtype=torch.int64, device="cpu")
            first[inverse] = torch.arange(len(flat), dtype=torch.int64, device="cpu")
            unique = flat[first]
        self._prefix_of_beam = inverse.view(self._coordinates.shape[:2])
        self._prefixes = [prefix_of(self._name, tuple(row)) for row in unique.tolist()]


_Best = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _pick(totals_BK: torch.Tensor, scores_BT: torch.Tensor, alive_BKT: torch.Tensor, count: int) -> _Best:
    """The best `count` sums of a parent's total and a column's score: the sums, the parents, the columns."""
    sums_BKT = totals_BK.unsqueeze(-1) + scores_BT.unsqueeze(1)
    flat = sums_BKT.masked_fill_(~alive_BKT, _NEVER).flatten(1)
    best, places = flat.topk(min(count, flat.shape[1]), dim=1)
    columns = scores_BT.shape[1]
    return best, places.div(columns, rounding_mode="floor"), places % columns


async def read_within(
    directory: Directory, prefixes: Sequence[str], budget_s: float, *, again: bool = False
) -> Mapping[str, Children]:
    """The children of each prefix; those that do not come in time count as having none. Raises as `get_prefixes`.

    `again` reads from the network, whatever is cached.
    """
    try:
        async with asyncio.timeout(budget_s):
            return await (directory.read_again if again else directory.get_prefixes)(prefixes)
    except TimeoutError:
        # What came in before is in the directory's cache.
        return {prefix: directory.cached_prefix(prefix) or {} for prefix in prefixes}


class MaskCache:
    """Live-children masks by prefix, rebuilt only when the directory hands out another object."""

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        self._masks: dict[str, tuple[Children, str | None, torch.Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> MaskCache:
        """An empty one: the copied layer's searches fill it again."""
        return MaskCache(self._limit)

    def mask(self, prefix: str, children: Children, grid: int, schema_digest: str | None = None) -> torch.Tensor:
        """Bool [G]: which coordinates somebody hosts, with this schema unless it is None."""
        known = self._masks.get(prefix)
        if known is not None and known[0] is children and known[1] == schema_digest and len(known[2]) == grid:
            return known[2]
        flags = bytearray(grid)
        for coordinate, providers in children.items():
            if coordinate < grid:
                flags[coordinate] = schema_digest is None or any(
                    each.schema_digest == schema_digest for each in providers
                )
        mask = torch.frombuffer(flags, dtype=torch.bool)
        if len(self._masks) >= self._limit:
            self._masks.clear()
        self._masks[prefix] = (children, schema_digest, mask)
        return mask
