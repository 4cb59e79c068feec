"""How long a call waits for a provider to come back, and for what. Knows errors and time; no records, no tensors.

A node that was killed is back within seconds, under the same key and often at another address. Until then its record
leads nowhere, or the new one is not there yet: a call that has time left reads the records again and waits.

Rules:
1. What may pass is waited for until the time-out: nobody answers, the node is leaving, it is too busy, or does not have
   the expert (any more), or an expert that was known is announced by nobody.
2. What will not is told at once: a call that the node refuses, an expert that fails or answers nonsense, one hosted
   with another schema, a record that must not be followed. So is an expert of which nobody has ever heard, after one
   look at fresh records, and one whose providers are all left out because their replies were wrong.
3. Where the directory is fixed nobody can appear, and nobody is waited for.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from numbers import Real
from typing import Any, Final, TypeVar

from p2pmoe.errors import (
    ConfigError,
    DeadlineError,
    DrainingError,
    ExpertNotFoundError,
    InsecureEndpointError,
    OverloadedError,
    P2PMoEError,
    PeerUnreachableError,
    UnknownExpertError,
)

T = TypeVar("T")
MAX_TIMEOUT_S: Final = 4_000_000.0
"""46 days: locks of every platform can wait so long, and none much longer."""
FIRST_PAUSE_S: Final = 0.1
LAST_PAUSE_S: Final = 1.0
_PASSING: Final = (PeerUnreachableError, DrainingError, OverloadedError, UnknownExpertError, DeadlineError)


def may_pass(error: BaseException | object) -> bool:
    """Whether the same call may succeed a little later, see rules 1 and 2."""
    if isinstance(error, ExpertNotFoundError):
        return error.may_appear
    return isinstance(error, _PASSING) and not isinstance(error, InsecureEndpointError)


def as_timeout(name: str, seconds: Any) -> float:
    """A time-out that everything which waits can take: as long as it gets for `math.inf`. Raises ConfigError."""
    is_number = isinstance(seconds, Real)
    if not is_number or not seconds >= 0:  # NaN is not
        raise ConfigError(f"{name} must be seconds, 0 or more (math.inf: as long as it takes), got {seconds!r}")
    return float(min(seconds, MAX_TIMEOUT_S))


class Patience:
    """The pauses of one call that waits: none before the first look at fresh records, then longer ones, with jitter."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._pause_s = 0.0

    def __repr__(self) -> str:
        return f"<Patience for {self.left_s():.3f} s, {self._pause_s:.3f} s at a time>"

    def left_s(self) -> float:
        """Seconds until the deadline; not below 0."""
        return max(0.0, self.deadline - time.monotonic())

    def next_pause_s(self, at_least_s: float = 0.0) -> float | None:
        """How long to wait before the next try; None when the time is up."""
        left_s = self.left_s()
        if left_s <= 0 or at_least_s >= left_s:
            return None
        pause_s = max(at_least_s, self._pause_s * random.uniform(0.8, 1.2))  # noqa: S311 - callers must not march in step
        self._pause_s = min(LAST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
        return min(pause_s, left_s)


async def patiently(attempt: Callable[[bool], Awaitable[T]], deadline: float, *, fixed: bool) -> T:
    """What `attempt(again)` gives: tried until it succeeds, fails for good, or the time is up.

    `again` says that records are to be read from the network. What it raises last is raised; on an event loop.
    """
    patience, again = Patience(deadline), False
    last: P2PMoEError | None = None
    while True:
        try:
            async with asyncio.timeout(max(1e-3, patience.left_s())):
                return await attempt(again)
        except TimeoutError as error:
            if not isinstance(error, P2PMoEError):
                raise last or DeadlineError("nobody answered in time") from None
            last = error  # a DeadlineError of ours
        except P2PMoEError as error:
            last = error
        unread = isinstance(last, ExpertNotFoundError) and not again  # the cache may be older than the expert
        if fixed or not (unread or may_pass(last)):
            raise last
        pause_s = patience.next_pause_s(getattr(last, "retry_after_s", None) or 0.0)
        if pause_s is None:
            raise last
        await asyncio.sleep(pause_s)
        again = True
