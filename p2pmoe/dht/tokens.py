"""Write tokens and byte budgets: what a source address may ask of us. Knows no socket; time is passed in.

A token proves that its holder receives datagrams at its address. Without one nothing is stored and no reply is
longer than three times its request, so that a forged sender address amplifies nothing worth the trouble.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from typing import Final

from p2pmoe.dht.contacts import subnet_of
from p2pmoe.protocol.datagrams import TOKEN_BYTES, Address

ROTATE_AFTER_S: Final = 300.0
MAX_SOURCES: Final = 4096
AMPLIFICATION: Final = 3
"""An unproven source gets at most this many times the bytes it sent."""


class WriteTokens:
    """Makes and checks tokens; one lives between 5 and 10 minutes."""

    def __init__(self, now: float) -> None:
        self._secrets = (secrets.token_bytes(32), secrets.token_bytes(32))
        self._rotated_at = now

    def make(self, address: Address, now: float) -> bytes:
        self._rotate(now)
        return _token(self._secrets[0], address)

    def holds(self, token: bytes, address: Address, now: float) -> bool:
        self._rotate(now)
        return any(hmac.compare_digest(token, _token(secret, address)) for secret in self._secrets)

    def _rotate(self, now: float) -> None:
        periods = (now - self._rotated_at) // ROTATE_AFTER_S
        if periods <= 0:
            return
        # After a long silence the previous secret is too old as well.
        previous = self._secrets[0] if periods == 1 else secrets.token_bytes(32)
        self._secrets = (secrets.token_bytes(32), previous)
        self._rotated_at += periods * ROTATE_AFTER_S


def _token(secret: bytes, address: Address) -> bytes:
    return hashlib.blake2b(repr(address).encode(), key=secret, digest_size=TOKEN_BYTES).digest()


def source_of(address: Address) -> str:
    """Whom an address is counted as: its subnet in the world, host and port on the local network."""
    return subnet_of(address[0]) or f"{address[0]}|{address[1]}"


class SourceBudgets:
    """A leaky bucket of bytes per source. The least recently seen source is forgotten first."""

    def __init__(self, bytes_per_s: float, burst_bytes: float) -> None:
        self._rate = bytes_per_s
        self._burst = burst_bytes
        self._used: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, source: str, size: float, now: float) -> bool:
        """False when the source is over its budget; nothing is charged then."""
        level, at = self._used.get(source, (0.0, now))
        level = max(0.0, level - (now - at) * self._rate)
        allowed = level + size <= self._burst
        self._note(source, level + size if allowed else level, now)
        return allowed

    def charge(self, source: str, size: float, now: float) -> None:
        """Charge work that was done already, at most up to an empty purse."""
        level, at = self._used.get(source, (0.0, now))
        level = max(0.0, level - (now - at) * self._rate)
        self._note(source, min(self._burst, level + size), now)

    def _note(self, source: str, level: float, now: float) -> None:
        self._used[source] = (level, now)
        self._used.move_to_end(source)
        while len(self._used) > MAX_SOURCES:
            self._used.popitem(last=False)
