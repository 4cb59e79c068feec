"""When a node process stops: the first signal asks, a second one insists, and a dead parent settles it.

Plain `signal.signal` with a hand-over to the loop, for Windows has no `loop.add_signal_handler`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from p2pmoe.cli.failures import EXIT_HANGUP, EXIT_INTERRUPTED, EXIT_TERMINATED, hangup_signals
from p2pmoe.cli.terminal import finish_streams

logger = logging.getLogger(__name__)


class StopSignals:
    """Watches SIGINT, SIGTERM and SIGHUP while it is open. Made on the main thread, inside a running loop.

    The first signal ends `wait`; a further SIGINT or SIGTERM ends the process at once with 130 or 143. SIGHUP only
    asks: a terminal that closes sends it several times.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()
        self._count = 0
        self._hangups: frozenset[int] = frozenset()
        self._before: dict[int, Any] = {}

    def __repr__(self) -> str:
        return f"<StopSignals: {self._count} received>"

    def __enter__(self) -> Self:
        self._hangups = frozenset(hangup_signals())
        for number in (signal.SIGINT, signal.SIGTERM, *self._hangups):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def wait(self) -> None:
        """Until the first signal."""
        await self._asked.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1 and number not in self._hangups:
            leave_now(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED)
        # Writing to the loop's own pipe also wakes it from its wait for sockets.
        self._loop.call_soon_threadsafe(self._asked.set)


def exit_with_parent() -> None:
    """Leave at once when standard input ends, which it does however the parent process dies."""
    threading.Thread(target=_wait_for_end_of_input, name="p2pmoe-parent", daemon=True).start()


def leave_now(code: int) -> NoReturn:
    """End the process without waiting for anything."""
    finish_streams()
    os._exit(code)


def _wait_for_end_of_input() -> None:
    # Not sys.stdin: its lock would be held when the interpreter shuts down.
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass
    leave_now(EXIT_HANGUP)
