"""torch's generators belong to the whole process: whoever has them seeded for a while and whoever draws take turns.

A node in a trainer's process seeds them while an expert computes. A layer of that trainer that drew meanwhile would
change what the expert draws, and what it drops forward would not be what it drops backward.
"""

from __future__ import annotations

import contextlib
import threading

from p2pmoe import forks


class _Turns:
    def __init__(self) -> None:
        self.lock = threading.RLock()

    def became_a_child(self) -> None:
        self.lock = threading.RLock()  # a thread that is not here may hold the other one


_turns = _Turns()
forks.tell(_turns)


def our_turn() -> contextlib.AbstractContextManager[object]:
    """To be held, as a context, while the generators are seeded, or drawn from. The same thread may hold it twice."""
    return _turns.lock
