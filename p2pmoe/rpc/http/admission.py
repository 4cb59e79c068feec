"""Who may open a connection: counts and rates, kept before a handshake costs anything. No I/O.

Rules, in this order; the first one broken refuses the connection with OverloadedError:

1. `max_connections` are open at most, handshakes under way included.
2. `max_source_connections` of them come from one source.
3. New ones come at `max_source_handshakes_per_s` from one source, `max_handshakes_per_s` from all; as many as rules 1
   and 2 allow may come at once after a pause, so that a caller can open its pool.

A source is what `source_of` says: an IPv4 address or an IPv6 network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import OverloadedError
from p2pmoe.rpc.http.grain import Meter
from p2pmoe.rpc.token_bucket import MAX_REMEMBERED, TokenBucket, TokenBuckets
from p2pmoe.types import source_of

MAX_REMEMBERED_SOURCES: Final = MAX_REMEMBERED
_PIECES_BURST_S: Final = 8.0


class Ticket:
    """The right to one open connection."""

    __slots__ = ("_admission", "_source", "meter")

    def __init__(self, admission: Admission, source: str) -> None:
        self._admission: Admission | None = admission
        self._source = source
        self.meter: Meter | None = None
        """What counts the connection's bytes, where somebody does."""

    def __repr__(self) -> str:
        return f"<Ticket of {self._source}>"

    def borrow(self, pieces: float) -> bool:
        """Take small pieces from those of the source, see `grain`; False when there are none left."""
        return self._admission is not None and self._admission.borrow(self._source, pieces)

    def give_back(self) -> None:
        """The connection is closed, or never came to be. Safe to call twice."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.leave(self._source)


class Admission:
    """Counts connections by source. Belongs to one event loop."""

    def __init__(self, limits: LimitsConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._open: dict[str, int] = {}
        self._total = 0
        self._all = TokenBucket(limits.max_handshakes_per_s, max(1, limits.max_connections), clock())
        # Whoever has more networks than are remembered is bounded by the rate of all.
        self._sources = TokenBuckets(limits.max_source_handshakes_per_s, max(1, limits.max_source_connections))
        rate = limits.source_pieces_per_s
        self._pieces = TokenBuckets(rate, max(1.0, _PIECES_BURST_S * rate))
        self.refused = 0

    def __repr__(self) -> str:
        return f"<Admission: {self._total} connections of {len(self._open)} sources, {self.refused} refused>"

    @property
    def connections(self) -> int:
        """Open ones, handshakes under way included."""
        return self._total

    def enter(self, host: str) -> Ticket:
        """Let a new connection from this address in. Raises OverloadedError."""
        source = source_of(host)
        refusal = self._refusal(source, self._clock())
        if refusal is not None:
            self.refused += 1
            raise OverloadedError(refusal)
        self._open[source] = self._open.get(source, 0) + 1
        self._total += 1
        return Ticket(self, source)

    def borrow(self, source: str, pieces: float) -> bool:
        """For `Ticket`."""
        return not self._pieces.take(source, pieces, self._clock())

    def leave(self, source: str) -> None:
        """For `Ticket`."""
        self._total -= 1
        self._open[source] -= 1
        if not self._open[source]:
            del self._open[source]

    def _refusal(self, source: str, now: float) -> str | None:
        limits, held = self._limits, self._open.get(source, 0)
        if self._total >= limits.max_connections:
            return f"{self._total} connections are open, limits.max_connections allows no more"
        if held >= limits.max_source_connections:
            return f"{source} has {held} connections open, limits.max_source_connections allows no more"
        if self._sources.take(source, 1.0, now):
            return f"{source} opens over limits.max_source_handshakes_per_s connections a second"
        if self._all.take(1.0, now):
            return "over limits.max_handshakes_per_s connections are opened a second"
        return None
