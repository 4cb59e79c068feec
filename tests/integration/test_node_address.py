"""A node that listens on all addresses announces the one that most peers see it at."""

from __future__ import annotations

import asyncio

import p2pmoe
from p2pmoe.config import DHTConfig, ExpertsConfig, HttpConfig, NodeConfig


async def test_the_address_that_peers_see_is_announced_with_the_next_refresh():
    config = NodeConfig(
        http=HttpConfig(host="0.0.0.0"),
        dht=DHTConfig(refresh_s=0.1),
        experts=ExpertsConfig(uids=("nop.0",), kind="nop", hidden_dim=4),
    )
    async with p2pmoe.Node(config) as node:
        own = node.endpoint
        assert own.host not in {"0.0.0.0", "9.9.9.9"}
        for number in range(3):
            node.dht.observations.report((f"8.8.{number}.8", 1), ("9.9.9.9", 1), 0.0)
        assert (node.endpoint.host, node.endpoint.port) == ("9.9.9.9", own.port)
        async with asyncio.timeout(10):
            while [record.endpoint.host for record in await look(node)] != ["9.9.9.9"]:
                pass


async def look(node: p2pmoe.Node) -> list:
    assert node.directory is not None
    node.directory.invalidate()
    return await node.directory.find_experts("nop.*")
