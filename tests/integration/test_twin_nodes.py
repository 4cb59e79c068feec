"""Real nodes that are given the uids of another: they wait, take over when it has gone, and never share its updates."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from swarm_kit import make_backend, until

import p2pmoe
from p2pmoe.cli.node import describe
from p2pmoe.errors import PeerUnreachableError
from p2pmoe.server import announcer

UIDS = ("ffn.0.0", "ffn.0.1")
WITHIN_S = 20.0


@pytest.fixture
async def nodes() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack, asyncio.timeout(60):
        yield stack


def make_node(peer: str = "", *uids: str, experts: dict[str, Any] | None = None, **settings: Any) -> p2pmoe.Node:
    """Records of this node live for seconds."""
    dht = {"initial_peers": [peer] if peer else [], "ttl_s": 3.0, "refresh_s": 0.5}
    config = p2pmoe.NodeConfig.from_tree({"dht": dht, "experts": experts or {}, **settings})
    return p2pmoe.Node(config, [make_backend(uid) for uid in uids])


async def providers(node: p2pmoe.Node) -> Counter[str]:
    """How many nodes announce each uid."""
    assert node.directory is not None
    node.directory.invalidate()
    return Counter(record.uid for record in await node.directory.find_experts("ffn."))


async def until_there_are(expected: dict[str, int], node: p2pmoe.Node) -> None:
    async with asyncio.timeout(WITHIN_S):
        while await providers(node) != expected:  # noqa: ASYNC110 - the records are elsewhere
            await asyncio.sleep(0.05)


def announcer_of(node: p2pmoe.Node) -> announcer.Announcer:
    assert node.announcer is not None
    return node.announcer


async def test_the_newcomer_waits_and_takes_over(nodes: AsyncExitStack, caplog: pytest.LogCaptureFixture) -> None:
    hub = await nodes.enter_async_context(make_node())
    alice = make_node(hub.dht_address, *UIDS)
    await alice.start()
    nodes.push_async_callback(alice.close)
    bob = await nodes.enter_async_context(make_node(hub.dht_address, *UIDS, "ffn.1.0"))
    assert describe(bob, "")["waiting"] == list(UIDS)
    assert announcer_of(bob).waiting == list(UIDS)
    assert await providers(hub) == {"ffn.0.0": 1, "ffn.0.1": 1, "ffn.1.0": 1}
    said = [line for line in caplog.messages if "2 of 3 experts wait" in line]
    assert len(said) == 1
    assert f"peer {alice.peer_id}" in said[0]

    async with p2pmoe.Swarm(initial_peers=[hub.dht_address]) as swarm:
        for uid in UIDS:
            y = await swarm.expert(uid).acall(torch.randn(2, 4, requires_grad=True))
            await asyncio.to_thread(y.sum().backward)
    assert [backend.update_count for backend in alice.backends] == [1, 1]
    assert [backend.update_count for backend in bob.backends] == [0, 0, 0]

    await alice.close()
    await until(lambda: not announcer_of(bob).waiting)
    await until_there_are({"ffn.0.0": 1, "ffn.0.1": 1, "ffn.1.0": 1}, hub)


async def test_two_that_start_at_once_end_with_one_provider_each(
    nodes: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcer, "_SETTLE_S", 0.3)
    hub = await nodes.enter_async_context(make_node())
    twins = [make_node(hub.dht_address, *UIDS) for _ in range(3)]
    await asyncio.gather(*(nodes.enter_async_context(each) for each in twins))
    await until(lambda: not any(announcer_of(each).is_settling for each in twins))
    await until_there_are(dict.fromkeys(UIDS, 1), hub)
    assert Counter(uid for each in twins for uid in announcer_of(each).waiting) == dict.fromkeys(UIDS, 2)


async def test_a_restart_with_the_same_key_is_no_twin(
    nodes: AsyncExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(uids: list[str]) -> None:
        raise PeerUnreachableError("cut off")

    hub = await nodes.enter_async_context(make_node())
    settings = {"identity_path": str(tmp_path / "key.pem")}
    first = make_node(hub.dht_address, *UIDS, **settings)
    await first.start()
    assert first.directory is not None
    monkeypatch.setattr(first.directory, "withdraw", failing)  # as after SIGKILL its records stay
    await first.close()
    assert await providers(hub) == {"ffn.0.0": 1, "ffn.0.1": 1}
    second = await nodes.enter_async_context(make_node(hub.dht_address, *UIDS, **settings))
    assert announcer_of(second).waiting == []


async def test_replicas_on_purpose(nodes: AsyncExitStack, caplog: pytest.LogCaptureFixture) -> None:
    hub = await nodes.enter_async_context(make_node())
    for _ in range(2):
        await nodes.enter_async_context(make_node(hub.dht_address, *UIDS, experts={"twins": "serve"}))
    assert await providers(hub) == {"ffn.0.0": 2, "ffn.0.1": 2}
    assert not [line for line in caplog.messages if "wait" in line]


async def test_the_older_says_that_a_twin_turned_up(
    nodes: AsyncExitStack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(announcer, "_SETTLE_S", 0.1)
    hub = await nodes.enter_async_context(make_node())
    alice = await nodes.enter_async_context(make_node(hub.dht_address, *UIDS))
    await until(lambda: not announcer_of(alice).is_settling)
    twin = await nodes.enter_async_context(make_node(hub.dht_address, "ffn.0.1", experts={"twins": "serve"}))
    expected = f"peer {twin.peer_id} at {twin.endpoint} serves ffn.0.1 as well, and came later"
    await until(lambda: any(line.startswith(expected) for line in caplog.messages))
    assert (await providers(hub))["ffn.0.1"] == 2
