"""Declaring and finding experts over real DHT nodes on loopback, and the client's cache with its counter."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from p2pmoe.config import DHTConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import BootstrapError, ClosedError, EncodeError, InvalidUidError
from p2pmoe.experts.directory import PREFIXES_AT_ONCE, ExpertDirectory, Provider
from p2pmoe.identity import Identity
from p2pmoe.types import Endpoint, PeerId

HERE = Endpoint("127.0.0.1", 8080)
FFN, NOP = "ab" * 32, "cd" * 32
GRID = {f"ffn.{i}.{j}": FFN for i in range(4) for j in range(4)}


class Clock:
    """The time of day, which a test can move on."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def nodes(clock):
    """alice and bob serve, carol is a client."""
    alice = DHTNode(Identity.generate(), clock=clock)
    alice.start()
    config = DHTConfig(initial_peers=(alice.dht_address,))
    bob = DHTNode(Identity.generate(), config, clock=clock)
    bob.start()
    carol = DHTNode(Identity.generate(), config, client_mode=True, clock=clock)
    carol.start()
    yield alice, bob, carol
    for node in (carol, bob, alice):
        node.close()


@pytest.fixture
def directories(nodes, clock):
    return [ExpertDirectory(node, clock=clock) for node in nodes]


async def test_declared_experts_are_found_by_uid_prefix_and_glob(nodes, directories):
    alice, _, carol = directories
    await alice.declare({**GRID, "nop.1": NOP}, HERE, ttl_s=60)
    for pattern, count in [
        ("ffn.*", 16),
        ("ffn", 16),
        ("ffn.3.", 4),
        ("ffn.3.*", 4),
        ("ffn.1.2", 1),
        ("ffn.[0:2].[0:2]", 4),
        ("nop.1", 1),
        ("ffn.9.9", 0),
        ("x.*", 0),
    ]:
        found = await carol.find_experts(pattern)
        assert len(found) == count, pattern
    (record,) = await carol.find_experts("ffn.1.2")
    assert (record.uid, record.peer_id, record.schema_digest) == ("ffn.1.2", nodes[0].peer_id, FFN)
    assert record.endpoint == HERE.with_public_key(nodes[0].identity.public_key)
    assert record.declared_at < record.expires_at <= record.declared_at + 61


async def test_two_providers_of_one_uid_are_both_found(nodes, directories):
    alice, bob, carol = directories
    await alice.declare({"ffn.0.0": FFN}, HERE)
    await bob.declare({"ffn.0.0": FFN, "ffn.0.1": FFN}, Endpoint("127.0.0.1", 8081))
    providers = await carol.find_providers("ffn.0.0")
    assert [provider.peer_id for provider in providers] == [nodes[1].peer_id, nodes[0].peer_id], "newest first"
    assert [provider.endpoint.port for provider in providers] == [8081, 8080]
    assert await carol.find_providers("ffn.0.9") == ()
    assert len(await carol.find_experts("ffn.*")) == 3


async def test_experts_expire(directories, clock):
    alice, _, carol = directories
    await alice.declare({"ffn.0.0": FFN}, HERE, ttl_s=30)
    assert len(await carol.find_experts("ffn.*")) == 1
    assert alice.declared_uids == ["ffn.0.0"]
    clock.ahead_s = 31
    assert await carol.find_experts("ffn.*") == []
    assert alice.declared_uids == []


async def test_withdrawn_experts_are_gone_at_once_and_their_prefixes_too(directories):
    alice, _, carol = directories
    await alice.declare(GRID, HERE)
    await alice.withdraw(["ffn.3.1", "never.1"])
    assert "ffn.3.1" not in {record.uid for record in await carol.find_experts("ffn.*")}
    await alice.withdraw([f"ffn.3.{j}" for j in range(4)])
    carol.invalidate()
    children = (await carol.get_prefixes(["ffn."]))["ffn."]
    assert sorted(children) == [0, 1, 2]
    await alice.withdraw(alice.declared_uids)
    carol.invalidate()
    assert await carol.find_experts("ffn.*") == []
    assert (await carol.get_prefixes(["ffn."]))["ffn."] == {}


async def test_a_declaration_adds_to_the_former_ones(directories):
    alice, _, carol = directories
    await alice.declare({"ffn.0.0": FFN}, HERE)
    await alice.declare({"ffn.0.1": NOP}, HERE)
    assert {r.uid: r.schema_digest for r in await carol.find_experts("ffn.*")} == {"ffn.0.0": FFN, "ffn.0.1": NOP}
    carol.invalidate()
    await alice.declare({"ffn.0.1": FFN}, HERE)
    assert {r.uid: r.schema_digest for r in await carol.find_experts("ffn.*")} == {"ffn.0.0": FFN, "ffn.0.1": FFN}


