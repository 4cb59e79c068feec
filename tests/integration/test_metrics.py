"""What a node tells Prometheus of those whom it turned away."""

from __future__ import annotations

import contextlib
import socket
import time

from prometheus_client.parser import text_string_to_metric_families
from swarm_kit import WAIT_S, make_backend

import p2pmoe


def scrape(node: p2pmoe.Node) -> dict[tuple[str, str], float]:
    """Values by name and the value of the only label."""
    text = node.metrics.render()[0].decode()
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def wait_for(node: p2pmoe.Node, wanted: dict[tuple[str, str], float]) -> None:
    """Until the node says at least this."""
    deadline = time.monotonic() + WAIT_S
    while any(scrape(node).get(key, -1.0) < value for key, value in wanted.items()):
        assert time.monotonic() < deadline, {key: scrape(node).get(key) for key in wanted}
        time.sleep(0.01)


def test_who_was_turned_away_is_counted_by_reason() -> None:
    limits = {"max_source_connections": 2, "handshake_timeout_s": 0.2, "http_head_timeout_s": 0.2}
    config = p2pmoe.NodeConfig.from_tree({"limits": limits})
    with p2pmoe.background_node(config, [make_backend("ffn.0")]) as node, contextlib.ExitStack() as stack:
        quiet = scrape(node)
        refused = "p2pmoe_connections_refused_total"
        assert [quiet[refused, each] for each in ("limit", "handshake", "deadline")] == [0, 0, 0]
        assert quiet["p2pmoe_connections", ""] == 0
        where = (node.endpoint.host, node.endpoint.port)
        for _ in range(3):
            with contextlib.suppress(ConnectionError):  # what is over the limit is reset, maybe before we look
                stack.enter_context(socket.create_connection(where, WAIT_S))
        wait_for(node, {(refused, "limit"): 1, (refused, "handshake"): 2})
        host, _, port = node.dht_address.rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"no datagram of ours", (host, int(port)))
        wait_for(node, {("p2pmoe_dht_datagrams_total", "malformed"): 1})
        now = scrape(node)
        assert now["p2pmoe_dht_datagrams_total", "in"] >= 1
        assert now["p2pmoe_dht_records_refused_total", "forged"] == 0
