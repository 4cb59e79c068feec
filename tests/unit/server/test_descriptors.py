"""A node takes no more connections than the system lets it have files open, and says so at the start."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from p2pmoe.config import LimitsConfig
from p2pmoe.server import descriptors
from p2pmoe.server.descriptors import RESERVED, allow_open_files, fit_connections

resource = pytest.importorskip("resource", reason="this system counts no descriptors")


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """What the system allows, soft and hard; ten files are open."""
    state = {"limits": (64, 64)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: state["limits"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: state.update(limits=limits))
    monkeypatch.setattr(descriptors, "_open_now", lambda: 10)
    return state


def test_a_node_takes_as_many_connections_as_there_is_room_for(
    allowed: dict[str, tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        fitted = fit_connections(LimitsConfig())
    assert fitted == LimitsConfig(max_connections=64 - 10 - RESERVED)
    assert [each.getMessage() for each in caplog.records] == [
        "this process may have 64 files open: at most 22 connections of callers are taken, not "
        "limits.max_connections = 512, and further ones are turned away; run `ulimit -n 554` before the node"
    ]


@pytest.mark.parametrize("limits", [(554, 554), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)])
def test_where_there_is_room_nothing_is_said(
    allowed: dict[str, tuple[int, int]], limits: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    allowed["limits"] = limits
    assert fit_connections(LimitsConfig()) is not None
    assert fit_connections(LimitsConfig()).max_connections == 512
    assert caplog.records == []


def test_no_room_is_room_for_one(allowed: dict[str, tuple[int, int]]) -> None:
    allowed["limits"] = (16, 16)
    assert fit_connections(LimitsConfig()).max_connections == 1


def test_a_command_asks_for_the_room_it_needs(allowed: dict[str, tuple[int, int]]) -> None:
    for before, after in [
        ((256, 4096), (554, 4096)),
        ((256, 300), (300, 300)),
        ((1024, 4096), (1024, 4096)),
        ((256, resource.RLIM_INFINITY), (554, resource.RLIM_INFINITY)),
    ]:
        allowed["limits"] = before
        allow_open_files(512)
        assert allowed["limits"] == after


def test_a_system_that_refuses_more_is_left_alone(
    allowed: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    allow_open_files(512)


def test_the_open_files_are_counted() -> None:
    program = (
        "from p2pmoe.server.descriptors import _open_now\n"
        "before = _open_now(); files = [open('/dev/null') for _ in range(7)]; print(_open_now() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "7\n"
