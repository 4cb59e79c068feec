"""`scripts/fuzz`: one line a target; exit code 1 when there was a finding.

The targets run in a child process: one that crashes, hangs or eats memory takes nobody with it, and the input that it
was given last lies in a shared file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from fuzzing import corpus
from fuzzing.engines import has_atheris
from fuzzing.guard import Finding
from fuzzing.scratch import LastInput
from fuzzing.targets import NAMES

START_S: Final = 60.0
"""How long a child may take to import what it needs; twice the time of a run is allowed besides."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description="Feeds bad bytes to everything that reads foreign bytes. Findings are written to tests/corpus. "
        "With atheris installed (pip install atheris) the coverage of the code is followed, otherwise what inputs "
        "lead to. Example: scripts/fuzz --seconds 300 --target request_frames",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="for each target")
    parser.add_argument("--target", default="all", choices=["all", *NAMES], metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=["auto", "atheris", "mutation"], default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object a target")
    parser.add_argument("--write-seeds", action="store_true", help="write the seed files anew, and fuzz nothing")
    options = parser.parse_args()
    if options.seconds <= 0:
        parser.error("--seconds must be above 0")
    if options.engine == "atheris" and not has_atheris():
        parser.error("atheris is not installed; run: pip install atheris")
    names = list(NAMES) if options.target == "all" else [options.target]
    if options.write_seeds:
        write_seeds(names)
        return
    engine = ("atheris" if has_atheris() else "mutation") if options.engine == "auto" else options.engine
    findings = 0
    # libFuzzer ends its process with the run, so that atheris takes one process for each target.
    for group in [[name] for name in names] if engine == "atheris" else [names]:
        for report in run_children(group, engine, options.seconds, options.seed):
            findings += len(report["findings"])
            print(json.dumps(report) if options.json else _line(report), flush=True)
    raise SystemExit(1 if findings else 0)


def write_seeds(names: list[str]) -> None:
    from fuzzing.targets import load

    for name in names:
        corpus.write_seeds(name, load(name).seeds())


def run_children(names: list[str], engine: str, seconds: float, seed: int) -> list[dict[str, Any]]:
    """The reports of all names. A child that dies is a finding of the target it was at; another takes the rest."""
    reports: list[dict[str, Any]] = []
    while names:
        with tempfile.TemporaryDirectory() as folder:
            last = LastInput.create(Path(folder) / "last")
            done, reason = _run_child(names, engine, seconds, seed, last)
            reports += done
            names = names[len(done) :]
            if names and reason:
                finding = Finding("process", names[0], reason, last.read())
                path = corpus.keep(names[0], finding)
                details = {"kind": "process", "where": names[0], "detail": reason, "bytes": len(finding.data)}
                dead = {
                    "target": names[0],
                    "engine": engine,
                    "seed": seed,
                    "executions": last.count,
                    "seconds": seconds,
                }
                reports.append({**dead, "findings": [{**details, "file": str(path)}]})
                names = names[1:]
            last.close()
    return reports


def _run_child(
    names: list[str], engine: str, seconds: float, seed: int, last: LastInput
) -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "fuzzing.child", engine, str(seconds), str(seed), str(last.path), *names]
    limit_s = START_S + 2 * seconds * len(names) + 5 * len(names)
    try:
        ended = subprocess.run(command, capture_output=True, timeout=limit_s, check=False)
        output, reason = ended.stdout, f"exit code {ended.returncode}: {ended.stderr[-300:].decode(errors='replace')}"
    except subprocess.TimeoutExpired as error:
        output, reason = error.stdout or b"", f"no end within {limit_s:.0f} s"
    done = [json.loads(line) for line in output.splitlines() if line.startswith(b'{"target"')]
    return done, reason


def _line(report: dict[str, Any]) -> str:
    findings = "; ".join(f"{each['kind']} in {each['where']}: {each['detail']}" for each in report["findings"])
    return (
        f"{report['target']:16} {report['engine']} {report['executions']:>9} executions "
        f"{report.get('executions_per_s', 0):>7}/s  peak {report.get('peak_bytes', 0) / 1024:>7.0f} KiB "
        f"of 2 x {report.get('limit_bytes', 0) / 1024:.0f}  {findings or 'no finding'}"
    )


if __name__ == "__main__":
    main()
