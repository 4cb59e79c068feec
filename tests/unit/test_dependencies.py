"""What is installed is what is pinned, and nothing of it is on our list of known flaws."""

from __future__ import annotations

from pathlib import Path

import pytest
from auditing import checks


def test_every_dependency_is_pinned_exactly_and_installed_as_pinned() -> None:
    needs = checks.needed()
    assert {"torch", "kademlia", "rpcudp", "u-msgpack-python", "ruff", "scikit-learn"} <= needs.keys(), "the closure"
    assert list(checks.unpinned(needs, checks.pins())) == []


def test_nothing_pinned_or_allowed_has_a_known_flaw() -> None:
    assert list(checks.flawed(checks.pins())) == []
    assert list(checks.allowed_by_us()) == []


def test_the_checks_complain() -> None:
    assert next(checks.flawed({"aiohttp": "3.12.13", "torch": "2.13.0"})).startswith("aiohttp 3.12.13: CVE-")
    needs = {"a": "1.0", "b": "1.0", "c": ""}
    complaints = list(checks.unpinned(needs, {"a": "1.1", "c": "1.0"}))
    assert [each.partition(" ")[0] for each in complaints] == ["a", "b", "c"]
    for line in ("torch>=2", "torch", "torch @ https://example.org/torch.whl", "-r other.txt"):
        with pytest.raises(ValueError, match="pins no exact version"):
            checks.pins(line)
    assert checks.pins("A_b==1.0  # why\n\n") == {"a-b": "1.0"}


def test_a_changed_file_is_found(tmp_path: Path, monkeypatch) -> None:
    assert list(checks.damaged(["iniconfig"])) == []

    class File:
        hash = type("Hash", (), {"mode": "sha256", "value": "AAAA"})

        def __init__(self, name: str) -> None:
            self.name = name

        def locate(self) -> Path:
            return tmp_path / self.name

        def __str__(self) -> str:
            return self.name

    (tmp_path / "changed.py").write_text("x")
    monkeypatch.setattr(checks.metadata, "files", lambda _: [File("changed.py"), File("gone.py")])
    assert [each.rpartition(" ")[2] for each in checks.damaged(["any"])] == [".venv", "missing"]
