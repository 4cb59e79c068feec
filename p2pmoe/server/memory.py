"""How long the C library keeps freed memory. Knows nothing of tensors.

Every backward pass allocates and frees gradients as large as the expert. glibc hands such blocks back to the system
at once and gets them again page by page: for experts of 8 MB that doubles the time of a backward pass.
So a node keeps freed memory while it works, and gives it back when a device has been idle for a moment.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_KEPT_BYTES = 1024 * 1024 * 1024


def _libc_function(name: str) -> Any:
    """A function of glibc; None on other systems and with other C libraries, which need none of this."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


_mallopt = _libc_function("mallopt")
_malloc_trim = _libc_function("malloc_trim")


def keep_freed_memory() -> None:
    """From now on this process keeps what it frees, until `trim_memory`. Safe to call twice; best before threads start.

    Threads share one arena: glibc trims the top of no other, and a device thread's gradients would stay there.
    """
    if _mallopt is not None:
        _mallopt(_M_ARENA_MAX, 1)
        _mallopt(_M_MMAP_MAX, 0)  # a threshold for what is mapped by itself cannot be over 32 MiB
        _mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def trim_memory() -> None:
    """Give freed memory back to the system: others on this machine want it."""
    if _malloc_trim is not None:
        _malloc_trim(0)
