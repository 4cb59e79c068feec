"""Round trips measured, retransmission timeouts made from them (RFC 6298's estimator). Knows no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIN_RTO_S: Final = 0.1
MAX_RTO_S: Final = 0.5
MIN_SLOW_S: Final = 0.015
FIRST_RTO_S: Final = 0.25
"""Before anything was measured."""


@dataclass(slots=True)
class RoundTrip:
    """Smoothed round trip time and its variation, in seconds."""

    srtt_s: float | None = None
    variation_s: float = 0.0

    def sample(self, rtt_s: float) -> None:
        """Take one measurement of a request that was sent once (Karn's rule is the caller's)."""
        if self.srtt_s is None:
            # Half of what RFC 6298 starts with: most paths here are measured once or twice, and wide margins
            # would make every look-up wait for the dead.
            self.srtt_s, self.variation_s = rtt_s, rtt_s / 4
            return
        self.variation_s += (abs(rtt_s - self.srtt_s) - self.variation_s) / 4
        self.srtt_s += (rtt_s - self.srtt_s) / 8

    @property
    def rto_s(self) -> float:
        """How long to wait before the first retransmission."""
        if self.srtt_s is None:
            return FIRST_RTO_S
        return min(max(self.srtt_s + 4 * self.variation_s, MIN_RTO_S), MAX_RTO_S)

    @property
    def slow_s(self) -> float:
        """After how long a reply takes longer than most, so that it pays to ask somebody else as well."""
        if self.srtt_s is None:
            return FIRST_RTO_S / 2
        return min(max(self.srtt_s + 4 * self.variation_s, MIN_SLOW_S), MAX_RTO_S)
