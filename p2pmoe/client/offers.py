"""Reads which experts are offered below a name, within bounds. Believes nothing of it; see `experts/offers.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from p2pmoe.client.beam_search import read_within
from p2pmoe.client.directory import Directory
from p2pmoe.experts.directory import Children, Provider
from p2pmoe.experts.offers import Offer, is_inside, network_of
from p2pmoe.experts.uid import MAX_COORDINATES, ExpertUid, prefix_of

MAX_PREFIXES: Final = 64
"""Of each length that are read; those that most networks announce come first."""


async def read_offers(
    directory: Directory, name: str, timeout_s: float, *, again: bool = False, within: Sequence[int] | None = None
) -> list[Offer]:
    """Every offer below a name, of any number of coordinates; at most 64 prefixes of each length are read.

    `again` reads from the network, whatever is cached. With a grid that offers must lie `within`, all prefixes of that
    grid are read and no others.

    Raises as `Directory.get_prefixes`. What does not come in time is left out.
    """
    deadline = time.monotonic() + timeout_s
    level: list[tuple[int, ...]] = [()]
    offers: list[Offer] = []
    for _ in range(MAX_COORDINATES):
        if not level:
            break
        prefixes = {prefix_of(name, start): start for start in level}
        found = await read_within(directory, list(prefixes), max(1e-3, deadline - time.monotonic()), again=again)
        below: list[tuple[int, tuple[int, ...]]] = []
        for prefix, start in prefixes.items():
            children = found.get(prefix, {})
            offers += _offers(name, start, children)
            below += [
                (-voices, (*start, child))
                for child, providers in children.items()
                if (voices := _voices(providers)) and len(start) + 1 < MAX_COORDINATES
            ]
        if within is None:
            level = [coordinates for _, coordinates in sorted(below)[:MAX_PREFIXES]]
        else:
            level = [coordinates for _, coordinates in below if _leads_into(coordinates, within)]
    return offers if within is None else [offer for offer in offers if is_inside(offer.uid, within)]


def _leads_into(coordinates: Sequence[int], grid: Sequence[int]) -> bool:
    return len(coordinates) < len(grid) and all(number < size for number, size in zip(coordinates, grid, strict=False))


def _offers(name: str, start: tuple[int, ...], children: Children) -> list[Offer]:
    return [
        Offer(ExpertUid(name, (*start, child)), provider)
        for child, providers in children.items()
        for provider in providers
        if provider.schema_digest
    ]


def _voices(providers: Sequence[Provider]) -> int:
    """How many networks say that a child is a prefix."""
    return len({network_of(provider.endpoint.host) for provider in providers if not provider.schema_digest})
