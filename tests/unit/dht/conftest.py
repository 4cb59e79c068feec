"""A swarm of DHT nodes on loopback, all on the test's own event loop."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from dht_swarm import Peer, Stranger, open_peer


@pytest.fixture
async def make_peer() -> AsyncIterator[Callable[..., Awaitable[Peer]]]:
    """`await make_peer("alice", bootstrap=bob)`; all are closed after the test."""
    peers: list[Peer] = []

    async def make(name: str, *, bootstrap: Peer | None = None, **options) -> Peer:
        peer = await open_peer(name, **options)
        peers.append(peer)
        if bootstrap is not None:
            assert await peer.bootstrap([bootstrap.address])
        return peer

    yield make
    for peer in peers:
        await peer.close()


@pytest.fixture
async def make_swarm(make_peer) -> Callable[..., Awaitable[list[Peer]]]:
    """`await make_swarm(32)`: that many peers that have joined one another."""

    async def make(count: int, *, seed: int = 1, before_join=None, **options) -> list[Peer]:
        print(f"swarm of {count}, seed {seed}")
        dice = random.Random(seed)
        peers: list[Peer] = []
        for number in range(count):
            peer = await make_peer(f"peer-{number}", **options)
            if before_join is not None:
                before_join(peer)
            if peers:
                assert await peer.bootstrap([dice.choice(peers).address])
            peers.append(peer)
        return peers

    return make


@pytest.fixture
async def make_stranger() -> AsyncIterator[Callable[..., Stranger]]:
    """`make_stranger(answer=…)`: a bare socket, closed after the test."""
    strangers: list[Stranger] = []

    def make(name: str = "mallory", answer=None) -> Stranger:
        strangers.append(Stranger(name, answer))
        return strangers[-1]

    yield make
    for stranger in strangers:
        stranger.close()
