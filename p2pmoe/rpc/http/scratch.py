"""Memory that is used and left within one callback, whatever the number of connections."""

from __future__ import annotations

import threading
from typing import Final

SCRATCH_BYTES: Final = 256 * 1024  # what asyncio asks for, and receives at once
_local = threading.local()


def scratch() -> memoryview:
    """This thread's; what is in it is gone once another connection has its turn."""
    view: memoryview | None = getattr(_local, "view", None)
    if view is None:
        view = _local.view = memoryview(bytearray(SCRATCH_BYTES))
    return view
