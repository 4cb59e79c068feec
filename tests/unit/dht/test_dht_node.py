"""A node's life: start, join, call from anywhere, close; ports, state on disk, what it says when it cannot."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import pytest
from dht_swarm import identity_of

from p2pmoe.config import DHTConfig
from p2pmoe.dht.addresses import bind, client_host, has_ipv6
from p2pmoe.dht.loop_thread import LoopThread
from p2pmoe.dht.node import DHTNode
from p2pmoe.dht.observations import Observations
from p2pmoe.dht.state_file import MAX_STATE_BYTES, SavedState, load_state, save_state
from p2pmoe.errors import AddressInUseError, BootstrapError, ClosedError, ConfigError, EncodeError

PREFIX = "ffn."


@pytest.fixture
def start_node():
    nodes: list[DHTNode] = []

    def start(name: str, *, wait_for_peers: bool = True, client_mode: bool = False, **config) -> DHTNode:
        node = DHTNode(identity_of(name), DHTConfig(**config), client_mode=client_mode)
        nodes.append(node)
        node.start(wait_for_peers=wait_for_peers)
        return node

    yield start
    for node in nodes:
        node.close()


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def dht_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("p2pmoe-dht")]


async def test_put_and_get_between_nodes_and_a_client(start_node):
    alice = start_node("alice")
    bob = start_node("bob", initial_peers=(alice.dht_address,))
    carol = start_node("carol", initial_peers=(bob.dht_address,), client_mode=True)
    assert await bob.put(PREFIX, [b"zero", b"one"]) == 2
    assert await carol.put(PREFIX, {3: b"three"}, ttl_s=5) == 2
    for node in (alice, bob, carol):
        assert {(r.part, r.value) for r in await node.get(PREFIX)} == {(0, b"zero"), (1, b"one"), (3, b"three")}
    stats = carol.stats()
    assert (stats.peers, stats.records, stats.joined, stats.client_mode) == (2, 0, True, True)
    assert stats.datagrams_in > 0 < stats.lookups
    assert alice.stats().records == 3
    assert "client" in repr(carol)


async def test_another_swarm_sees_nothing(start_node):
    alice = start_node("alice")
    with pytest.raises(BootstrapError):
        start_node("bob", initial_peers=(alice.dht_address,), swarm_id="other", join_timeout_s=0.4)


async def test_many_prefixes_at_once(start_node):
    alice = start_node("alice")
    bob = start_node("bob", initial_peers=(alice.dht_address,))
    taken = await bob.put_many({f"p{number}.": {0: b"x"} for number in range(100)})
    assert set(taken.values()) == {2}


async def test_our_own_mistakes(start_node):
    alice = start_node("alice")
    for values in ([bytes(901)], {8: b"x"}):
        with pytest.raises(EncodeError):
            await alice.put(PREFIX, values)


async def test_start_and_stop_in_a_loop_on_one_port_leaves_nothing_behind(start_node):
    alice = start_node("alice")
    before = len(dht_threads())
    port = free_port()
    for _ in range(20):
        bob = DHTNode(identity_of("bob"), DHTConfig(port=port, initial_peers=(alice.dht_address,)))
        await bob.astart()
        assert await bob.put(PREFIX, [b"x"]) >= 1
        await bob.aclose()
        await bob.aclose()
    assert len(dht_threads()) == before
    bind("127.0.0.1", port).close()


def test_a_taken_port_is_named_with_the_remedy(start_node):
    alice = start_node("alice")
    with pytest.raises(AddressInUseError, match=rf"{alice.address[1]}.*dht\.port"):
        start_node("bob", port=alice.address[1])
    assert len(dht_threads()) == 1


def test_a_host_that_is_not_ours(start_node):
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(ConfigError, match=r"dht\.host"):
            start_node("alice", host=host)


def test_no_initial_peer_answers(start_node):
    started = time.monotonic()
    with pytest.raises(BootstrapError, match=r"127\.0\.0\.1:9.*--initial-peers"):
        start_node("alice", initial_peers=("127.0.0.1:9",), join_timeout_s=0.5)
    assert time.monotonic() - started < 3
    assert dht_threads() == []


def test_initial_peers_that_are_no_addresses(start_node):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        start_node("alice", initial_peers=("nonsense",))
    assert dht_threads() == []


def test_a_node_that_does_not_wait_joins_when_a_peer_comes_up(start_node, caplog):
    port = free_port()
    bob = start_node("bob", initial_peers=(f"127.0.0.1:{port}",), join_timeout_s=0.3, wait_for_peers=False)
    assert bob.peer_count == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    start_node("alice", port=port)
    deadline = time.monotonic() + 8
    while bob.peer_count == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert bob.peer_count == 1
    assert len(caplog.records) == 1, "one line, not one per attempt"


async def test_a_restart_needs_no_initial_peer(start_node, tmp_path):
    state = tmp_path / "state" / "dht.json"
    alice = start_node("alice")
    bob = start_node("bob", initial_peers=(alice.dht_address,), state_path=str(state))
    await bob.put(PREFIX, [b"x"])
    bob.close()
    saved = json.loads(state.read_bytes())
    assert saved["peers"] == [["127.0.0.1", alice.address[1]]]
    again = DHTNode(identity_of("bob"), DHTConfig(state_path=str(state)), clock=lambda: time.time() - 20)
    try:
        again.start()
        assert again.peer_count == 1
        assert await again.put(PREFIX, [b"newer, though the clock went back"]) == 2
        assert [r.value for r in await alice.get(PREFIX)] == [b"newer, though the clock went back"]
    finally:
        again.close()


async def test_calls_under_way_end_with_closed_error_when_the_node_closes(start_node):
    alice = start_node("alice")
    entered = threading.Event()

    async def forever():
        entered.set()
        await asyncio.Event().wait()

    call = asyncio.create_task(alice.call(forever))
    await asyncio.to_thread(entered.wait, 5)
    await alice.aclose()
    with pytest.raises(ClosedError):
        async with asyncio.timeout(5):
            await call
    with pytest.raises(ClosedError):
        await alice.get(PREFIX)


async def test_cancelling_a_call_cancels_it_on_the_dhts_loop(start_node):
    alice = start_node("alice")
    entered, cancelled = threading.Event(), threading.Event()

    async def forever():
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    call = asyncio.create_task(alice.call(forever))
    await asyncio.to_thread(entered.wait, 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(cancelled.wait, 5)


async def test_an_error_on_the_dhts_loop_reaches_the_caller(start_node):
    async def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await start_node("alice").call(fail)


def test_before_start_and_twice():
    node = DHTNode(identity_of("alice"))
    assert "not started" in repr(node)
    assert node.stats().peers == 0
    with pytest.raises(RuntimeError):
        _ = node.address
    with pytest.raises(ClosedError):
        node.submit(lambda: asyncio.sleep(0))
    with node, pytest.raises(RuntimeError):
        node.start()
    node.close()


def test_a_thread_that_does_not_get_ready_is_given_up():
    async def never(ready, stopping):
        await stopping.wait()

    with pytest.raises(TimeoutError):
        LoopThread("p2pmoe-dht-slow").start(never, timeout_s=0.1)
    assert dht_threads() == []


# --- what peers say about us ------------------------------------------------------------------------------------


def test_our_address_is_what_most_reporters_see_and_a_subnet_has_one_voice():
    seen = Observations()
    for number in range(200):  # a liar with a whole subnet
        seen.report((f"6.6.6.{number % 250 + 1}", number + 1), ("6.6.6.6", 1), 900.0)
    assert seen.host is None
    for number in range(3):
        seen.report((f"8.8.{number}.8", 1), ("9.9.9.9", 1), 1.0)
    assert seen.host == "9.9.9.9"
    assert seen.clock_offset_s == 1.0


def test_without_a_majority_nothing_is_known():
    seen = Observations()
    assert (seen.host, seen.clock_offset_s) == (None, None)
    for number in range(4):
        seen.report((f"8.8.{number}.8", 1), (f"9.9.9.{number % 2}", 1), 0.0)
    assert seen.host is None
    for number in range(500):
        seen.report((f"7.7.{number % 250}.8", 1), ("9.9.9.9", 1), 0.0)
    assert len(seen._hosts) == 64


async def test_a_wrong_clock_is_said_once(start_node, caplog):
    alice = start_node("alice")
    peers = [start_node(f"peer-{number}", initial_peers=(alice.dht_address,)) for number in range(3)]
    wrong = DHTNode(
        identity_of("wrong"),
        DHTConfig(initial_peers=tuple(peer.dht_address for peer in peers)),
        clock=lambda: time.time() - 60,
    )
    try:
        wrong.start()
        for peer in (alice, *peers):
            await wrong.call(lambda peer=peer: wrong.server.protocol.call_ping(peer.address))
        assert wrong.stats().clock_offset_s == pytest.approx(60, abs=2)
        assert sum("clock" in record.message for record in caplog.records) == 1
    finally:
        wrong.close()


# --- the state file ---------------------------------------------------------------------------------------------


def test_state_survives_the_disk(tmp_path):
    path = tmp_path / "state.json"
    save_state(path, [("192.0.2.1", 7), ("2001:db8::1", 8)], 42)
    assert load_state(path) == SavedState((("192.0.2.1", 7), ("2001:db8::1", 8)), 42)
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"peers": 7}',
        b'{"peers": [["h", 99999]]}',
        b"\xff\xfe",
        b"[" * 5000,
        bytes(MAX_STATE_BYTES + 1),
    ],
)
def test_a_broken_state_file_is_an_empty_one(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    assert load_state(path) == SavedState()
    assert load_state(tmp_path / "none") == SavedState()


def test_a_state_file_that_cannot_be_written_is_told_of_once_a_day(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    node = DHTNode(identity_of("alice"), DHTConfig(state_path=str(tmp_path / "file" / "peers.json")))
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(2 * 8640 + 1):
        node._save_state()
        now[0] += 10.0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert said[0].startswith(f"the DHT's peers cannot be saved to {tmp_path}/file/peers.json: ")
    assert "set dht.state_path to a file that this user may write" in said[0]


# --- addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peers", "host"),
    [
        ((), "127.0.0.1"),
        (("127.0.0.1:1", "localhost:2"), "127.0.0.1"),
        (("192.0.2.1:1",), "0.0.0.0"),
        (("127.0.0.1:1", "example.org:2"), "::" if has_ipv6() else "0.0.0.0"),
        (("[::1]:1",), "::" if has_ipv6() else "0.0.0.0"),
        (("[::ffff:127.0.0.1]:1",), "127.0.0.1"),
    ],
)
def test_what_a_client_binds(peers, host):
    assert client_host(peers) == host
