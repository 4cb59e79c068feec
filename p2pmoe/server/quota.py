"""How much one caller may ask for: calls, bytes and updates a second, and calls at a time. Knows no HTTP, no clock.

A refusal says when to come again.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import OverloadedError
from p2pmoe.rpc.token_bucket import TokenBucket

_MAX_RETRY_S = 3600.0


class CallerAccount:
    """What one caller has used."""

    __slots__ = ("bytes", "calls", "running", "seen_at", "updates")

    def __init__(self, limits: LimitsConfig, now: float) -> None:
        burst_s = limits.caller_burst_s
        self.calls = TokenBucket(limits.caller_calls_per_s, max(1.0, limits.caller_calls_per_s * burst_s), now)
        self.bytes = TokenBucket(limits.caller_bytes_per_s, limits.caller_bytes_per_s * burst_s, now)
        self.updates = TokenBucket(limits.caller_updates_per_s, max(1.0, limits.caller_updates_per_s * burst_s), now)
        self.running = 0
        self.seen_at = now
        """When the last call came."""

    def begin(self) -> None:
        """A call is queued."""
        self.running += 1

    def end(self, _: object) -> None:
        """It is answered, or nobody waits for it any more; takes the future whose callback this is."""
        self.running -= 1


class CallerQuota:
    """The accounts of all callers by their key, the one that was silent longest first."""

    def __init__(self, limits: LimitsConfig, *, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._accounts: OrderedDict[str, CallerAccount] = OrderedDict()

    def __repr__(self) -> str:
        return f"<CallerQuota: {len(self._accounts)} callers>"

    def __len__(self) -> int:
        return len(self._accounts)

    def account(self, key: str) -> CallerAccount:
        """The account of a caller, opened on first use."""
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = CallerAccount(self._limits, self._clock())
            if len(self._accounts) > self._limits.max_callers:
                self._accounts.popitem(last=False)
        else:
            self._accounts.move_to_end(key)
        return account

    def active_since(self, then: float) -> int:
        """Callers of whom a call came since then, on the clock; the last one came last."""
        return sum(1 for _ in itertools.takewhile(lambda each: each.seen_at >= then, reversed(self._accounts.values())))

    def count_call(self, key: str) -> CallerAccount:
        """Before anything is done for a call. Raises OverloadedError."""
        account = self.account(key)
        limits = self._limits
        if account.running >= limits.caller_max_calls:
            raise _refuse(
                f"{account.running} of your calls are waiting here, the limit is {limits.caller_max_calls}", 1
            )
        account.seen_at = now = self._clock()
        if wait_s := account.calls.take(1.0, now):
            raise _refuse(f"over {limits.caller_calls_per_s:g} calls a second of one caller", wait_s)
        return account

    def charge(self, account: CallerAccount, nbytes: int, *, updates: bool) -> None:
        """Before memory is allocated for a call's tensors. Raises OverloadedError."""
        now = self._clock()
        limits = self._limits
        if updates and (wait_s := account.updates.take(1.0, now)):
            raise _refuse(f"over {limits.caller_updates_per_s:g} backward calls a second of one caller", wait_s)
        # A header may claim any size; what is over the limit of a call is refused later and never sent.
        if wait_s := account.bytes.take(min(nbytes, limits.max_body_bytes), now):
            raise _refuse(f"over {limits.caller_bytes_per_s:g} tensor bytes a second of one caller", wait_s)


def _refuse(reason: str, wait_s: float) -> OverloadedError:
    error = OverloadedError(f"{reason}; try again after {wait_s:.3g} s, or ask another provider")
    error.retry_after_s = min(wait_s, _MAX_RETRY_S)
    return error
