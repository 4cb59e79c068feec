"""Settings of the whole process, made before anything heavy is imported. Knows nothing of what runs in it."""

from __future__ import annotations

import os
import sys

from p2pmoe.server.memory import keep_freed_memory

_SPINS = "5000"  # a tenth of a millisecond or less: longer than the gaps inside a batch
_OPENMP_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def prepare_process() -> None:
    """Call first in `node`, `train` and `demo`, before torch is imported."""
    # The event loop and the device thread share the interpreter: hand over sooner than after the default 5 ms.
    sys.setswitchinterval(0.0005)
    let_idle_threads_sleep()
    keep_freed_memory()


def let_idle_threads_sleep() -> None:
    """OpenMP threads that wait for work spin for a moment and then sleep, unless the user has chosen already.

    Without spinning, every parallel section of a batch waits for threads to be woken, which takes half as long again
    (docs/benchmarks.md); spinning for as long as the default lets it takes the core that the event loop needs to
    receive the next call. The OpenMP runtime reads this when torch loads it.
    """
    if not any(name in os.environ for name in _OPENMP_WAITING):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
