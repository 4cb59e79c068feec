"""Forks beside a swarm: the child gets one clear error at once, or a swarm of its own; the parent loses no call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="this system does not fork"),
    pytest.mark.timeout(150),
]
SWARM = "ForkedError: this process was forked from the one that opened the swarm; make a new Swarm in the worker"


def run(what: str) -> dict[str, Any]:
    script = Path(__file__).with_name("fork_script.py")
    done = subprocess.run([sys.executable, script, what], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr, "neither side warns, nor leaves a traceback"
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["lost"] == []
    assert report["standing"] == [], "nobody is held to have lied"
    return report


@pytest.mark.parametrize("how", ["fork", "exit"])
def test_children_get_one_error_at_once_and_the_parent_notices_nothing(how: str) -> None:
    """ "exit": the children finalize everything that they inherited, as interpreters do at their end."""
    report = run(how)
    assert report["done"] == 200
    assert len(report["children"]) == 2
    for number, (said, status) in enumerate(report["children"]):
        assert status == 0
        for use in ("expert", "awaited", "mixture", "new expert", "backward", "find", "start"):
            assert said[use] == SWARM, use
        for use in ("directory", "dht", "dht start", "node", "device"):
            assert said[use].startswith("ForkedError: this process was forked from the one that started "), use
        assert (said["close"], said["node close"]) == ("nothing", "nothing")
        assert said.get("own swarm") == ("True" if number == 0 else None)


def test_data_loaders_that_fork_take_nothing_from_training() -> None:
    report = run("loader")
    assert report["done"] == 200 + 2 * 8
    assert report["asked"].startswith("ForkedError: Caught ForkedError in DataLoader worker process 0.")
    assert report["asked"].rstrip().endswith(SWARM.removeprefix("ForkedError: "))
