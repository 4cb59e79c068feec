"""`scripts/fuzz` for a moment over every target: it runs, counts, and finds nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuzzing import engines
from fuzzing.mutate import MUTATORS
from fuzzing.target import Target
from fuzzing.targets import NAMES, load
from script_processes import run_script


def fuzz(*arguments: str, code: int = 0) -> list[dict]:
    done = run_script("fuzzing", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_moment_over_every_target_finds_nothing() -> None:
    reports = fuzz("--seconds", "0.6", "--engine", "mutation", "--json", "--seed", "7")
    assert [report["target"] for report in reports] == list(NAMES)
    for report in reports:
        assert report["findings"] == []
        assert report["engine"] == "mutation"
        assert report["executions"] > 20
        assert report["kinds"] > 1
        assert 0 < report["peak_bytes"] <= 2 * report["limit_bytes"] + 512 * 1024


def test_a_defect_is_found_kept_and_reported_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(engines.corpus, "CORPUS", tmp_path)

    def divides(data: bytes) -> str:
        return str(1 / (len(data) % 5))

    target = Target("divides", divides, (), 1024, dict)
    report = engines.mutate_seeded(target, 3, 0.5, lambda _: None)
    (finding,) = report.findings
    assert finding.kind == "ZeroDivisionError"
    assert report.executions > 100
    (path,) = (tmp_path / "divides").iterdir()
    assert len(path.read_bytes()) % 5 == 0


def test_a_child_that_dies_is_a_finding_of_its_target_and_the_rest_goes_on(tmp_path: Path, monkeypatch) -> None:
    import fuzzing.__main__ as command
    from fuzzing.scratch import LastInput

    monkeypatch.setattr(command.corpus, "CORPUS", tmp_path)
    asked: list[list[str]] = []

    def die_at_b(names: list[str], _engine: str, _seconds: float, _seed: int, last: LastInput):
        asked.append(names)
        last.note(b"the last input")
        done = names[: names.index("b")] if "b" in names else names
        return [{"target": name, "findings": []} for name in done], "exit code -11"

    monkeypatch.setattr(command, "_run_child", die_at_b)
    reports = command.run_children(["a", "b", "c"], "mutation", 1.0, 1)
    assert [(each["target"], len(each["findings"])) for each in reports] == [("a", 0), ("b", 1), ("c", 0)]
    assert asked == [["a", "b", "c"], ["c"]]
    (path,) = (tmp_path / "b").iterdir()
    assert path.read_bytes() == b"the last input"


@pytest.mark.parametrize("name", sorted(MUTATORS))
def test_a_mutator_takes_whatever_bytes_and_repeats_itself(name: str) -> None:
    import random

    seeds = [data for target in NAMES for data in load(target).seeds().values()]
    for number, data in enumerate([b"", b"\0", *seeds]):
        first = MUTATORS[name](data, random.Random(number))
        assert first == MUTATORS[name](data, random.Random(number))
        assert isinstance(first, bytes)


def test_wrong_options_are_said() -> None:
    fuzz("--seconds", "0", code=2)
    fuzz("--target", "nobody", code=2)
