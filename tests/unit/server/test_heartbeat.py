"""The line a minute, and how far the experts are."""

from __future__ import annotations

import asyncio
import logging

import pytest

from p2pmoe.cli.logs import TextFormatter
from p2pmoe.config import LimitsConfig, NodeConfig
from p2pmoe.errors import ConfigError
from p2pmoe.metrics import NodeMetrics
from p2pmoe.server.heartbeat import Heartbeat, describe_experts
from p2pmoe.server.quota import CallerQuota


def test_a_line_says_what_came_since_the_last_one(caplog: pytest.LogCaptureFixture) -> None:
    now, asked = [100.0], []

    def show(since: float) -> dict[str, int]:
        asked.append(since)
        return {"callers": 3}

    heartbeat = Heartbeat(60.0, dict, show, clock=lambda: now[0])
    with caplog.at_level(logging.INFO):
        for now[0], counts in [(160.0, {"calls": 10, "updates": 4}), (221.0, {"calls": 25, "updates": 4}), (281.0, {})]:
            heartbeat.beat(counts)
    lines = [TextFormatter().format(each).partition("heartbeat: ")[2] for each in caplog.records]
    assert lines[:2] == [
        "in the last 60 s calls=10 updates=4 callers=3 up_s=60",
        "in the last 61 s calls=15 updates=0 callers=3 up_s=121",
    ]
    assert asked == [100.0, 160.0, 221.0]


async def test_it_beats_until_it_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    counted = asyncio.Event()
    loop = asyncio.get_running_loop()

    def count() -> dict[str, int]:
        loop.call_soon_threadsafe(counted.set)
        return {"calls": 1}

    beating = asyncio.create_task(Heartbeat(0.001, count, lambda _: {}).run())
    async with asyncio.timeout(5):
        await counted.wait()
    beating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beating


def test_calls_are_summed_up_over_experts_and_passes() -> None:
    metrics = NodeMetrics()
    metrics.stats("ffn.0", "forward").outcomes.update({"ok": 5, "429": 2})
    metrics.stats("ffn.0", "backward").outcomes.update({"ok": 3, "500": 1})
    metrics.stats("ffn.0", "backward").updates = 2
    metrics.stats("ffn.1", "forward").outcomes.update({"ok": 1})
    assert metrics.totals() == {"calls": 12, "updates": 2, "refused": 2, "failed": 1}


def test_callers_are_those_who_called_since() -> None:
    now = [0.0]
    quota = CallerQuota(LimitsConfig(), clock=lambda: now[0])
    for now[0], who in [(1.0, "alice"), (2.0, "bob"), (3.0, "alice"), (4.0, "carol")]:
        quota.count_call(who)
    assert [quota.active_since(each) for each in (0.0, 2.5, 3.5, 5.0)] == [3, 2, 1, 0]


def test_experts_with_as_many_updates_stand_together() -> None:
    assert describe_experts([]) == ""
    updates = [(f"ffn.{row}.{column}", 7 if row else 0) for row in range(2) for column in range(4)]
    assert describe_experts(updates) == "ffn.0.[0:4]: 0 updates, ffn.1.[0:4]: 7 updates"
    assert describe_experts([("b.10", 1), ("b.2", 1), ("a.0", 1)]) == "a.0: 1 update, b.2: 1 update, b.10: 1 update"
    many = describe_experts([(f"ffn.{each}", each) for each in range(100)])
    assert many.endswith("ffn.7: 7 updates, … 100 groups in all")
    assert describe_experts([("no uid", 1)]) == ""


def test_the_pause_is_a_setting_that_can_be_switched_off() -> None:
    assert NodeConfig().log.heartbeat_s == 60.0
    assert NodeConfig.parse("[log]\nheartbeat_s = false").log.heartbeat_s is None
    with pytest.raises(ConfigError, match=r"log\.heartbeat_s"):
        NodeConfig.parse("[log]\nheartbeat_s = 0")