async def test_repeat_searches_cost_no_network(directories):
    alice, _, carol = directories
    await alice.declare(GRID, HERE)
    assert carol.cached_prefix("ffn.") is None
    first = await carol.find_experts("ffn.*")
    reads = carol.network_reads
    assert reads == 5
    for _ in range(20):
        assert await carol.find_experts("ffn.*") == first
        await carol.find_providers("ffn.3.3")
    assert carol.network_reads == reads
    assert sorted(carol.cached_prefix("ffn.3.")) == [0, 1, 2, 3]


async def test_empty_answers_are_cached_for_seconds_only(directories, clock):
    _, _, carol = directories
    for _ in range(5):
        assert await carol.find_experts("ffn.1.1") == []
    assert carol.network_reads == 1
    clock.ahead_s = 6
    await carol.find_experts("ffn.1.1")
    assert carol.network_reads == 2


async def test_many_at_once_read_a_prefix_once(directories):
    alice, _, carol = directories
    await alice.declare(GRID, HERE)
    results = await asyncio.gather(*(carol.find_providers("ffn.0.0") for _ in range(50)))
    assert all(len(providers) == 1 for providers in results)
    assert carol.network_reads == 1


async def test_one_that_gives_up_does_not_end_the_read_of_the_others(directories):
    alice, _, carol = directories
    await alice.declare(GRID, HERE)
    impatient = asyncio.create_task(carol.get_prefixes(["ffn."]))
    patient = asyncio.create_task(carol.get_prefixes(["ffn."]))
    await asyncio.sleep(0)
    impatient.cancel()
    async with asyncio.timeout(5):
        assert len((await patient)["ffn."]) == 4
    with pytest.raises(asyncio.CancelledError):
        await impatient


async def test_a_prefix_in_use_is_read_ahead_of_its_expiry(directories, clock):
    alice, _, carol = directories
    await alice.declare(GRID, HERE)
    await carol.get_prefixes(["ffn."])
    clock.ahead_s = 7
    for _ in range(100):
        assert carol.cached_prefix("ffn.") is not None
    async with asyncio.timeout(5):
        while carol.network_reads < 2 or carol._refreshing:  # noqa: ASYNC110 - the refresh has no event
            await asyncio.sleep(0)
    clock.ahead_s = 12
    assert carol.cached_prefix("ffn.") is not None, "the first read would have aged out"
    assert carol.network_reads == 2


async def test_an_unreachable_peer_is_left_out_everywhere_until_it_is_back(nodes, directories):
    alice, bob, carol = directories
    await alice.declare({"ffn.0.0": FFN, "ffn.0.1": FFN}, HERE)
    await bob.declare({"ffn.0.0": FFN}, HERE)
    await carol.find_experts("ffn.*")
    carol.mark_unreachable(nodes[0].peer_id, for_s=60)
    assert sorted(carol.cached_prefix("ffn.0.")) == [0]
    assert [p.peer_id for p in await carol.find_providers("ffn.0.0")] == [nodes[1].peer_id]
    carol.invalidate()
    assert [r.uid for r in await carol.find_experts("ffn.*")] == ["ffn.0.0"]
    carol.mark_reachable(nodes[0].peer_id)
    assert len(await carol.find_experts("ffn.*")) == 3


async def test_records_are_read_again_once_for_all_who_wait(directories, clock):
    alice, _, carol = directories
    elsewhere = Endpoint("192.0.2.9", 9)
    await alice.declare({"ffn.0.0": FFN}, HERE)
    await carol.find_providers("ffn.0.0")
    clock.ahead_s = 1
    await alice.declare({"ffn.0.0": FFN}, elsewhere)
    assert [each.endpoint.port for each in await carol.find_providers("ffn.0.0")] == [HERE.port], "cached"
    reads = carol.network_reads
    async with asyncio.timeout(5):
        found = await asyncio.gather(*(carol.find_providers("ffn.0.0", again=True) for _ in range(50)))
    assert {each.endpoint.port for providers in found for each in providers} == {elsewhere.port}
    assert carol.network_reads == reads + 1, "one read, however many ask"
    await carol.read_again(["ffn.0."])
    assert carol.network_reads == reads + 1, "and none within half a second"
    assert carol.cached_prefix("ffn.0.")[0][0].endpoint.port == elsewhere.port
    assert list(carol.announced("ffn.0.")) == [0]
    assert carol.announced("never.") == {}
    clock.ahead_s = 1.6
    await carol.read_again(["ffn.0."])
    assert carol.network_reads == reads + 2


