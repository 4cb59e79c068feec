"""How a call asks for its expert to be computed. Knows torch's seed and nothing else.

Where the expert draws, the seed is drawn from torch's generator, as a local layer's numbers are: who seeds torch again
gets the same ones, and a checkpoint that computes a layer twice gives it the same. Where it draws nothing, nothing
is taken from the generator; the seed follows `torch.manual_seed` and a count then.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Final

import torch
from torch import nn

from p2pmoe.protocol.drawing import our_turn
from p2pmoe.types import Manner, Mode

_SEEDS: Final = (1 << 63) - 1

_ALL: Final = (1 << 64) - 1


class _Seeds:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._origin: int | None = None
        self._count = 0

    def draw(self) -> int:
        origin = torch.initial_seed()
        with self._lock:
            if origin != self._origin:
                self._origin, self._count = origin, 0
            self._count += 1
            count = self._count
        mixed = (origin + count * 0x9E3779B97F4A7C15) & _ALL  # SplitMix64 (Steele, Lea and Flood 2014)
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _ALL
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _ALL
        return (mixed ^ mixed >> 31) >> 1


_seeds = _Seeds()


def manner_of(module: nn.Module, draws: Collection[str] = ()) -> Manner:
    """What a layer's calls of one pass, forward and backward, ask for: its own mode, and a new seed of 63 bits.

    `draws`: the modes in which the expert draws.
    """
    mode: Mode = "train" if module.training else "eval"
    if mode not in draws:
        return Manner(mode, _seeds.draw())
    with our_turn():  # a node of this process may have seeded the generator for its expert just now
        return Manner(mode, int(torch.randint(_SEEDS, (), dtype=torch.int64, device="cpu")))


def for_expert(manner: Manner, index: int) -> Manner:
    """The manner of one of several experts of a pass: they must not all drop the same places."""
    return manner if manner.seed is None else manner._replace(seed=(manner.seed + index) % (1 << 63))
