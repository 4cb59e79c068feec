"""Exchanges that a calling thread makes by itself. Knows groups of calls and a blocking transport.

A call that is handed to an event loop and back passes two threads' queues, which costs a lone small call as much as
its way over the wire (docs/benchmarks.md). While few threads call they are better off on sockets of their own; many
are better off sharing exchanges, which is the dispatcher's business.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Final

from p2pmoe.client.ages import Ages
from p2pmoe.client.answers import Answers
from p2pmoe.client.calls import Call, CallGroup
from p2pmoe.errors import DecodeError, P2PMoEError
from p2pmoe.faults import unexpected
from p2pmoe.rpc.base import BlockingTransport, Flat, proving
from p2pmoe.rpc.deadline import Deadline
from p2pmoe.types import PeerId

FEW: Final = 4
"""Callers at a time that each make their own exchange."""
_LINGER_S: Final = 0.05  # for the end of a body whose results are all there; without it the connection is closed


class LoneCalls:
    """Makes the exchange of a group in the calling thread where that is faster. Any thread.

    `on_lie` is told of a peer whose replies are wrong, in the calling thread, and `ages` of what replies say of theirs.
    """

    def __init__(
        self, transport: BlockingTransport, on_lie: Callable[[PeerId, DecodeError], None], ages: Ages | None = None
    ) -> None:
        self._ages = ages
        self._transport = transport
        self._on_lie = on_lie
        self._proves = proving(transport)
        self._lock = threading.Lock()
        self.running = 0
        """Threads that are at it."""
        self.exchanges = 0
        self.calls = 0

    def __repr__(self) -> str:
        return f"<LoneCalls: {self.exchanges} exchanges, {self.running} running>"

    def try_call(self, group: CallGroup, timeout_s: float, others: int) -> bool:
        """Send the group's calls and wait for their results; False when nothing was done.

        `others` is the number of calls that are under way elsewhere.
        """
        endpoint = group.calls[0].endpoint
        if self.running + others >= FEW or any(call.endpoint != endpoint for call in group.calls[1:]):
            return False
        with self._lock:
            self.running += 1
        try:
            return self._exchange(group, Deadline(time.monotonic() + timeout_s))
        finally:
            with self._lock:
                self.running -= 1

    def _exchange(self, group: CallGroup, deadline: Deadline) -> bool:
        def finish(call: Call, result: Flat | P2PMoEError) -> None:
            grace_s = group.complete(call, result)
            if grace_s is not None:
                deadline.bring_forward(grace_s)

        endpoint, frames = group.calls[0].endpoint, [call.frame for call in group.calls]
        answers = Answers(
            endpoint, group.calls, finish, self._on_lie, is_proven=self._proves(endpoint), ages=self._ages
        )
        try:
            replies = self._transport.try_exchange(endpoint, frames, answers, deadline)
            if replies is None:
                return False
            with self._lock:
                self.exchanges += 1
                self.calls += len(group.calls)
            with contextlib.closing(replies):
                while answers.missing and not group.has_failed and (frame := next(replies, None)) is not None:
                    answers.receive(frame)
                if not answers.missing:
                    deadline.bring_forward(_LINGER_S)
                    next(replies, None)  # the end of the body, so that the connection can serve the next exchange
        except P2PMoEError as error:
            answers.fail(error)
        except TimeoutError:
            return True  # what is missing has no result
        except Exception as error:  # noqa: BLE001 - of the transport, or of a library below it
            answers.fail(unexpected(f"the exchange with {endpoint}", error))
        answers.close()
        return True
