"""How many files and connections the system lets this process have open. Knows nothing of who connects.

A descriptor that cannot be had fails whatever needs it next, wherever that is: so a node takes fewer connections than
there is room for, and says so when it starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

import msgspec

from p2pmoe.config import LimitsConfig

logger = logging.getLogger(__name__)

RESERVED: Final = 32
"""For files that are read and written, the DHT, and what libraries open; beside those that are open now."""
_FOLDERS: Final = ("/proc/self/fd", "/dev/fd")
_GUESSED_OPEN: Final = 32
_NO_LIMIT: Final = 2**31 - 1


def allow_open_files(wanted: int) -> None:
    """Ask the system for room for so many connections, as far as it lets an ordinary user. For a process of our own."""
    found = _limits()
    if found is None:
        return
    import resource

    soft, hard = found
    needed = wanted + _open_now() + RESERVED
    if soft < needed:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (min(needed, hard), resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            )


def fit_connections(limits: LimitsConfig) -> LimitsConfig:
    """The same limits with as many connections as there is room for; says so where those are fewer."""
    found = _limits()
    if found is None:
        return limits
    soft, _ = found
    room = max(1, soft - _open_now() - RESERVED)
    if room >= limits.max_connections:
        return limits
    logger.warning(
        "this process may have %d files open: at most %d connections of callers are taken, not "
        "limits.max_connections = %d, and further ones are turned away; run `ulimit -n %d` before the node",
        soft,
        room,
        limits.max_connections,
        limits.max_connections + _open_now() + RESERVED,
    )
    return msgspec.structs.replace(limits, max_connections=room)


def _limits() -> tuple[int, int] | None:
    """How many descriptors we may have and could ask for; None where the system counts none."""
    try:
        import resource  # there is none on Windows
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _finite(soft, resource.RLIM_INFINITY), _finite(hard, resource.RLIM_INFINITY)


def _finite(limit: int, endless: int) -> int:
    return _NO_LIMIT if limit == endless else limit


def _open_now() -> int:
    for folder in _FOLDERS:
        with contextlib.suppress(OSError):
            return len(os.listdir(folder))  # noqa: PTH208 - a count of names
    return _GUESSED_OPEN
