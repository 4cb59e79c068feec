"""What every test has: a seed that a failure prints, and a quiet end of every thread it began."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

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
