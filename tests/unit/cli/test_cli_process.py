"""Settings of the whole process."""

import os

import pytest

from p2pmoe.cli.process import let_idle_threads_sleep

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)


def test_waiting_threads_sleep() -> None:
    let_idle_threads_sleep()

    assert os.environ["GOMP_SPINCOUNT"] == "5000"


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_chosen_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ACTIVE")

    let_idle_threads_sleep()

    assert {each: os.environ.get(each) for each in NAMES} == dict.fromkeys(NAMES) | {name: "ACTIVE"}
