"""`scripts/attack` against a node of its own: a fast part of the list, and that a failure is a failure."""

from __future__ import annotations

import json

import pytest
from script_processes import SCRIPTS, run_script

from p2pmoe.config import LimitsConfig


def run_attack(*arguments: str) -> tuple[int, list[dict]]:
    done = run_script("attacks", "--json", *arguments)
    assert done.stdout, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_at_least_forty_attacks_have_names_and_expectations():
    code, attacks = run_attack("--list")
    assert code == 0
    assert len(attacks) >= 40
    assert len({each["name"] for each in attacks}) == len(attacks)
    assert all(each["expects"] and each["does"] for each in attacks)


@pytest.mark.slow
def test_a_node_refuses_lying_frames_and_stolen_records_and_loses_nothing(tmp_path):
    patterns = (
        "frame_body*",
        "frame_zip*",
        "frame_good*",
        "replay_backward",
        "dht_theft*",
        "dht_rollback",
        "udp_empty",
    )
    code, (*results, summary) = run_attack(
        *(part for pattern in patterns for part in ("--only", pattern)), "--folder", str(tmp_path)
    )
    assert len(results) >= len(patterns)
    for result in results:
        assert result["refused"], result
        assert result["state_ok"], result
        assert result["honest_calls"] > 0, result
        assert result["honest_errors"] == 0, result
    assert summary["attacks"] == summary["refused"] == len(results)
    # Latency is judged by the script itself on a quiet machine; here other tests may be running.
    assert code == (0 if summary["passed"] else 1)
    assert (tmp_path / "node.log").read_text().count("Traceback") == 0


def test_what_is_not_refused_as_expected_fails(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from attacks.registry import Attack

    async def nothing(ctx) -> str:
        return "200"

    attack = Attack("name", "theme", "400 or closed", nothing, 1.0, once=False, limit_s=1.0, needs="")
    assert attack.is_refused("400")
    assert attack.is_refused("closed")
    assert not attack.is_refused("200")
    assert not attack.is_refused("400 ")


def test_losses_and_slowness_fail_a_result(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from attacks.runner import Result

    def result(**changes) -> Result:
        good = {
            "name": "a", "theme": "b", "sent": {}, "expected": "400", "seen": "400", "refused": True,
            "p50_quiet_ms": 1.0, "p50_ms": 2.9, "p99_ms": 9.0, "ratio": 2.9, "honest_calls": 9, "honest_errors": 0,
            "state_ok": True, "lost": [], "seconds": 0.6,
        }  # fmt: skip
        return Result(**(good | changes))

    assert result().passed
    for change in ({"ratio": 3.1}, {"ratio": None}, {"refused": False}, {"state_ok": False}, {"honest_errors": 1}):
        assert not result(**change).passed


@pytest.mark.slow
def test_a_private_node_knows_nobody_without_its_key():
    code, (*results, summary) = run_attack(
        "--only", "private_replayed*", "--only", "private_call*", "--only", "*_proof"
    )
    assert {each["name"] for each in results} >= {"private_replayed_datagram", "private_call_without_session"}
    for result in results:
        assert result["refused"], result
        assert result["state_ok"], result
        assert result["honest_calls"] > 0, result
        assert result["honest_errors"] == 0, result
    assert summary["attacks"] == len(results)
    assert code == (0 if summary["passed"] else 1)


def test_an_attack_goes_to_the_node_it_is_made_for(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from attacks.target import Target

    from p2pmoe.identity import SwarmKey

    opened = Target("127.0.0.1", 1, "https", "127.0.0.1:2", ())
    private = Target("127.0.0.1", 1, "https", "127.0.0.1:2", (), swarm_key=SwarmKey.generate())
    assert [opened.has(need) for need in ("", "tls", "plain", "private")] == [True, True, False, False]
    assert [private.has(need) for need in ("", "tls", "plain", "private")] == [False, False, False, True]


def test_summaries_of_two_nodes_become_one(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from attacks.runner import merge_summaries

    quiet = {"p50_quiet_ms": 1.0, "p50_quiet_after_ms": 1.5, "worst_ratio": 2.0, "honest_calls": 9, "honest_errors": 0}
    first = {"attacks": 2, "refused": 2, "state_lost": 0, "failed": [], "passed": True, **quiet}
    second = {**first, "refused": 1, "failed": ["a"], "passed": False, "worst_ratio": None, "p50_quiet_ms": 1.2}
    assert merge_summaries([first]) == first
    merged = merge_summaries([first, second])
    assert (merged["attacks"], merged["refused"], merged["failed"]) == (4, 3, ["a"])
    assert (merged["p50_quiet_ms"], merged["worst_ratio"]) == (1.2, 2.0)
    assert merged["passed"] is False


def test_a_node_that_runs_already_is_given_the_time_that_the_defaults_allow(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from attacks.registry import all_attacks
    from attacks.target import running_target

    target = running_target("https://127.0.0.1:1", "127.0.0.1:2", "p2pmoe")
    assert target.limits == LimitsConfig()
    slow = {each.name: each.limit_s for each in all_attacks() if each.name.startswith("slow_")}
    assert slow["slow_headers"] > target.limits.http_head_timeout_s
    assert slow["slow_body_drip"] > target.limits.slow_body_grace_s
    assert not target.has("own")
