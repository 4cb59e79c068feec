"""A file that one running program at a time has. Knows nothing of what the lock stands for."""

from __future__ import annotations

import sys
from typing import IO


def lock_file(file: IO[bytes]) -> bool:
    """Whether the file is ours now. The system gives it back when we end, however that is.

    The file should hold nothing else: Windows lets nobody read what is locked.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
