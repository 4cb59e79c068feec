"""Every bad input ever found, and every seed: a value or the typed error of its reader, within memory and time."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import corpus
from fuzzing.guard import Guard
from fuzzing.target import Target
from fuzzing.targets import NAMES, load

BAD = [pytest.param(name, path, id=f"{name}/{path.stem}") for name in NAMES for path in corpus.bad_inputs(name)]
_guards: dict[str, Guard] = {}


def guard(name: str) -> Guard:
    if name not in _guards:
        _guards[name] = Guard(load(name))
        _guards[name].warm_up(iter(corpus.all_inputs(name)))
    return _guards[name]


@pytest.mark.parametrize(("name", "path"), BAD)
def test_a_bad_input_is_refused_or_read_and_nothing_else(name: str, path: Path) -> None:
    outcome = guard(name).run(path.read_bytes(), measure=True)
    assert outcome.finding is None, f"{outcome.finding.kind} in {outcome.finding.where}: {outcome.finding.detail}"


@pytest.mark.parametrize("name", NAMES)
def test_every_seed_is_valid_and_is_what_the_code_writes(name: str) -> None:
    target = load(name)
    files = {path.stem: path.read_bytes() for path in corpus.seed_inputs(name)}
    assert files, "run: scripts/fuzz --write-seeds"
    if name not in CHANGING:
        assert files == target.seeds(), "run: scripts/fuzz --write-seeds"
    for data in files.values():
        assert target.run(data)


CHANGING = {"key_files"}
"""Whose seeds another version of a library may write otherwise."""


@pytest.mark.parametrize("name", NAMES)
def test_every_target_has_bad_inputs(name: str) -> None:
    assert len(corpus.bad_inputs(name)) >= 5


def test_a_folder_of_the_corpus_without_a_target_would_be_forgotten() -> None:
    folders = {path.name for path in corpus.CORPUS.iterdir() if path.is_dir()}
    assert folders == {*NAMES, corpus.SEEDS}
    assert {path.name for path in (corpus.CORPUS / corpus.SEEDS).iterdir()} == set(NAMES)


# ------------------------------------------------------------------------------------------ the judge itself


def target_of(run, **options) -> Target:
    return Target("t", run, (ValueError,), 1024, dict, **options)


def fails(error: BaseException):
    def run(_: bytes) -> str:
        raise error

    return run


def spin(_: bytes) -> str:
    while True:
        pass


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (fails(KeyError("x")), "KeyError"),
        (fails(RecursionError()), "RecursionError"),
        (fails(MemoryError()), "MemoryError"),
        (lambda _: str(len(bytes(4_000_000))), "memory"),
        (spin, "time"),
        (lambda data: str(eval(data)), "code"),  # noqa: S307 - to show that it would be found
        (lambda _: __import__("this").__name__, "code"),
    ],
)
def test_the_guard_finds(run, kind: str, capsys) -> None:
    outcome = Guard(target_of(run, deadline_s=0.2)).run(b"1+1", measure=True)
    assert outcome.finding is not None
    assert outcome.finding.kind == kind
    assert outcome.finding.data == b"1+1"


def test_the_guard_finds_unpickling() -> None:
    import pickle  # noqa: TID251 - to show that it would be found
    from fractions import Fraction

    data = pickle.dumps(Fraction(1, 3))
    outcome = Guard(target_of(lambda data: str(pickle.loads(data)))).run(data)  # noqa: S301 - as above
    assert outcome.finding is not None
    assert outcome.finding.where.startswith("pickle.find_class")


def test_the_guard_lets_typed_errors_and_values_pass() -> None:
    assert Guard(target_of(fails(ValueError("at 'x', byte 17")))).run(b"").signature == "ValueError: at q, byte 9"
    assert Guard(target_of(lambda _: "value")).run(b"", measure=True).finding is None


def test_a_finding_is_kept_once_and_the_same_bytes_find_it_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "CORPUS", tmp_path)
    finding = Guard(target_of(fails(KeyError("x")))).run(b"bad").finding
    assert finding is not None
    path = corpus.keep("t", finding)
    assert corpus.keep("t", finding) == path
    assert corpus.bad_inputs("t") == [path]
    assert corpus.all_inputs("t") == [b"bad"]
