"""A directory whose records change while callers wait, and peers that move, for tests without a DHT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from swarm_kit import Peer, World

from p2pmoe.client.directory import StaticDirectory
from p2pmoe.experts.directory import Children, Provider
from p2pmoe.types import Endpoint


class ChangingDirectory(StaticDirectory):
    """Answers from what was read last; `read_again` reads what is announced now, and calls `on_read` before."""

    is_fixed = False  # type: ignore[misc]

    def __init__(self, providers: Mapping[str, Sequence[Provider]]) -> None:
        super().__init__(providers)
        self.announced_now = {uid: tuple(each) for uid, each in providers.items()}
        self.reads = 0
        self.on_read: Callable[[int], None] = lambda number: None

    async def read_again(self, prefixes: Sequence[str]) -> dict[str, Children]:
        self.reads += 1
        self.on_read(self.reads)
        self._providers = dict(self.announced_now)
        return await super().read_again(prefixes)

    async def find_providers(self, uid: str, *, again: bool = False) -> tuple[Provider, ...]:
        if again:
            await self.read_again([])
        return await super().find_providers(uid)


def directory_of(world: World) -> ChangingDirectory:
    """Put a changing directory in the place of the world's own."""
    directory = ChangingDirectory(world.directory._providers)
    world.swarm.directory = world.swarm.trust._directory = directory
    world.directory = directory
    return directory


def move(world: World, peer: Peer, port: int) -> Endpoint:
    """The peer's process ends at its endpoint and goes on, with its memory, at another port. Nobody is told."""
    peer.stop()
    peer.endpoint = replace(peer.endpoint, port=port)
    world.network.register(peer.endpoint, peer.handlers)
    return peer.endpoint


def announce(directory: ChangingDirectory, peer: Peer) -> None:
    """The peer's records say where it is now."""
    for uid, providers in directory.announced_now.items():
        directory.announced_now[uid] = tuple(
            replace(each, endpoint=peer.endpoint, sequence=each.sequence + 1) if each.peer_id == peer.peer_id else each
            for each in providers
        )
