"""What a stranger may ask a node for without a call: bounded documents, at a bounded rate, made once for all."""

from __future__ import annotations

import threading
from typing import Any

import aiohttp
import pytest
from swarm_kit import WAIT_S, make_backend, serve_http
from torch import nn

import p2pmoe
from p2pmoe.config import HttpConfig, LimitsConfig
from p2pmoe.metrics import NodeMetrics
from p2pmoe.rpc.expert_pages import follow_pages
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.rpc.http.server import HttpServer
from p2pmoe.server.exposition import render_experts
from p2pmoe.server.handlers import ExpertHandlers


def make_handlers(experts: int = 250) -> ExpertHandlers:
    backends = [make_backend(f"ffn.{index}", nn.Linear(4, 4)) for index in range(experts)]
    return ExpertHandlers(backends, [], metrics=NodeMetrics(), peer_id="a" * 32)


async def get(url: str, **options: Any) -> tuple[int, dict[str, Any], Any]:
    async with aiohttp.ClientSession() as session, session.get(url, **options) as response:
        return response.status, await response.json(content_type=None), response.headers


async def test_the_experts_of_a_node_are_read_page_by_page() -> None:
    with serve_http(make_handlers(250)) as (endpoint, _):
        transport, seen, pages = HttpTransport(), [], 0
        async for page in follow_pages(lambda path: transport.get_json(endpoint, path)):
            seen += list(page)
            pages += 1
        await transport.close()
        assert pages == 3
        assert seen == sorted(f"ffn.{index}" for index in range(250))
        status, document, _ = await get(f"{endpoint.url}/p2pmoe/v1/experts?limit=0")
        assert (status, "limit=N" in document["error"]) == (400, True)


async def test_documents_of_one_source_have_a_rate_and_health_has_none() -> None:
    limits = LimitsConfig(source_documents_per_s=0.5)  # five at once
    with serve_http(make_handlers(2), limits) as (endpoint, _):
        paths = ["/p2pmoe/v1/experts", "/p2pmoe/v1/experts/ffn.0", "/v2", "/v2/models/ffn.0", "/nowhere", "/v2"]
        replies = [await get(endpoint.url + path) for path in paths]
        assert [status for status, _, _ in replies] == [200, 200, 200, 200, 404, 429]
        _, document, headers = replies[-1]
        assert "over 0.5 documents a second" in document["error"]
        assert 1 <= int(headers["Retry-After"]) <= 2
        for _ in range(8):
            assert (await get(f"{endpoint.url}/v2/health/live"))[0] == 200


async def test_an_exchange_without_calls_counts_as_a_document() -> None:
    limits = LimitsConfig(source_documents_per_s=0.3)  # three at once
    with serve_http(make_handlers(1), limits) as (endpoint, _):
        async with aiohttp.ClientSession() as session:
            seen = []
            for _ in range(4):
                async with session.post(f"{endpoint.url}/p2pmoe/v1/exchange", data=b"") as response:
                    seen.append(response.status)
        assert seen == [200, 200, 200, 429]


class SlowlyReady:
    """A service whose readiness takes until the test lets it."""

    draining = False

    def __init__(self) -> None:
        self.asked = 0

    async def ready(self) -> bool:
        import asyncio

        self.asked += 1
        await asyncio.sleep(0.05)
        return True

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


async def test_readiness_is_found_out_once_for_all_who_ask() -> None:
    import asyncio

    service = SlowlyReady()
    with serve_http(service) as (endpoint, _):
        async with asyncio.timeout(WAIT_S):
            replies = await asyncio.gather(*(get(f"{endpoint.url}/v2/health/ready") for _ in range(20)))
        assert [status for status, _, _ in replies] == [200] * 20
        assert service.asked == 1


async def test_scrapes_are_made_on_a_thread_once_for_all_and_experts_where_asked_for() -> None:
    import asyncio

    metrics, threads = NodeMetrics(), []
    for index in range(70):
        metrics.stats(f"ffn.{index}", "forward").outcomes["ok"] += index

    def render() -> tuple[bytes, str]:
        threads.append(threading.current_thread().name)
        return metrics.render()

    server = HttpServer(
        make_handlers(1),
        HttpConfig(tls=False),
        LimitsConfig(),
        server_name="test",
        render_metrics=render,
        render_experts=lambda pattern, after: render_experts(metrics, pattern, after),
    )
    await server.start()
    try:
        url = f"http://127.0.0.1:{server.port}/metrics"

        async def scrape(query: str = "") -> tuple[int, str]:
            async with aiohttp.ClientSession() as session, session.get(url + query) as response:
                return response.status, await response.text()

        async with asyncio.timeout(WAIT_S):
            replies = await asyncio.gather(*(scrape() for _ in range(10)))
            assert len({text for _, text in replies}) == 1
            assert [status for status, _ in replies] == [200] * 10
            assert len(threads) == 1
            assert threads[0].startswith("p2pmoe-metrics")
            status, text = await scrape("?experts=ffn.[3:5]")
            assert status == 200
            assert 'p2pmoe_requests_total{expert="ffn.3",outcome="ok",pass="forward"} 3.0' in text
            assert "ffn.5" not in text
            status, text = await scrape("?experts=ffn.*&after=ffn.65")
            assert (status, "p2pmoe_experts_left_out 0.0" in text) == (200, True)
            for query in ("?experts=.", "?expert=ffn.0", "?after=ffn.0", "?experts=ffn.0&limit=9"):
                assert (await scrape(query))[0] == 400, query
    finally:
        await server.close()


@pytest.mark.parametrize("kept", ["p2pmoe_requests_total", "p2pmoe_queue_seconds", "p2pmoe_experts"])
def test_a_nodes_scrape_has_the_fields_names(kept: str) -> None:
    with p2pmoe.background_node(backends=[make_backend("ffn.0")]) as node, p2pmoe.Swarm([node.dht_address]) as swarm:
        import torch

        swarm.expert("ffn.0")(torch.ones(1, 4))
        assert kept in node.metrics.render()[0].decode()
