"""Beam search where not every column is looked at, and where the DHT is too slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import pytest
import torch

from p2pmoe.client import beam_search
from p2pmoe.client.beam_search import BeamSearch, Found, MaskCache, read_within
from p2pmoe.errors import BootstrapError
from p2pmoe.experts.directory import Children, Provider
from p2pmoe.types import Endpoint, PeerId

SOMEBODY = (Provider(PeerId("alice"), Endpoint("alice", 1), "digest", 1e12, 1),)


def search(scores: Sequence[torch.Tensor], alive: torch.Tensor, beam: int) -> Found:
    beams = BeamSearch(scores, "ffn", beam, MaskCache())
    while wanted := beams.wanted():
        children: dict[str, Children] = {}
        for prefix in wanted:
            below = alive
            for part in prefix.split(".")[1:-1]:
                below = below[int(part)]
            while below.ndim > 1:
                below = below.any(-1)
            children[prefix] = dict.fromkeys(below.nonzero().flatten().tolist(), SOMEBODY)
        beams.advance(children)
    return beams.found(beam)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05, 0.004, 0.0])
@pytest.mark.parametrize("grid", [(300,), (90, 150), (70, 3, 80)])
@pytest.mark.parametrize("levelled", [False, True])
def test_looking_at_the_best_columns_first_changes_nothing(grid, share, levelled, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    scores = [torch.randn(9, size, generator=generator) for size in grid]
    if levelled:  # ties everywhere
        scores = [score.round() for score in scores]
    alive = torch.rand(grid, generator=generator) < share
    monkeypatch.setattr(beam_search, "_FEW_TOTALS", 2**40)
    whole = search(scores, alive, 3)
    monkeypatch.setattr(beam_search, "_FEW_TOTALS", 0)
    monkeypatch.setattr(beam_search, "_MAX_TOTALS", 1)
    narrow = search(scores, alive, 3)
    assert torch.equal(narrow.valid, whole.valid)
    for row, slot in narrow.valid.nonzero().tolist():
        assert alive[tuple(narrow.coordinates[row, slot].tolist())]
    if not levelled:
        assert torch.equal(narrow.coordinates[narrow.valid], whole.coordinates[whole.valid])


def test_four_dimensions_of_1024():
    scores = [torch.randn(4, 1024, generator=torch.Generator().manual_seed(level)) for level in range(4)]
    beams = BeamSearch(scores, "ffn", 4, MaskCache())
    full = dict.fromkeys(range(1024), SOMEBODY)
    while wanted := beams.wanted():
        assert len(wanted) <= 16
        beams.advance(dict.fromkeys(wanted, full))
    best = [score.argmax(1) for score in scores]
    assert torch.equal(beams.found(1).coordinates[:, 0], torch.stack(best, 1))


class SlowDirectory:
    """Knows some prefixes; the others never come."""

    def __init__(self, known: Mapping[str, Children]) -> None:
        self.known = known

    def cached_prefix(self, prefix: str) -> Children | None:
        return self.known.get(prefix)

    async def get_prefixes(self, prefixes: Sequence[str]) -> Mapping[str, Children]:
        if any(prefix not in self.known for prefix in prefixes):
            await asyncio.Event().wait()
        return {prefix: self.known[prefix] for prefix in prefixes}


async def test_a_search_goes_on_without_what_does_not_come_in_time():
    directory = SlowDirectory({"ffn.0.": {3: SOMEBODY}})
    begin = time.monotonic()
    found = await read_within(directory, ["ffn.0.", "ffn.1."], 0.05)  # type: ignore[arg-type]
    assert found == {"ffn.0.": {3: SOMEBODY}, "ffn.1.": {}}
    assert time.monotonic() - begin < 2
    assert await read_within(directory, ["ffn.0."], 5.0) == {"ffn.0.": {3: SOMEBODY}}  # type: ignore[arg-type]


async def test_a_search_without_any_peer_says_so():
    class Nobody(SlowDirectory):
        async def get_prefixes(self, prefixes: Sequence[str]) -> Mapping[str, Children]:
            raise BootstrapError("no peer")

    with pytest.raises(BootstrapError):
        await read_within(Nobody({}), ["ffn."], 1.0)  # type: ignore[arg-type]
