"""Standard output: one JSON document a line for programs, a console for people. Knows nothing of what it says."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Final

from rich.console import Console

WIDTH_OF_NO_TERMINAL: Final = 160


def print_json(document: Any) -> None:
    """One line, written at once: whoever reads it through a pipe is waiting for it."""
    sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    sys.stdout.flush()


def open_console(*, stderr: bool = False) -> Console:
    """A console that does not fold lines for a terminal that is not there."""
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_NO_TERMINAL
    return console
