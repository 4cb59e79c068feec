"""The modules behind `scripts/` as processes: to their end, within a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run_script(module: str, *arguments: str, timeout_s: float = 55, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments …`; its output and its status, whatever it is."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), **environ},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
