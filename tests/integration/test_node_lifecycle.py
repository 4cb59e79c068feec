"""A node starts, stops, fails to start, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from swarm_kit import WAIT_S, Gate, grid_backends, make_backend, same_bits, until

import p2pmoe
from p2pmoe.errors import (
    AddressInUseError,
    BootstrapError,
    ClosedError,
    ConfigError,
    DrainingError,
    ExpertNotFoundError,
    IdentityError,
    InvalidUidError,
    PeerUnreachableError,
)


def config(**tree: Any) -> p2pmoe.NodeConfig:
    return p2pmoe.NodeConfig.from_tree(tree)


def held() -> tuple[int, int, int]:
    """Threads, file descriptors and sockets of this process."""
    gc.collect()
    process = psutil.Process()
    descriptors = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    return threading.active_count(), descriptors, len(process.net_connections("inet"))


def start_call_stop() -> None:
    backend = make_backend("ffn.0", lr=0.0)
    x = torch.randn(2, 4)
    with (
        p2pmoe.background_node(config(), [backend]) as node,
        p2pmoe.Swarm(initial_peers=[node.dht_address]) as swarm,
    ):
        assert same_bits(swarm.expert("ffn.0")(x), backend.expert(x))


@pytest.mark.timeout(100)
def test_twenty_starts_and_stops_leave_nothing_behind() -> None:
    start_call_stop()  # imports, pools and caches of the first time
    before = held()
    for _ in range(20):
        start_call_stop()
    deadline = time.monotonic() + 3.0
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, f"threads, descriptors, sockets: {before} grew to {held()}"
        time.sleep(0.05)  # the system closes some of them a little later


async def test_a_node_says_who_and_where_it_is() -> None:
    node = p2pmoe.Node(config(), [make_backend("ffn.0")])
    assert "not started" in repr(node)
    for name in ("peer_id", "dht_address", "endpoint", "dht"):
        with pytest.raises(ClosedError, match="async with"):
            getattr(node, name)
    async with node:
        assert len(node.peer_id) == 32
        host, _, port = node.dht_address.rpartition(":")
        assert (host, int(port) > 0) == ("127.0.0.1", True)
        assert node.endpoint.url.startswith("https://127.0.0.1:")
        assert node.endpoint.public_key is not None
        assert "1 experts" in repr(node)
    await node.close()
    await node.close(drain=False)


async def test_two_nodes_find_each_other_in_one_process() -> None:
    async with asyncio.timeout(30), p2pmoe.Node(config(), grid_backends([0])) as alice:
        join = config(dht={"initial_peers": [alice.dht_address]})
        async with p2pmoe.Node(join, grid_backends([1])) as bob:
            assert alice.peer_id != bob.peer_id
            async with p2pmoe.Swarm(initial_peers=[bob.dht_address]) as swarm:
                found = await swarm.find_experts_async("ffn.*")
                assert [record.uid for record in found] == ["ffn.0.0", "ffn.0.1", "ffn.1.0", "ffn.1.1"]
                assert {record.peer_id for record in found} == {alice.peer_id, bob.peer_id}
                document = await swarm.run_async(swarm.transport.get_json(alice.endpoint, "/v2"))
                assert (document["name"], document["version"]) == ("p2pmoe", p2pmoe.__version__)


async def test_a_node_that_leaves_is_no_longer_found() -> None:
    async with asyncio.timeout(30), p2pmoe.Node(config()) as alice:
        join = config(dht={"initial_peers": [alice.dht_address]})
        bob = p2pmoe.Node(join, [make_backend("ffn.0")])
        await bob.start()
        async with p2pmoe.Swarm(initial_peers=[alice.dht_address]) as swarm:
            assert len(await swarm.find_experts_async("ffn.*")) == 1
        await bob.close()
        async with p2pmoe.Swarm(initial_peers=[alice.dht_address]) as swarm:
            assert await swarm.find_experts_async("ffn.*") == []
            with pytest.raises(ExpertNotFoundError):
                await swarm.expert("ffn.0").acall(torch.ones(1, 4))


async def test_running_calls_end_before_the_node_leaves() -> None:
    gate = Gate()
    node = p2pmoe.Node(config(), [make_backend("gate.0", gate), make_backend("ffn.0")])
    async with asyncio.timeout(30):
        await node.start()
        async with p2pmoe.Swarm(initial_peers=[node.dht_address]) as swarm:
            expert, other = swarm.expert("gate.0"), swarm.expert("ffn.0", forward_timeout_s=1.0)
            await expert.acall(torch.ones(1, 4))
            await other.acall(torch.ones(1, 4))
            gate.armed = True
            running = asyncio.create_task(expert.acall(torch.ones(1, 4)))
            await until(gate.begun.is_set)
            closing = asyncio.create_task(node.close())
            await until(lambda: node.handlers is not None and node.handlers.draining)
            with pytest.raises((DrainingError, PeerUnreachableError, ExpertNotFoundError)):
                await other.acall(torch.ones(1, 4))
            gate.go.set()
            assert (await running).shape == (1, 4)
            await closing


async def test_a_node_does_not_wait_longer_than_it_may() -> None:
    gate = Gate()
    node = p2pmoe.Node(config(http={"drain_timeout_s": 0.2}), [make_backend("gate.0", gate)])
    async with asyncio.timeout(30):
        await node.start()
        async with p2pmoe.Swarm(initial_peers=[node.dht_address]) as swarm:
            expert = swarm.expert("gate.0", forward_timeout_s=3.0)  # so long it waits for the node to come back
            await expert.acall(torch.ones(1, 4))
            gate.armed = True
            running = asyncio.create_task(expert.acall(torch.ones(1, 4)))
            await until(gate.begun.is_set)
            started = time.monotonic()
            closing = asyncio.create_task(node.close())
            with pytest.raises((PeerUnreachableError, DrainingError, ExpertNotFoundError)):
                await running
            gate.go.set()
            await closing
            assert time.monotonic() - started < 8.0


@pytest.mark.parametrize("room", ["http", "dht"])
async def test_a_port_in_use_is_one_clear_error_and_nothing_stays(room: str) -> None:
    kind = socket.SOCK_STREAM if room == "http" else socket.SOCK_DGRAM
    threads = set(threading.enumerate())
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if room == "http":
            taken.listen()
        port = taken.getsockname()[1]
        node = p2pmoe.Node(config(**{room: {"port": port}}), [make_backend("ffn.0")])
        with pytest.raises(AddressInUseError, match=str(port)):
            await node.start()
    await until(lambda: not [t for t in set(threading.enumerate()) - threads if t.name.startswith("p2pmoe")])


@pytest.mark.parametrize(
    ("tree", "error"),
    [
        ({"dht": {"initial_peers": ["127.0.0.1:1"], "join_timeout_s": 0.3}}, BootstrapError),
        ({"dht": {"initial_peers": ["nonsense"]}}, ConfigError),
        ({"experts": {"uids": ["ffn.[0:"]}}, InvalidUidError),
        ({"experts": {"uids": ["ffn.0"], "kind": "who"}}, ConfigError),
        ({"devices": ["warp"], "experts": {"uids": ["ffn.0"]}}, ConfigError),
        ({"http": {"host": "203.0.113.77"}}, AddressInUseError),
    ],
)
async def test_a_node_that_cannot_start_leaves_nothing(tree: dict[str, Any], error: type[Exception]) -> None:
    threads = set(threading.enumerate())
    async with asyncio.timeout(20):
        with pytest.raises(error):
            await p2pmoe.Node(config(**tree), [make_backend("mine.0")]).start()
    await until(lambda: not [t for t in set(threading.enumerate()) - threads if t.name.startswith("p2pmoe")])


async def test_two_experts_of_one_uid_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ffn\.0"):
        await p2pmoe.Node(config(), [make_backend("ffn.0"), make_backend("ffn.0")]).start()


def test_the_identity_is_kept_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    ids = []
    for _ in range(2):
        with p2pmoe.background_node(config(identity_path=str(path))) as node:
            ids.append(node.peer_id)
    assert ids[0] == ids[1]
    path.write_text("no key")
    with pytest.raises(IdentityError, match=r"key\.pem"), p2pmoe.background_node(config(identity_path=str(path))):
        pass


def test_background_node_raises_what_the_start_raises() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = config(http={"port": taken.getsockname()[1]})
        with pytest.raises(AddressInUseError), p2pmoe.background_node(settings):
            pass


def test_an_error_in_the_body_of_background_node_comes_out_and_the_node_ends() -> None:
    with pytest.raises(ZeroDivisionError), p2pmoe.background_node(config(), [make_backend("ffn.0")]) as node:
        raise ZeroDivisionError
    with contextlib.closing(socket.socket()) as probe:
        assert probe.connect_ex((node.endpoint.host, node.endpoint.port)) != 0


def test_experts_by_configuration_are_served() -> None:
    tree = {"experts": {"uids": ["ffn.[0:2].[0:2]"], "hidden_dim": 8, "seed": 1}, "optimizer": {"name": "sgd"}}
    with p2pmoe.background_node(config(**tree)) as node:
        assert [backend.name for backend in node.backends] == ["ffn.0.0", "ffn.0.1", "ffn.1.0", "ffn.1.1"]
        with p2pmoe.Swarm(initial_peers=[node.dht_address]) as swarm:
            x = torch.randn(3, 8, requires_grad=True)
            swarm.expert("ffn.1.0")(x).sum().backward()
        assert node.backends[2].update_count == 1


def test_a_node_without_experts_is_a_bootstrap_peer() -> None:
    with p2pmoe.background_node() as node:
        assert node.backends == []
        with p2pmoe.Swarm(initial_peers=[node.dht_address], timeout_s=WAIT_S) as swarm:
            assert swarm.find_experts("ffn.*") == []


async def test_backends_may_serve_again_after_a_restart() -> None:
    backend = make_backend("ffn.0")
    async with asyncio.timeout(30):
        for step in range(2):
            async with (
                p2pmoe.Node(config(), [backend]) as node,
                p2pmoe.Swarm(initial_peers=[node.dht_address]) as swarm,
            ):
                y = await swarm.expert("ffn.0").acall(torch.ones(1, 4))
                await asyncio.to_thread(y.sum().backward)
            assert backend.update_count == step + 1
