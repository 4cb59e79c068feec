"""Two engines: atheris, which follows the coverage of the code, and one of our own, which follows what inputs lead to.

Both take a seed, start from the corpus, go on after a finding, and report each defect once.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from fuzzing import corpus
from fuzzing.guard import Finding, Guard, forget_peak
from fuzzing.mutate import MUTATORS
from fuzzing.target import Target

MEASURE_EVERY: Final = 64
"""Memory is traced in one execution of so many: tracing makes it several times slower."""
MAX_POOL: Final = 4096
MAX_FINDINGS: Final = 32


@dataclass(slots=True)
class Report:
    """What one run over one target gave."""

    target: str
    engine: str
    seed: int
    limit_bytes: int
    executions: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    kinds: int = 0
    """Different things that inputs led to."""
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "engine": self.engine,
            "seed": self.seed,
            "executions": self.executions,
            "executions_per_s": round(self.executions / self.seconds) if self.seconds else 0,
            "seconds": round(self.seconds, 2),
            "kinds": self.kinds,
            "peak_bytes": self.peak_bytes,
            "limit_bytes": self.limit_bytes,
            "findings": [
                {"kind": each.kind, "where": each.where, "detail": each.detail, "bytes": len(each.data)}
                for each in self.findings
            ],
        }


class Session:
    """One target being fuzzed: runs inputs, remembers what is new, writes findings down."""

    def __init__(self, target: Target, engine: str, seed: int, *, note: Callable[[bytes], None]) -> None:
        self.report = Report(target.name, engine, seed, target.limit_bytes)
        self._guard = Guard(target)
        self._note = note
        self._seen: set[str] = set()
        self._known: set[tuple[str, str]] = set()
        self._guard.warm_up(iter(corpus.all_inputs(target.name)))
        forget_peak()
        self._began = time.monotonic()

    def __repr__(self) -> str:
        return f"<Session {self.report.target}: {self.report.executions} executions>"

    def try_input(self, data: bytes, *, measure: bool = False) -> bool:
        """Run one input; True when it led to something that none before led to."""
        report = self.report
        self._note(data)
        outcome = self._guard.run(data, measure=measure or report.executions % MEASURE_EVERY == 0)
        report.executions += 1
        report.peak_bytes = max(report.peak_bytes, outcome.peak_bytes or 0)
        if outcome.finding is not None:
            self._take(outcome.finding)
        if outcome.signature in self._seen:
            return False
        self._seen.add(outcome.signature)
        report.kinds = len(self._seen)
        return True

    def end(self) -> Report:
        self.report.seconds = time.monotonic() - self._began
        return self.report

    def _take(self, finding: Finding) -> None:
        name = finding.kind, finding.where
        if name in self._known or len(self._known) >= MAX_FINDINGS:
            return
        self._known.add(name)
        self.report.findings.append(finding)
        corpus.keep(self.report.target, finding)


def has_atheris() -> bool:
    return find_spec("atheris") is not None


class Pool:
    """Inputs to change further. Of three at random the one that ran fastest is taken: it leads on soonest."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._inputs: list[tuple[float, bytes]] = []

    def __repr__(self) -> str:
        return f"<Pool of {len(self._inputs)} inputs>"

    def add(self, data: bytes, seconds: float) -> None:
        if len(self._inputs) >= MAX_POOL:
            self._inputs.pop(self._dice.randrange(MAX_POOL))
        self._inputs.append((seconds, data))

    def choose(self) -> bytes:
        return min(self._dice.choices(self._inputs, k=3))[1]


def mutate_seeded(target: Target, seed: int, seconds: float, note: Callable[[bytes], None]) -> Report:
    """Our own engine: inputs that lead to something new are changed further, those of the corpus always."""
    session = Session(target, "mutation", seed, note=note)
    dice = random.Random(f"{seed}/{target.name}")
    mutate = MUTATORS[target.mutate]
    pool = Pool(dice)
    for data in corpus.all_inputs(target.name) or [b""]:
        began = time.perf_counter()
        session.try_input(data, measure=True)
        pool.add(data, time.perf_counter() - began)
    deadline = time.monotonic() + seconds
    while (began := time.monotonic()) < deadline:
        data = pool.choose()
        if dice.randrange(16) == 0:
            other = pool.choose()
            data = data[: dice.randrange(len(data) + 1)] + other[dice.randrange(len(other) + 1) :]
        data = mutate(data, dice)[: target.max_input_bytes]
        if session.try_input(data):
            pool.add(data, time.monotonic() - began)
            session.try_input(data, measure=True)
    return session.end()


def follow_coverage(
    target: Target, seed: int, seconds: float, note: Callable[[bytes], None], finish: Callable[[Report], None]
) -> None:
    """Atheris (libFuzzer). Never returns: `finish` gets the report, then the process ends."""
    import atheris

    session = Session(target, "atheris", seed, note=note)
    mutate = MUTATORS[target.mutate]
    for data in corpus.all_inputs(target.name):
        session.try_input(data, measure=True)
    deadline = time.monotonic() + seconds

    def test_one(data: bytes) -> None:
        session.try_input(data)
        if time.monotonic() > deadline:
            finish(session.end())
            os._exit(0)

    def change(data: bytes, most: int, number: int) -> bytes:
        dice = random.Random(number)
        changed = mutate(data, dice) if dice.randrange(2) else atheris.Mutate(data, most)
        return changed[:most]

    with tempfile.TemporaryDirectory() as scratch:
        for index, data in enumerate(corpus.all_inputs(target.name)):
            Path(scratch, f"{index}").write_bytes(data)
        options = [
            f"-seed={seed % 2**31 or 1}",
            f"-max_len={target.max_input_bytes}",
            "-verbosity=0",
            "-rss_limit_mb=0",
        ]
        atheris.Setup([sys.argv[0], *options, "-timeout=0", scratch], test_one, custom_mutator=change)
        atheris.Fuzz()


def instrumented() -> Iterator[None]:
    """Use as `with contextmanager(instrumented)():` around the import of what is fuzzed."""
    import atheris

    with atheris.instrument_imports(include=["p2pmoe"]):
        yield
