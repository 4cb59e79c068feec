"""The node's Prometheus metrics: names, labels and units in one place. Knows nothing of who measures."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class NodeMetrics:
    """One registry a node, so that several nodes of one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        per_pool = ("expert", "pass")
        self.requests = Counter(
            "p2pmoe_requests", "Calls answered.", ("expert", "pass", "outcome"), registry=self.registry
        )
        self.running = Gauge("p2pmoe_requests_running", "Calls on a device.", registry=self.registry)
        self.waiting = Gauge("p2pmoe_requests_waiting", "Calls queued.", registry=self.registry)
        self.queue_seconds = Histogram(
            "p2pmoe_queue_seconds",
            "Wait from arrival to the device.",
            per_pool,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.compute_seconds = Histogram(
            "p2pmoe_compute_seconds",
            "Time of one batch on the device.",
            per_pool,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "p2pmoe_batch_size", "Rows of one batch.", per_pool, buckets=_ROWS, registry=self.registry
        )
        self.updates = Counter("p2pmoe_expert_updates", "Optimizer steps applied.", ("expert",), registry=self.registry)
        self.dht_peers = Gauge("p2pmoe_dht_peers", "Peers in the routing table.", registry=self.registry)
        self.wire_bytes = Counter(
            "p2pmoe_wire_bytes", "Tensor bytes of calls and results.", ("direction", "codec"), registry=self.registry
        )

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
