"""`scripts/bench`: the case whose figure does not depend on who else uses the machine."""

from __future__ import annotations

import json
import subprocess

from script_processes import run_script


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("benchmarks", *arguments, timeout_s=120)


def test_sixteen_experts_fit_in_one_process_and_little_more_memory_than_their_parameters() -> None:
    done = bench("memory", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    machine, memory = map(json.loads, done.stdout.splitlines())
    assert machine["case"] == "machine"
    assert memory["processes"] == 1
    assert 1.0 <= memory["ratio"] <= memory["demand_ratio"] == 1.3


def test_an_unknown_case_is_named() -> None:
    done = bench("memroy")
    assert done.returncode == 2
    assert "unknown case 'memroy'; known: nop_latency" in done.stderr
