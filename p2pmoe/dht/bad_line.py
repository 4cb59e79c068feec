"""A bad line between DHT nodes, for tests: loses, delays, repeats, reorders and damages datagrams, and can be cut.

Put in the place of `DatagramProtocol.transmit`, so that everything above it is what runs in earnest.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from p2pmoe.dht.protocol import DatagramProtocol
from p2pmoe.protocol.datagrams import Address


@dataclass
class BadLine:
    """What happens to the datagrams that leave the nodes it is fitted to. Seeded, so that a run can be repeated.

    Args:
        seed: Of the randomness.
        loss, duplicate, corrupt: Shares of the datagrams, 0 to 1.
        delay_s: One way, for every datagram.
        jitter_s: At most this much more, at random, which also reorders.
    """

    seed: int = 0
    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    sent: int = 0
    lost: int = 0
    _cut: set[Address] = field(default_factory=set)
    _sides: dict[Address, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 - a test's dice

    def fit(self, protocol: DatagramProtocol, own: Address) -> None:
        """Send this node's datagrams over the line."""
        straight = protocol.transmit

        def transmit(datagram: bytes, address: Address) -> None:
            if own in self._cut or address in self._cut or self._is_across(own, address):
                self.lost += 1
                return
            self._carry(datagram, address, straight)

        protocol.transmit = transmit

    def cut(self, address: Address) -> None:
        """Nothing from or to this address passes."""
        self._cut.add(address)

    def split(self, *sides: Iterable[Address]) -> None:
        """A partition: nothing passes from one of these sides to another."""
        self._sides = {address: number for number, side in enumerate(sides) for address in side}

    def heal(self) -> None:
        """Undo every `cut` and `split`."""
        self._cut.clear()
        self._sides.clear()

    def _is_across(self, one: Address, other: Address) -> bool:
        return one in self._sides and other in self._sides and self._sides[one] != self._sides[other]

    def _carry(self, datagram: bytes, address: Address, straight: Callable[[bytes, Address], None]) -> None:
        self.sent += 1
        copies = 1 + (self._random.random() < self.duplicate)
        for _ in range(copies):
            if self._random.random() < self.loss:
                self.lost += 1
                continue
            carried = self._damaged(datagram) if self._random.random() < self.corrupt else datagram
            delay_s = self.delay_s + self._random.random() * self.jitter_s
            if delay_s:
                asyncio.get_running_loop().call_later(delay_s, straight, carried, address)
            else:
                straight(carried, address)

    def _damaged(self, datagram: bytes) -> bytes:
        damaged = bytearray(datagram)
        damaged[self._random.randrange(len(damaged))] ^= 1 << self._random.randrange(8)
        return bytes(damaged)