async def test_first_k_active(directories):
    alice, _, carol = directories
    await alice.declare({"ffn.0.1": FFN, "ffn.0.3": FFN, "ffn.1.1": FFN}, HERE)
    active = await carol.first_k_active(["ffn.0.0", "ffn.0.3", "ffn.1.1", "ffn.0.1"], k=2)
    assert list(active) == ["ffn.0.3", "ffn.1.1"]


async def test_a_prefix_of_hundreds_of_children_from_many_schemas(directories):
    alice, bob, carol = directories
    await alice.declare({f"big.{number}": f"{number % 4:02x}" for number in range(1000)}, HERE)
    await bob.declare({f"big.{number}": "aa" for number in range(500, 1500)}, HERE)
    assert len(await carol.find_experts("big.*")) == 2000


async def test_what_cannot_be_declared_leaves_the_rest_as_it_was(directories):
    alice, _, carol = directories
    await alice.declare({"ffn.0.0": FFN}, HERE)
    with pytest.raises(EncodeError):
        await alice.declare({f"ffn.0.{number}": f"{number:02x}" for number in range(1, 20)}, HERE)
    for wrong in ({"ffn.0": ""}, {"ffn.0": "zz"}):
        with pytest.raises(EncodeError):
            await alice.declare(wrong, HERE)
    with pytest.raises(InvalidUidError):
        await alice.declare({"not a uid": FFN}, HERE)
    assert alice.declared_uids == ["ffn.0.0"]
    await alice.declare({"ffn.0.0": FFN}, HERE)
    assert [record.uid for record in await carol.find_experts("ffn.*")] == ["ffn.0.0"]


async def test_bad_prefixes_and_patterns(directories):
    _, _, carol = directories
    for prefix in ("ffn", "ffn.1", "", "a b."):
        with pytest.raises(InvalidUidError):
            await carol.get_prefixes([prefix])
    with pytest.raises(InvalidUidError):
        await carol.find_experts("*")


async def test_without_any_peer_it_says_so():
    carol = DHTNode(Identity.generate(), client_mode=True)
    carol.start()
    try:
        with pytest.raises(BootstrapError, match="--initial-peers"):
            await ExpertDirectory(carol).find_experts("ffn.*")
    finally:
        carol.close()


async def test_after_close_it_says_so(nodes):
    alice = nodes[0]
    directory = ExpertDirectory(alice)
    alice.close()
    with pytest.raises(ClosedError):
        await directory.find_experts("ffn.*")
    with pytest.raises(ClosedError):
        await directory.declare({"ffn.0": FFN}, HERE)
    assert directory.cached_prefix("ffn.") is None


def test_from_threads_with_loops_of_their_own(directories):
    alice, _, carol = directories
    asyncio.run(alice.declare(GRID, HERE))
    counts = []

    def search():
        counts.append(len(asyncio.run(carol.find_experts("ffn.*"))))

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert counts == [16] * 4


def test_the_directory_needs_no_torch():
    code = "import sys, p2pmoe.experts.directory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


async def test_a_strangers_thousands_of_empty_prefixes_do_not_hide_the_others(monkeypatch, caplog):
    """Four strangers name 3,200 each; time is up after the first reads of the second level."""
    directory = ExpertDirectory(DHTNode(Identity.generate()), search_s=0.0)

    def provider(name: str, digest: str = "") -> Provider:
        return Provider(PeerId(name), HERE, digest, 9e9, 1)

    strangers = [(provider(f"stranger-{each}"),) for each in range(4)]
    root = {number: strangers[number % 4] for number in range(4 * 3200)}
    root |= {20_000 + number: (provider("bob"),) for number in range(40)}
    asked = []

    async def get_prefixes(prefixes):
        asked.extend(prefixes)
        experts = {0: (provider("bob", FFN),)}
        found = {prefix: experts if int(prefix[4:-1] or 0) >= 20_000 else {} for prefix in prefixes}
        return found | ({"ffn.": root} if "ffn." in prefixes else {})

    monkeypatch.setattr(directory, "get_prefixes", get_prefixes)
    found = await directory.find_experts("ffn.*")
    assert [each.uid for each in found] == [f"ffn.{20_000 + number}.0" for number in range(40)]
    assert len(asked) == 1 + PREFIXES_AT_ONCE
    assert f"{4 * 3200 + 40 - PREFIXES_AT_ONCE} are left out" in caplog.text
