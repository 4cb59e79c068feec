"""`scripts/simulate` on a small network: the DHT's own code in virtual time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from script_processes import SCRIPTS, run_script


def simulate(*arguments: str, hash_seed: str = "1") -> list[dict]:
    done = run_script("simulation", *arguments, timeout_s=50, PYTHONHASHSEED=hash_seed)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_hundred_nodes_find_everything_and_a_seed_repeats_itself(tmp_path):
    print("seed 7")
    options = ["--nodes", "100", "--lookups", "60", "--seed", "7", "--loss", "0.1", "--mean-life", "300"]
    (first, _), (second, plot) = (
        simulate(*options, "--plot", str(tmp_path / f"{number}.png"), hash_seed=number) for number in "12"
    )
    assert first["success_percent"] == 100
    assert first["replicas"] > 7.5
    assert 1 <= first["hops"] <= 3 < first["requests"] < 30
    assert 0 < first["died"] < 60
    assert 159 < first["p50_ms"] < first["p99_ms"] < 5000
    del first["took_s"], second["took_s"]
    assert first == second
    assert Path(plot["plot"]).read_bytes().startswith(b"\x89PNG")


def test_the_fit_is_a_line_over_the_logarithm(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from simulation.growth import fit

    sizes = [100, 1000, 20_000]
    exact = fit(sizes, [2 + 0.5 * math.log2(size) for size in sizes])
    assert exact == {"per_doubling": 0.5, "intercept": 2.0, "r_squared": 1.0}
    assert fit(sizes, [float(size) for size in sizes])["r_squared"] < 0.9
    assert fit(sizes, [1.0, 1.0, 1.0])["per_doubling"] == 0


def test_virtual_time_jumps_and_being_stuck_is_said(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import asyncio

    from simulation.virtual_time import VirtualLoop

    async def wait_an_hour() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(wait_an_hour()) == pytest.approx(3600)
    with pytest.raises(RuntimeError, match="stuck"):
        _run_stuck(VirtualLoop())


def _run_stuck(loop) -> None:
    try:
        loop.run_until_complete(loop.create_future())
    finally:
        loop.close()
