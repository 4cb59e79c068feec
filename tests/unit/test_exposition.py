"""What a scrape shows, and that it does not grow with the experts."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from p2pmoe.errors import BadRequestError
from p2pmoe.metrics import MAX_LABELLED, MAX_PAGE, NodeMetrics
from p2pmoe.server.exposition import render_experts


def count(metrics: NodeMetrics, experts: int, *, calls: int = 3) -> NodeMetrics:
    """Experts ffn.0 … ffn.N, all of which have been called."""
    for index in range(experts):
        for direction in ("forward", "backward"):
            stats = metrics.stats(f"ffn.{index}", direction)
            stats.outcomes["ok"] += calls
            stats.queue_seconds.observe(0.3)
            stats.compute_seconds.observe(0.003)
            stats.batch_rows.observe(3)
            if direction == "backward":
                stats.updates += 2
                stats.rejected["outlier"] += 1
    return metrics


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Values by name and labels."""
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    assert len(lines) == len(found), "a series is there twice"
    return found


def test_a_small_node_counts_by_expert() -> None:
    found = samples(count(NodeMetrics(), 2).render()[0])
    assert found["p2pmoe_requests_total", (("expert", "ffn.1"), ("outcome", "ok"), ("pass", "forward"))] == 3
    assert found["p2pmoe_expert_updates_total", (("expert", "ffn.1"),)] == 2
    assert found["p2pmoe_rejected_gradients_total", (("expert", "ffn.0"), ("reason", "outlier"))] == 1
    assert found["p2pmoe_experts", ()] == 2


@pytest.mark.parametrize("experts", [2, MAX_LABELLED + 1])
def test_histograms_are_sums_over_all_experts(experts: int) -> None:
    found = samples(count(NodeMetrics(), experts).render()[0])
    for direction in ("forward", "backward"):
        label = ("pass", direction)
        assert found["p2pmoe_queue_seconds_count", (label,)] == experts
        assert found["p2pmoe_queue_seconds_sum", (label,)] == pytest.approx(0.3 * experts)
        assert found["p2pmoe_queue_seconds_bucket", (("le", "0.2"), label)] == 0
        assert found["p2pmoe_queue_seconds_bucket", (("le", "0.5"), label)] == experts
        assert found["p2pmoe_compute_seconds_bucket", (("le", "0.005"), label)] == experts
        assert found["p2pmoe_batch_size_bucket", (("le", "4"), label)] == experts
        assert found["p2pmoe_batch_size_bucket", (("le", "+Inf"), label)] == experts


def test_a_large_node_counts_in_all() -> None:
    experts = MAX_LABELLED + 1
    text = count(NodeMetrics(), experts).render()[0]
    found = samples(text)
    assert b"expert=" not in text
    assert found["p2pmoe_requests_total", (("outcome", "ok"), ("pass", "forward"))] == 3 * experts
    assert found["p2pmoe_expert_updates_total", ()] == 2 * experts
    assert found["p2pmoe_rejected_gradients_total", (("reason", "outlier"),)] == experts
    assert found["p2pmoe_experts", ()] == experts


def test_experts_that_were_never_called_take_no_buckets() -> None:
    metrics = NodeMetrics()
    metrics.stats("ffn.0", "forward")
    found = samples(metrics.render()[0])
    assert found["p2pmoe_queue_seconds_count", (("pass", "forward"),)] == 0
    assert metrics.stats("ffn.0", "forward").queue_seconds.counts == []


def test_names_of_strangers_are_no_expert() -> None:
    metrics = NodeMetrics()
    metrics.stats("unknown", "unknown").outcomes["404"] += 1
    found = samples(metrics.render()[0])
    assert found["p2pmoe_experts", ()] == 0
    assert found["p2pmoe_requests_total", (("expert", "unknown"), ("outcome", "404"), ("pass", "unknown"))] == 1
    assert ("p2pmoe_queue_seconds_count", (("pass", "unknown"),)) not in found


def test_single_experts_are_given_where_asked_for_page_by_page() -> None:
    metrics = count(NodeMetrics(), 300)
    seen: list[str] = []
    after, left = "", 300
    while left:
        found = samples(render_experts(metrics, "ffn.*", after)[0])
        page = sorted({labels[0][1] for name, labels in found if name == "p2pmoe_expert_updates_total"})
        assert 0 < len(page) <= MAX_PAGE
        for uid in page:
            label = ("expert", uid)
            assert found["p2pmoe_compute_seconds_count", (label, ("pass", "backward"))] == 1
            assert found["p2pmoe_requests_total", (label, ("outcome", "ok"), ("pass", "forward"))] == 3
        seen += page
        after = page[-1]
        left -= len(page)
        assert found["p2pmoe_experts_left_out", ()] == left
    assert seen == sorted(f"ffn.{index}" for index in range(300))


def test_what_was_not_asked_for_is_not_given() -> None:
    text = render_experts(count(NodeMetrics(), 20), "ffn.[3:5]", "")[0]
    found = samples(text)
    assert {labels[0][1] for name, labels in found if name == "p2pmoe_expert_updates_total"} == {"ffn.3", "ffn.4"}
    with pytest.raises(BadRequestError, match="pattern"):
        render_experts(NodeMetrics(), "no pattern", "")


def test_ten_thousand_experts_are_scraped_within_a_second_and_others_work_meanwhile() -> None:
    metrics = count(NodeMetrics(), 10_000)
    size, took, longest = 0, 0.0, 0.0
    done = threading.Event()

    def scrape() -> None:
        nonlocal size, took
        begin = time.thread_time()
        size = len(metrics.render()[0])
        took = time.thread_time() - begin
        done.set()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=scrape)
    thread.start()
    turns = 0
    try:
        sys.setswitchinterval(5.0)  # only what the thread gives away by itself counts
        while not done.is_set():
            begin = time.thread_time()
            done.wait(0.0005)
            longest = max(longest, time.thread_time() - begin)
            turns += 1
    finally:
        sys.setswitchinterval(interval)
    thread.join(10.0)
    assert size < 20_000
    assert took < 1.0, f"{took:.2f} s of computing"
    assert turns > 10, "the scrape kept the interpreter's lock"
