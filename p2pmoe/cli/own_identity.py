"""The key of a node whose keeper named none: kept in the user's data folder, each by one running node at a time."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from p2pmoe.errors import ConfigError
from p2pmoe.file_lock import lock_file as _lock
from p2pmoe.files import expand_home

logger = logging.getLogger(__name__)

MAX_NODES: Final = 256
"""Of one user on one machine; further ones get a key that ends with them."""


def data_folder() -> Path:
    """Where programs keep what they need again, by the system's convention. Raises ConfigError without a home."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or expand_home("~/AppData/Local")
    elif sys.platform == "darwin":
        base = expand_home("~/Library/Application Support")
    else:
        base = os.environ.get("XDG_DATA_HOME") or ""
        if not Path(base).is_absolute():  # the convention says to ignore others
            base = expand_home("~/.local/share")
    return Path(base) / "p2pmoe"


@contextlib.contextmanager
def own_identity_path() -> Iterator[Path | None]:
    """The first key file of the user that no running node has, made by whoever opens it; ours until the end.

    None, with a warning, where nothing can be kept: no home, a read-only file system.
    """
    with contextlib.ExitStack() as held:
        try:
            path = _claim(held)
        except (OSError, ConfigError) as error:
            reason = getattr(error, "strerror", None) or error
            logger.warning(
                "no key can be kept (%s): this node has another name at each start; set identity_path", reason
            )
            path = None
        yield path


def _claim(held: contextlib.ExitStack) -> Path | None:
    folder = data_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in itertools.count(1):
        if number > MAX_NODES:
            raise OSError(0, f"{MAX_NODES} nodes of this user are running")
        name = "identity" if number == 1 else f"identity-{number}"
        # The lock is not on the key file itself: Windows would let nobody read that.
        lock = held.enter_context((folder / f"{name}.lock").open("ab"))
        if _lock(lock):
            return folder / f"{name}.pem"
        lock.close()
    return None
