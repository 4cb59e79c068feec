"""Runs `hivemind_dht.py` with a Python that has hivemind, for a bounded time; its processes end with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def hivemind_rows(python: str, mode: str, timeout_s: float) -> Iterator[dict[str, Any]]:
    """The rows that it printed, and one that says so when it did not end by itself."""
    script = str(Path(__file__).with_name("hivemind_dht.py"))
    # A session of its own: its peers are processes that would outlive it.
    process = subprocess.Popen(
        [python, script, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    failed = ""
    try:
        out, _ = process.communicate(timeout=timeout_s)
        failed = f"exit code {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        failed = f"not done after {timeout_s:.0f} s"
        _end_session(process.pid)
        out, _ = process.communicate()
    else:
        _end_session(process.pid)
    for line in out.splitlines():
        if line.startswith("{"):
            yield json.loads(line)
    if failed:
        yield {"row": mode, "failed": failed}


def _end_session(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
