"""The node's Prometheus metrics: names, labels and units in one place. Knows nothing of who measures.

Device threads write plain numbers (`PassStats`); a scrape turns them into metric families. A counter of the client
library costs a lock and a label look-up for every call, which a small expert would feel.

What a scrape costs does not grow with the experts (docs/adr/0019-pages-and-aggregates.md):

1. Histograms have the label `pass` and are sums over all experts.
2. Counters have the label `expert` where a node hosts 256 experts at most; beyond that they are sums too, without it.
3. Who wants an expert's own numbers asks for them (`render_experts`), 64 experts at a time.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric, Sample
from prometheus_client.exposition import CONTENT_TYPE_LATEST

T = TypeVar("T")
UNKNOWN: Final = "unknown"
"""What stands for names that no expert has."""

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

MAX_LABELLED: Final = 256
"""Experts that have counters of their own in every scrape."""
MAX_PAGE: Final = 64
"""Experts whose every number is given at a time."""
_CHUNK: Final = 64
_WORK_S: Final = 0.001


class Distribution:
    """A histogram that one thread writes."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts: list[int] = []  # none at first: most experts of a large node never have a call
        self.total = 0.0

    def observe(self, value: float) -> None:
        if not self.counts:
            self.counts = [0] * (len(self._bounds) + 1)
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def add(self, others: Iterable[Distribution]) -> None:
        """Add what others of the same bounds have counted."""
        used = [each for each in (self, *others) if each.counts]
        self.counts = [sum(column) for column in zip(*(each.counts for each in used), strict=True)]
        self.total = sum(each.total for each in used)

    def add_to(self, family: HistogramMetricFamily, labels: list[str]) -> None:
        total, buckets = 0, []
        counts = self.counts or [0] * (len(self._bounds) + 1)
        for bound, count in zip((*self._bounds, "+Inf"), counts, strict=True):
            total += count
            buckets.append((str(bound), total))
        family.add_metric(labels, buckets=buckets, sum_value=self.total)


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
        self._experts: set[str] = set()
        self.wire_bytes: Counter[tuple[str, str]] = Counter()
        """Tensor bytes by direction ("in", "out") and codec."""
        self._counts: list[tuple[str, str, str, Callable[[], Mapping[str, float]]]] = []
        self.registry.register(self)  # a collector is anything with collect()

    def __repr__(self) -> str:
        return f"<NodeMetrics: {len(self._passes)} passes>"

    def stats(self, expert: str, direction: str) -> PassStats:
        """The numbers of one expert and pass; made on first use."""
        known = self._passes.get((expert, direction))
        if known is None:
            known = self._passes.setdefault((expert, direction), PassStats(expert, direction))
            self._experts.add(expert)
        return known

    def watch(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        gauge = Gauge(name, documentation, registry=self.registry)
        gauge.set_function(value)

    def watch_counts(
        self, name: str, documentation: str, label: str, values: Callable[[], Mapping[str, float]]
    ) -> None:
        """Counters that somebody else keeps, by the values of a label, read when they are scraped."""
        self._counts.append((name, documentation, label, values))

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client: everything but single experts' numbers, see the rules above."""
        pace = Pace()
        passes = list(self._passes.values())
        yield from _counters(passes, pace) if len(self._experts) <= MAX_LABELLED else _sums(passes, pace)
        hosted = GaugeMetricFamily("p2pmoe_experts", "Experts hosted.")
        hosted.add_metric([], len(self._experts - {UNKNOWN}))
        yield hosted
        yield self._wire()
        for name, documentation, label, values in self._counts:
            counter = CounterMetricFamily(name, documentation, labels=[label])
            for value, count in values().items():
                counter.add_metric([value], count)
            yield counter
        yield from _histograms(_by_direction(passes), pace, labels=["pass"])

    def totals(self) -> dict[str, int]:
        """Calls, optimizer steps, refused and failed calls of all experts since the start. For any thread."""
        calls = updates = refused = failed = 0
        for stats in _paced(list(self._passes.values()), Pace()):
            updates += stats.updates
            for outcome, count in list(stats.outcomes.items()):
                calls += count
                if outcome != "ok":
                    failed, refused = (failed + count, refused) if outcome == "500" else (failed, refused + count)
        return {"calls": calls, "updates": updates, "refused": refused, "failed": failed}

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type. For any thread; lets the others work, see `Pace`."""
        return generate_latest(_Paced(self.registry.collect())), CONTENT_TYPE_LATEST

    def render_experts(self, wanted: Callable[[str], bool], after: str = "") -> tuple[bytes, str]:
        """Every number of the first 64 experts behind `after` that are wanted, with their labels.

        `p2pmoe_experts_left_out` says how many more there are behind them.
        """
        pace = Pace()
        names = sorted(name for name in _paced(tuple(self._experts), pace) if name > after and wanted(name))
        shown = set(names[:MAX_PAGE])
        passes = [stats for stats in list(self._passes.values()) if stats.expert in shown]
        left_out = GaugeMetricFamily("p2pmoe_experts_left_out", "Experts that were asked for and follow behind these.")
        left_out.add_metric([], max(0, len(names) - MAX_PAGE))
        groups = [([stats.expert, stats.direction], [stats]) for stats in passes]
        families = chain(_counters(passes, pace), _histograms(groups, pace, labels=["expert", "pass"]), [left_out])
        return generate_latest(_Paced(families)), CONTENT_TYPE_LATEST

    def _wire(self) -> Metric:
        family = CounterMetricFamily("p2pmoe_wire_bytes", "Tensor bytes of calls.", labels=["direction", "codec"])
        for labels, count in list(self.wire_bytes.items()):
            family.add_metric(labels, count)
        return family


class Pace:
    """Called between small pieces of work: after a millisecond of it, sleeps one.

    A thread that computes keeps the interpreter's lock for 5 ms at a time from others who want it, and an event loop
    wants it several times for one call.
    """

    def __init__(self) -> None:
        self._rested_at = time.perf_counter()

    def __call__(self) -> None:
        if time.perf_counter() - self._rested_at > _WORK_S:
            time.sleep(_WORK_S)
            self._rested_at = time.perf_counter()


class _Paced:
    """Families whose samples are formatted at a pace."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            family.samples = _PacedList(family.samples)
            yield family


class _PacedList(list[Sample]):
    def __iter__(self) -> Iterator[Sample]:
        return _paced(super().__iter__(), Pace())


def _paced(items: Iterable[T], pace: Callable[[], None]) -> Iterator[T]:
    for index, item in enumerate(items):
        if not index % _CHUNK:
            pace()
        yield item


def _chunks(passes: Sequence[PassStats], pace: Callable[[], None]) -> Iterator[Sequence[PassStats]]:
    for start in range(0, len(passes), _CHUNK):
        pace()
        yield passes[start : start + _CHUNK]


def _by_direction(passes: Iterable[PassStats]) -> list[tuple[list[str], list[PassStats]]]:
    groups: dict[str, list[PassStats]] = {}
    for stats in passes:
        if stats.expert != UNKNOWN:
            groups.setdefault(stats.direction, []).append(stats)
    return [([direction], group) for direction, group in groups.items()]


def _histograms(
    groups: Sequence[tuple[list[str], list[PassStats]]], pace: Callable[[], None], labels: list[str]
) -> Iterator[Metric]:
    """Of each group one histogram that sums up its passes."""
    for name, documentation, part, bounds in (
        ("p2pmoe_queue_seconds", "Wait of a batch's oldest call for the device.", "queue_seconds", _SECONDS),
        ("p2pmoe_compute_seconds", "Time of one batch on the device.", "compute_seconds", _SECONDS),
        ("p2pmoe_batch_size", "Rows of one batch.", "batch_rows", _ROWS),
    ):
        family = HistogramMetricFamily(name, documentation, labels=labels)
        for values, passes in groups:
            total = Distribution(bounds)
            for chunk in _chunks(passes, pace):
                total.add(getattr(stats, part) for stats in chunk)
            total.add_to(family, values)
        yield family


def _counters(passes: Sequence[PassStats], pace: Callable[[], None]) -> Iterator[Metric]:
    requests, updates, rejected, clipped = _counter_families(by_expert=True)
    for stats in _paced(passes, pace):
        for outcome, count in list(stats.outcomes.items()):
            requests.add_metric([*stats.labels, outcome], count)
        if stats.direction == "backward":
            updates.add_metric([stats.expert], stats.updates)
            clipped.add_metric([stats.expert], stats.clipped)
        for reason, count in list(stats.rejected.items()):
            rejected.add_metric([stats.expert, reason], count)
    yield from (requests, updates, rejected, clipped)


def _sums(passes: Sequence[PassStats], pace: Callable[[], None]) -> Iterator[Metric]:
    requests, updates, rejected, clipped = _counter_families(by_expert=False)
    outcomes: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    steps = scaled = 0
    for stats in _paced(passes, pace):
        for outcome, count in list(stats.outcomes.items()):
            outcomes[stats.direction, outcome] += count
        for reason, count in list(stats.rejected.items()):
            reasons[reason] += count
        steps += stats.updates
        scaled += stats.clipped
    for labels, count in outcomes.items():
        requests.add_metric(labels, count)
    updates.add_metric([], steps)
    clipped.add_metric([], scaled)
    for reason, count in reasons.items():
        rejected.add_metric([reason], count)
    yield from (requests, updates, rejected, clipped)


def _counter_families(*, by_expert: bool) -> tuple[CounterMetricFamily, ...]:
    label = ["expert"] if by_expert else []
    return (
        CounterMetricFamily("p2pmoe_requests", "Calls answered.", labels=[*label, "pass", "outcome"]),
        CounterMetricFamily("p2pmoe_expert_updates", "Optimizer steps applied.", labels=label),
        CounterMetricFamily(
            "p2pmoe_rejected_gradients", "Backward calls kept from the optimizer.", labels=[*label, "reason"]
        ),
        CounterMetricFamily("p2pmoe_clipped_gradients", "Backward calls with gradients scaled down.", labels=label),
    )
