"""docs/security.md names tests and attacks: all of them must exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from p2pmoe import Swarm
from p2pmoe.config import Section

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE))
    assert len(named) > 20
    missing = sorted(path for path in named if not (ROOT / path).is_file())
    assert not missing


def test_every_attack_that_is_named_is_on_the_list(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from attacks.registry import all_attacks

    known = {each.name for each in all_attacks()}
    named = {name for text in re.findall(r"attack: ((?:`\w+`(?:, )?)+)", PAGE) for name in re.findall(r"\w+", text)}
    assert len(named) > 40
    assert named <= known, sorted(named - known)


def test_every_setting_that_is_named_exists(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from attacks.registry import all_attacks

    settings = {name for section in Section.__subclasses__() for name in section.__struct_fields__}
    settings |= set(inspect.signature(Swarm).parameters)
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", PAGE)) - {
        name for each in all_attacks() for name in (each.name, each.theme)
    }
    assert len(named) >= 4
    assert named <= settings, sorted(named - settings)


def test_every_promise_names_what_shows_it():
    defended = PAGE[PAGE.index("## What is defended") : PAGE.index("## What is not defended")]
    rows = [line for line in defended.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 25
    for row in rows:
        shown = row.strip("| ").rpartition(" | ")[2]
        assert re.search(r"`tests/|attack|`scripts/", shown), row
