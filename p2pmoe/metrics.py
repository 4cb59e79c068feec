"""The node's Prometheus metrics: names, labels and units in one place. Knows nothing of who measures.

Device threads write plain numbers (`PassStats`); a scrape turns them into metric families. A counter of the client
library costs a lock and a label look-up for every call, which a small expert would feel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Distribution:
    """A histogram that one thread writes."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((str(bound), total))
        family.add_metric(labels, buckets=buckets, sum_value=self._sum)


@dataclass(slots=True)
class PassStats:
    """One expert and pass; `outcomes` counts calls by "ok" or status code, `updates` optimizer steps,
    `rejected` backward calls that the gate kept from the optimizer, by reason, `clipped` those that it scaled down.
    """

    expert: str
    direction: str
    outcomes: Counter[str] = field(default_factory=Counter)
    updates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    clipped: int = 0
    queue_seconds: Distribution = field(default_factory=lambda: Distribution(_SECONDS))
    compute_seconds: Distribution = field(default_factory=lambda: Distribution(_SECONDS))
    batch_rows: Distribution = field(default_factory=lambda: Distribution(_ROWS))

    @property
    def labels(self) -> list[str]:
        return [self.expert, self.direction]


class NodeMetrics:
    """One registry a node, so that several nodes of one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._passes: dict[tuple[str, str], PassStats] = {}
        self.wire_bytes: Counter[tuple[str, str]] = Counter()
        """Tensor bytes by direction ("in", "out") and codec."""
        self._counts: list[tuple[str, str, str, Callable[[], Mapping[str, float]]]] = []
        self.registry.register(self)  # a collector is anything with collect()

    def __repr__(self) -> str:
        return f"<NodeMetrics: {len(self._passes)} passes>"

    def stats(self, expert: str, direction: str) -> PassStats:
        """The numbers of one expert and pass; made on first use."""
        return self._passes.setdefault((expert, direction), PassStats(expert, direction))

    def watch(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        gauge = Gauge(name, documentation, registry=self.registry)
        gauge.set_function(value)

    def watch_counts(
        self, name: str, documentation: str, label: str, values: Callable[[], Mapping[str, float]]
    ) -> None:
        """Counters that somebody else keeps, by the values of a label, read when they are scraped."""
        self._counts.append((name, documentation, label, values))

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        passes = list(self._passes.values())
        yield from self._counters(passes)
        yield self._wire()
        for name, documentation, label, values in self._counts:
            counter = CounterMetricFamily(name, documentation, labels=[label])
            for value, count in values().items():
                counter.add_metric([value], count)
            yield counter
        labels = ["expert", "pass"]
        for name, documentation, part in (
            ("p2pmoe_queue_seconds", "Wait of a batch's oldest call for the device.", "queue_seconds"),
            ("p2pmoe_compute_seconds", "Time of one batch on the device.", "compute_seconds"),
            ("p2pmoe_batch_size", "Rows of one batch.", "batch_rows"),
        ):
            family = HistogramMetricFamily(name, documentation, labels=labels)
            for stats in passes:
                getattr(stats, part).add_to(family, stats.labels)
            yield family

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    @staticmethod
    def _counters(passes: list[PassStats]) -> Iterator[Metric]:
        requests = CounterMetricFamily("p2pmoe_requests", "Calls answered.", labels=["expert", "pass", "outcome"])
        updates = CounterMetricFamily("p2pmoe_expert_updates", "Optimizer steps applied.", labels=["expert"])
        rejected = CounterMetricFamily(
            "p2pmoe_rejected_gradients", "Backward calls kept from the optimizer.", labels=["expert", "reason"]
        )
        clipped = CounterMetricFamily(
            "p2pmoe_clipped_gradients", "Backward calls whose gradients were scaled down.", labels=["expert"]
        )
        for stats in passes:
            for outcome, count in list(stats.outcomes.items()):
                requests.add_metric([*stats.labels, outcome], count)
            if stats.direction == "backward":
                updates.add_metric([stats.expert], stats.updates)
                clipped.add_metric([stats.expert], stats.clipped)
            for reason, count in list(stats.rejected.items()):
                rejected.add_metric([stats.expert, reason], count)
        yield from (requests, updates, rejected, clipped)

    def _wire(self) -> Metric:
        family = CounterMetricFamily("p2pmoe_wire_bytes", "Tensor bytes of calls.", labels=["direction", "codec"])
        for labels, count in list(self.wire_bytes.items()):
            family.add_metric(labels, count)
        return family
