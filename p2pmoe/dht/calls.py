"""Requests that wait for their replies: retransmission, lateness, failure. Synchronous; knows no socket.

Time is passed in, and every method returns what is to be done about it.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from p2pmoe.dht.timing import MIN_SLOW_S, RoundTrip
from p2pmoe.protocol.datagrams import REPLY_OF, Address, Reply, Request

MAX_IN_FLIGHT: Final = 64
MAX_OUTSTANDING: Final = 1024
MAX_QUEUED: Final = 4096
MAX_TRANSMISSIONS: Final = 3
LATE_FACTOR: Final = 1.2
MAX_ROUND_TRIPS: Final = 4096


class Delay(enum.IntEnum):
    """How long a call has waited."""

    NONE = 0
    SLOW = 1
    """Longer than most replies take."""
    LATE = 2
    """Longer than 1.2 times the retransmission timeout."""


@dataclass(slots=True, eq=False)
class Call:
    """One request under way. The callbacks run on the event loop; `on_done(None)` says that nobody answered."""

    request: Request
    datagram: bytes
    address: Address
    node_id: bytes | None
    on_done: Callable[[Reply | None], None]
    on_delay: Callable[[Delay], None] | None = None
    first_sent_at: float = 0.0
    sent_at: float = 0.0
    rto_s: float = 0.0
    transmissions: int = 0
    delay: Delay = Delay.NONE
    is_over: bool = False
    came_back: bool = False
    """We have received it ourselves: the address that it was sent to is our own."""

    def __repr__(self) -> str:
        kind = type(self.request).__name__
        return f"<Call {kind} to {self.address[0]}:{self.address[1]}, sent {self.transmissions} times>"


@dataclass(slots=True)
class Due:
    """What the passing of time asks for."""

    resend: list[Call] = field(default_factory=list)
    delayed: list[Call] = field(default_factory=list)
    failed: list[Call] = field(default_factory=list)


class CallBook:
    """All calls of a node. At most 64 are in flight; the rest waits, and its time has not begun."""

    def __init__(self, *, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self.max_in_flight = max_in_flight
        self._outstanding: dict[bytes, Call] = {}
        self._waiting: deque[Call] = deque()
        self._in_flight = 0
        self._timers: list[tuple[float, int, Call, Delay | None]] = []
        self._order = itertools.count()
        self._round_trips: OrderedDict[Address, RoundTrip] = OrderedDict()
        self.typical = RoundTrip()

    def __len__(self) -> int:
        return len(self._outstanding) + len(self._waiting)

    def add(self, call: Call) -> bool:
        """Queue a call; False when too many wait already."""
        if len(self._waiting) >= MAX_QUEUED:
            return False
        self._waiting.append(call)
        return True

    def startable(self, now: float) -> Iterator[Call]:
        """The calls to send now; each one's time begins here."""
        while self._waiting and self._in_flight < self.max_in_flight and len(self._outstanding) < MAX_OUTSTANDING:
            call = self._waiting.popleft()
            if call.is_over:
                continue
            self._outstanding[call.request.id] = call
            self._in_flight += 1
            round_trip = self._round_trip(call.address)
            call.rto_s = round_trip.rto_s
            call.transmissions, call.sent_at, call.first_sent_at = 1, now, now
            # Nearly all calls are answered before this; only the others need further timers.
            self._set_timer(call, now + min(self._slow_s(round_trip), call.rto_s), Delay.SLOW)
            yield call

    def replied(self, reply: Reply, address: Address, now: float) -> Call | None:
        """The call that a reply answers, or None when it answers none of ours: wrong id, address or kind."""
        call = self._outstanding.get(reply.id)
        if call is None or call.address != address or type(reply) is not REPLY_OF[type(call.request)]:
            return None
        self._end(call)
        if call.transmissions == 1:  # Karn: after a retransmission nobody knows which one was answered
            self.typical.sample(now - call.sent_at)
            self._own_round_trip(address).sample(now - call.sent_at)
        return call

    def came_back(self, call_id: bytes) -> Call | None:
        """The call whose request we have received ourselves, if it is one of ours; it is marked."""
        call = self._outstanding.get(call_id)
        if call is not None:
            call.came_back = True
        return call

    def cancel(self, call: Call) -> None:
        """The caller no longer waits."""
        self._end(call)

    def cancel_all(self) -> list[Call]:
        """Every call that was under way or waiting; used when the node closes."""
        calls = [call for call in [*self._outstanding.values(), *self._waiting] if not call.is_over]
        for call in calls:
            self._end(call)
        self._waiting.clear()
        self._timers.clear()
        return calls

    def due(self, now: float) -> Due:
        """What to send again and whom to tell, at this time."""
        due = Due()
        while self._timers and self._timers[0][0] <= now:
            _, _, call, delay = heapq.heappop(self._timers)
            if call.is_over:
                continue
            if delay is Delay.SLOW:
                self._delay(call, Delay.SLOW, due)
                self._set_timer(call, call.sent_at + call.rto_s, None)
                self._set_timer(call, call.sent_at + LATE_FACTOR * call.rto_s, Delay.LATE)
            elif delay is Delay.LATE:
                self._delay(call, Delay.LATE, due)
            elif call.transmissions >= MAX_TRANSMISSIONS:
                self._delay(call, Delay.LATE, due)
                self._end(call)
                due.failed.append(call)
            else:
                call.rto_s *= 2
                call.transmissions += 1
                call.sent_at = now
                self._set_timer(call, now + call.rto_s, None)
                due.resend.append(call)
        return due

    def postpone(self, delay_s: float) -> None:
        """Our own loop stood still: nobody else is late for that."""
        self._timers = [(at + delay_s, order, call, delay) for at, order, call, delay in self._timers]
        for call in self._outstanding.values():
            call.sent_at += delay_s

    @property
    def next_due(self) -> float | None:
        """When `due` has something to say, if nothing happens before."""
        while self._timers and self._timers[0][2].is_over:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def round_trip_s(self, address: Address) -> float | None:
        """The smoothed round trip to an address, if it was measured."""
        measured = self._round_trips.get(address)
        return measured.srtt_s if measured else None

    def _delay(self, call: Call, delay: Delay, due: Due) -> None:
        if call.delay >= delay:
            return
        if delay is Delay.LATE:
            self._in_flight -= 1
        call.delay = delay
        due.delayed.append(call)

    def _set_timer(self, call: Call, at: float, delay: Delay | None) -> None:
        heapq.heappush(self._timers, (at, next(self._order), call, delay))

    def _end(self, call: Call) -> None:
        if call.is_over:
            return
        call.is_over = True
        if self._outstanding.pop(call.request.id, None) is not None and call.delay is not Delay.LATE:
            self._in_flight -= 1

    def _round_trip(self, address: Address) -> RoundTrip:
        return self._round_trips.get(address, self.typical)

    def _slow_s(self, round_trip: RoundTrip) -> float:
        """By the path's own round trip, and by the variation of all paths where the path's own is less certain."""
        if round_trip.srtt_s is None:
            return round_trip.slow_s
        usual_s = round_trip.srtt_s + max(4 * self.typical.variation_s, MIN_SLOW_S)
        return min(round_trip.slow_s, usual_s)

    def _own_round_trip(self, address: Address) -> RoundTrip:
        measured = self._round_trips.setdefault(address, RoundTrip())
        self._round_trips.move_to_end(address)
        while len(self._round_trips) > MAX_ROUND_TRIPS:
            self._round_trips.popitem(last=False)
        return measured

    def __repr__(self) -> str:
        return f"<CallBook {self._in_flight} in flight, {len(self._outstanding)} out, {len(self._waiting)} waiting>"
