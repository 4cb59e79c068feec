"""A bell that wakes one waiting thread. Knows nothing of what it is rung for.

A thread that waits on a socket is woken on the core of the thread that rings, which is about to sleep; a lock or a
condition variable wakes it on an idle core, which costs up to 80 µs more on a virtual machine (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import socket
import threading


class Doorbell:
    """`ring` from any thread, `wait` in one. Rings that nobody waits for add up to one."""

    def __init__(self) -> None:
        self._waiting_end, self._ringing_end = socket.socketpair()
        self._ringing_end.setblocking(False)

    def __repr__(self) -> str:
        return f"<Doorbell {self._waiting_end.fileno()}>"

    def ring(self) -> None:
        """Wake the waiting thread, or let its next wait return at once."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is rung already; closed: nobody waits
            self._ringing_end.send(b"\0")

    def wait(self, timeout_s: float) -> bool:
        """Whether the bell rang within `timeout_s`. May return early, for a ring that is over."""
        self._waiting_end.settimeout(max(timeout_s, 1e-6))
        try:
            self._waiting_end.recv(4096)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Free the sockets."""
        self._waiting_end.close()
        self._ringing_end.close()

    def __del__(self) -> None:
        self.close()


_of_thread = threading.local()


def thread_doorbell() -> Doorbell:
    """The calling thread's own bell; it ends with the thread."""
    bell = getattr(_of_thread, "bell", None)
    if bell is None:
        bell = _of_thread.bell = Doorbell()
    return bell
