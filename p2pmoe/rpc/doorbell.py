"""A bell that wakes one waiting thread. Knows nothing of what it is rung for.

A thread that waits on a socket is woken on the core of the thread that rings, which is about to sleep; a lock or a
condition variable wakes it on an idle core, which costs up to 80 µs more on a virtual machine (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
from collections import deque
from typing import Final

from p2pmoe import forks

RELAY_PATIENCE_S: Final = 0.002

_TIMEVAL: Final = struct.Struct("@ll") if sys.platform in ("linux", "darwin") else None
_LONGEST_WAIT_S = 1.0  # so that waits of all lengths share one timeout of the socket


class Doorbell:
    """`ring` from any thread, `wait` in one. Rings that nobody waits for add up to one."""

    def __init__(self) -> None:
        self._waiting_end, self._ringing_end = (forks.shared(end) for end in socket.socketpair())
        self._ringing_end.setblocking(False)
        self._waiting_end.setblocking(True)
        self._timeout_s = 0.0  # of the waiting end; setting it costs a system call

    def __repr__(self) -> str:
        return f"<Doorbell {self._waiting_end.fileno()}>"

    def ring(self) -> None:
        """Wake the waiting thread, or let its next wait return at once."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is rung already; closed: nobody waits
            self._ringing_end.send(b"\0")

    def wait(self, timeout_s: float) -> bool:
        """Whether the bell rang within `timeout_s`. May return early, for a ring that is over or after a second."""
        timeout_s = min(max(timeout_s, 1e-3), _LONGEST_WAIT_S)
        if timeout_s != self._timeout_s:
            self._timeout_s = timeout_s
            self._set_timeout(timeout_s)
        try:
            self._waiting_end.recv(4096)
        except (BlockingIOError, TimeoutError):
            return False
        return True

    def close(self) -> None:
        """Free the sockets."""
        self._waiting_end.close()
        self._ringing_end.close()

    def __del__(self) -> None:
        self.close()

    def _set_timeout(self, timeout_s: float) -> None:
        """The system's own timeout where there is one: Python's is a call of `poll` before each `recv`, and between the
        two another thread takes the interpreter's lock.
        """
        if _TIMEVAL is None:
            self._waiting_end.settimeout(timeout_s)
        else:
            whole_s = int(timeout_s)
            timeval = _TIMEVAL.pack(whole_s, int((timeout_s - whole_s) * 1e6))
            self._waiting_end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


class Relay:
    """Wakes many threads one after the other: each that wakes wakes the next.

    Threads that are woken together only queue up for the interpreter's lock, and each turn there costs two switches
    between threads (docs/benchmarks.md). `wake` and `nudge` belong to one thread, `woke` to those that wait.
    """

    def __init__(self) -> None:
        self._bells: deque[Doorbell] = deque()
        self._moved_at = 0.0

    def __repr__(self) -> str:
        return f"<Relay: {len(self._bells)} to wake>"

    def wake(self, bell: Doorbell) -> bool:
        """Ring when its turn has come; whether it has to wait for others."""
        self._bells.append(bell)
        if len(self._bells) > 1 and self._bells[0] is not bell:
            return True
        self._moved_at = time.monotonic()
        bell.ring()
        return False

    def woke(self, bell: Doorbell) -> None:
        """The thread of this bell is awake, or waits no longer: the next one's turn."""
        with contextlib.suppress(ValueError):
            self._bells.remove(bell)
        self._moved_at = time.monotonic()
        with contextlib.suppress(IndexError):
            self._bells[0].ring()

    def nudge(self) -> bool:
        """Whether somebody still waits for a turn. Wakes all when nobody has taken a turn for a while."""
        if self._bells and time.monotonic() - self._moved_at > RELAY_PATIENCE_S:
            while self._bells:
                self._bells.popleft().ring()
        return bool(self._bells)


_of_thread = threading.local()


def _forget_bells() -> None:
    """In a forked child: the bell of the thread that forked rings in the parent."""
    global _of_thread  # noqa: PLW0603
    _of_thread = threading.local()


forks.tell_module(_forget_bells)


def thread_doorbell() -> Doorbell:
    """The calling thread's own bell; it ends with the thread."""
    bell = getattr(_of_thread, "bell", None)
    if bell is None:
        bell = _of_thread.bell = Doorbell()
    return bell
