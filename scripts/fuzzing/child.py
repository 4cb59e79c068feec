"""Runs targets one after the other and prints a report of each; started by `__main__.py`."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Final

from fuzzing.engines import Report, follow_coverage, instrumented, mutate_seeded
from fuzzing.scratch import LastInput
from fuzzing.target import MIB
from fuzzing.targets import load

ROOM_BYTES: Final = 4096 * MIB
"""Address space above what the process has after its imports: what asks for more fails, and takes nobody along."""


def main() -> None:
    engine, seconds, seed, scratch, *names = sys.argv[1:]
    last = LastInput(Path(scratch))
    logging.disable(logging.CRITICAL)
    for name in names:
        with contextlib.contextmanager(instrumented)() if engine == "atheris" else contextlib.nullcontext():
            target = load(name)
        _limit_memory()
        if engine == "atheris":
            follow_coverage(target, int(seed), float(seconds), last.note, _print)
        _print(mutate_seeded(target, int(seed), float(seconds), last.note))


def _print(report: Report) -> None:
    print(json.dumps(report.to_json()), flush=True)


def _limit_memory() -> None:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    main()
