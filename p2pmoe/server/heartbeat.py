"""One log line a minute that says what a node does, and at its start how far its experts are. Knows counts only."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from p2pmoe.experts.uid import is_valid_uid, parse_uid

logger = logging.getLogger(__name__)

SHOWN_GROUPS: Final = 8
Counts = Mapping[str, int]
"""What has been counted since the start, by name."""


class Heartbeat:
    """Logs what was counted since the last line.

    Args:
        every_s: how often.
        count: what grows, since the start; called on a thread, for there may be many experts.
        show: what is so now, for the end of the line; takes when the last line was, on `clock`.
    """

    def __init__(
        self,
        every_s: float,
        count: Callable[[], Counts],
        show: Callable[[float], Mapping[str, Any]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every_s, self._count, self._show, self._clock = every_s, count, show, clock
        self._started_at = self._last_at = clock()
        self._last: Counts = {}

    def __repr__(self) -> str:
        return f"<Heartbeat every {self._every_s:g} s>"

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            self.beat(await asyncio.to_thread(self._count))

    def beat(self, counts: Counts) -> None:
        """One line."""
        now = self._clock()
        grown = {name: count - self._last.get(name, 0) for name, count in counts.items()}
        fields = {**grown, **self._show(self._last_at), "up_s": round(now - self._started_at)}
        logger.info("in the last %.0f s", now - self._last_at, extra=fields)
        self._last, self._last_at = counts, now


def describe_experts(updates: Iterable[tuple[str, int]]) -> str:
    """`ffn.3.[0:4]: 120 updates, ffn.4.0: 7 updates`: neighbours with as many updates together."""
    runs: list[list[Any]] = []  # prefix, first, last, updates
    named = ((parse_uid(name), count) for name, count in updates if is_valid_uid(name))
    for uid, count in sorted(named):
        if runs and runs[-1][0] == uid.prefix and runs[-1][2] + 1 == uid.suffix and runs[-1][3] == count:
            runs[-1][2] = uid.suffix
        else:
            runs.append([uid.prefix, uid.suffix, uid.suffix, count])
    shown = [f"{_span(*run[:3])}: {run[3]} update{'' if run[3] == 1 else 's'}" for run in runs[:SHOWN_GROUPS]]
    return ", ".join(shown) + (f", … {len(runs)} groups in all" if len(runs) > SHOWN_GROUPS else "")


def _span(prefix: str, first: int, last: int) -> str:
    return f"{prefix}{first}" if first == last else f"{prefix}[{first}:{last + 1}]"
