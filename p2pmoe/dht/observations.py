"""What peers tell us about ourselves: our address and how far our clock is off. Synchronous; believes majorities."""

from __future__ import annotations

import ipaddress
import statistics
from collections import Counter, OrderedDict
from typing import Final

from p2pmoe.dht.tokens import source_of
from p2pmoe.protocol.datagrams import Address, scope_of

MIN_REPORTERS: Final = 3
MAX_REPORTERS: Final = 64


class Observations:
    """The last report of each source; a subnet has one voice."""

    def __init__(self) -> None:
        self._hosts: OrderedDict[str, str] = OrderedDict()
        self._offsets: OrderedDict[str, float] = OrderedDict()

    def report(self, reporter: Address, seen: Address, offset_s: float) -> None:
        """`reporter` saw us at `seen`, and its clock is `offset_s` ahead of ours."""
        source = source_of(reporter)
        self._hosts[source] = seen[0]
        self._offsets[source] = offset_s
        for reports in (self._hosts, self._offsets):
            reports.move_to_end(source)
            while len(reports) > MAX_REPORTERS:
                reports.popitem(last=False)

    @property
    def host(self) -> str | None:
        """The address more than half of at least three reporters see us at."""
        if len(self._hosts) < MIN_REPORTERS:
            return None
        host, votes = Counter(self._hosts.values()).most_common(1)[0]
        return host if 2 * votes > len(self._hosts) else None

    @property
    def clock_offset_s(self) -> float | None:
        """How far the others' clocks are ahead of ours: the median of at least three."""
        if len(self._offsets) < MIN_REPORTERS:
            return None
        return statistics.median(self._offsets.values())


def reachable_host(bound: str, announced: str, seen: str | None) -> str:
    """Which address to announce for a service: `announced`, or `seen` where peers can make more of it.

    Args:
        bound: What the service listens on. What listens on loopback alone, or on an address of the world, is taken
            at its word; a wildcard or an address of the local network means little to others.
        announced: The address that we would name ourselves.
        seen: The address that most peers see us at, if they agree.
    """
    try:
        listening, own = ipaddress.ip_address(bound), ipaddress.ip_address(announced)
    except ValueError:
        return announced  # a name
    if seen is None or ipaddress.ip_address(seen).version != own.version:
        return announced
    if listening.is_unspecified:
        return seen if scope_of(seen) >= scope_of(announced) else announced
    return seen if scope_of(announced) == 1 and scope_of(seen) == 2 else announced
