"""What a trainer makes of the ages that replies state."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from p2pmoe.client.ages import MAX_EXPERTS, MAX_INCARNATIONS, Ages
from p2pmoe.errors import ExpertRebornError


def age(incarnation: str = "a" * 32, updates: int = 0, run: str = "r1") -> dict[str, Any]:
    return {"incarnation": incarnation, "run": run, "updates": updates}


def test_learning_and_replies_that_overtake_each_other_are_no_news() -> None:
    ages = Ages()
    for updates in (5, 6, 9, 7, 8, 10):
        ages.note("ffn.1", age(updates=updates))
    assert ages.of("ffn.1") is not None
    assert ages.of("ffn.1").updates == 10  # type: ignore[union-attr]
    assert (ages.rebirths, ages.setbacks) == (0, 0)


def test_a_new_incarnation_is_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    ages = Ages()
    ages.note("ffn.1", age(updates=40))
    with caplog.at_level(logging.WARNING):
        ages.note("ffn.1", age("b" * 32, 2))
        ages.note("ffn.1", age("b" * 32, 3))
    assert (ages.rebirths, ages.setbacks) == (1, 0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("ffn.1 is another expert than before: it had 40 updates, and this one has 2; what it had")


def test_two_nodes_that_host_one_uid_are_told_of_once() -> None:
    ages = Ages()
    for number in range(20):
        ages.note("ffn.1", age("ab"[number % 2] * 32, number))
    assert (ages.rebirths, ages.setbacks) == (1, 0)


def test_a_restored_expert_with_fewer_updates_is_a_setback(caplog: pytest.LogCaptureFixture) -> None:
    ages = Ages()
    ages.note("ffn.1", age(updates=67))
    with caplog.at_level(logging.WARNING):
        ages.note("ffn.1", age(updates=50, run="r2"))
    ages.note("ffn.1", age(updates=80, run="r2"))
    ages.note("ffn.1", age(updates=80, run="r3"))  # restored without a loss
    assert (ages.rebirths, ages.setbacks, ages.updates_lost) == (0, 1, 17)
    assert "ffn.1 went on from a checkpoint: it had 67 updates, and has 50 now" in caplog.text


def test_what_is_known_to_be_another_one_is_no_news() -> None:
    ages = Ages("raise")
    for uid in ("ffn.1", "ffnx.1"):
        ages.note(uid, age())
    ages.forget("ffn.")
    ages.note("ffn.1", age("b" * 32))
    ages.raise_if_reborn()
    assert ages.of("ffnx.1") is not None


def test_many_of_them_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    ages = Ages()
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            ages.note("ffn.1", age(f"{number:032x}"))
    assert ages.rebirths == 99
    assert len(caplog.records) == 1


def test_whoever_asked_for_it_gets_an_error_once() -> None:
    ages = Ages("raise")
    ages.note("ffn.1", age(updates=40))
    ages.raise_if_reborn()
    ages.note("ffn.1", age("b" * 32))
    with pytest.raises(ExpertRebornError, match=r"ffn.1 is another expert than before"):
        ages.raise_if_reborn()
    ages.raise_if_reborn()


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"incarnation": "a"},
        age(updates=-1),
        age(updates=2**80),
        age(updates=True),
        age(updates=1.5),  # type: ignore[arg-type]
        age("a" * 65),
        age("a\x1b[2J"),
        age(""),
        age(["a"]),  # type: ignore[arg-type]
        age({}),  # type: ignore[arg-type]
        age(run=None),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_age_is_no_news(parameters: dict[str, Any]) -> None:
    ages = Ages("raise")
    ages.note("ffn.1", parameters)
    ages.note("ffn.2", age(updates=3))
    ages.note("ffn.2", parameters)
    ages.raise_if_reborn()
    assert ages.of("ffn.1") is None
    assert ages.of("ffn.2").updates == 3  # type: ignore[union-attr]


def test_what_is_remembered_is_bounded() -> None:
    ages = Ages()
    for number in range(MAX_EXPERTS + 10):
        ages.note(f"ffn.{number}", age())
    assert ages.of("ffn.0") is None
    assert repr(ages) == f"<Ages: {MAX_EXPERTS} experts, 0 rebirths, 0 setbacks>"
    for number in range(MAX_INCARNATIONS + 3):
        ages.note("ffn.100", age(f"{number:032x}"))
    assert len(ages._known["ffn.100"].others) < MAX_INCARNATIONS
