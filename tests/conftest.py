"""What every test has: a seed that a failure prints, and a quiet end of every thread it began."""

from __future__ import annotations

import atexit
import logging
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Nodes that tests start as a user would keep their keys apart from the user's own.
os.environ["XDG_DATA_HOME"] = os.environ["LOCALAPPDATA"] = tempfile.mkdtemp(prefix="p2pmoe-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_DATA_HOME"], ignore_errors=True)
settings.register_profile("p2pmoe", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("p2pmoe")
torch.set_num_threads(1)  # the tests' own threads share the cores
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and every process that a test starts would ignore Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seed(record_property: pytest.RecordProperty) -> int:
    """P2PMOE_TEST_SEED or a fixed number; printed with the captured output of a failure."""
    value = int(os.environ.get("P2PMOE_TEST_SEED", "1802"))
    print(f"seed {value} (P2PMOE_TEST_SEED={value} repeats it)")
    record_property("seed", value)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """A command that a test runs in this process sets levels; the next test's log must not hang on them."""
    loggers = [logging.getLogger(name) for name in (None, "p2pmoe")]
    before = [each.level for each in loggers]
    yield
    for each, level in zip(loggers, before, strict=True):
        each.setLevel(level)


@pytest.fixture
def no_new_threads() -> Iterator[None]:
    """Fails when a thread that the test began is still there at its end."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5.0)
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()]
    assert not left, f"threads left behind: {left}"


@pytest.fixture(params=["memory", "https"])
def carrier(request: pytest.FixtureRequest) -> str:
    """One behaviour test, every network."""
    return str(request.param)
