"""Settings of the whole process, made before anything heavy is imported. Knows nothing of what runs in it."""

from __future__ import annotations

import os
import sys

_OPENMP_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def prepare_process() -> None:
    """Call first in `node`, `train` and `demo`, before torch is imported."""
    # The event loop and the device thread share the interpreter: hand over sooner than after the default 5 ms.
    sys.setswitchinterval(0.0005)
    let_idle_threads_sleep()


def let_idle_threads_sleep() -> None:
    """OpenMP threads that wait for work sleep instead of spinning, unless the user has chosen already.

    Spinning threads take the core that the event loop needs to receive the next call. The OpenMP runtime reads
    this when torch loads it.
    """
    if not any(name in os.environ for name in _OPENMP_WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
