"""Small files that only their owner may read. Knows nothing of what is in them.

Which modes are right (POSIX; on Windows the folder's access list decides):

1. Others have no right at all, the group neither writes nor executes.
2. The group may read only what root owns and nobody may write (0440): so are secrets mounted into containers, and root
   chose the group. Links are followed.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from p2pmoe.errors import IdentityError
from p2pmoe.files import open_at_once, without_mark

MAX_KEY_FILE_BYTES: Final = 4096


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise IdentityError(f"key file {path} cannot be reached: {error.strerror}") from error


def read_private_file(path: Path, remedy: str = "start a node once to make it, or give another path") -> bytes:
    """What is in it, without a byte order mark, up to one byte over the limit. Raises IdentityError."""
    try:
        with open_at_once(path) as file:
            status = os.fstat(file.fileno())
            mode = status.st_mode
            if not stat.S_ISREG(mode):
                raise IdentityError(f"key file {path} is no regular file")
            if os.name == "posix" and mode & 0o077 and not _is_mounted_secret(mode, status.st_uid):
                raise IdentityError(
                    f"key file {path} can be read by others (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}"
                )
            return without_mark(file.read(MAX_KEY_FILE_BYTES + 1))
    except FileNotFoundError as error:
        raise IdentityError(f"key file {path} does not exist; {remedy}") from error
    except OSError as error:
        raise IdentityError(f"key file {path} cannot be read: {error.strerror}; check its owner and mode") from error


def _is_mounted_secret(mode: int, owner: int) -> bool:
    return owner == 0 and stat.S_IMODE(mode) == 0o440


def write_new_private_file(path: Path, content: bytes) -> bool:
    """True when this call made the file, False when it was there. The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_private(temporary, content)
            return _publish(temporary, path, content)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise IdentityError(
            f"key file {path} cannot be written: {error.strerror}; check the folder's owner and mode"
        ) from error


def _write_private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, path: Path, content: bytes) -> bool:
    try:
        os.link(temporary, path)  # unlike rename, fails when somebody else was first
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: the exclusive create still decides who was first.
        try:
            _write_private(path, content)
        except FileExistsError:
            return False
    return True
