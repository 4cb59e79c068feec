"""Two running nodes that announce experts with one key: one goes on, the other one stops, both say so."""

from __future__ import annotations

import contextlib

import pytest

from p2pmoe.config import DHTConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import IdentityError
from p2pmoe.experts.directory import ExpertDirectory
from p2pmoe.identity import Identity
from p2pmoe.types import Endpoint

SCHEMAS = {"ffn.0.0": "ab" * 8, "ffn.0.1": "ab" * 8}
FIRST, LAST = Endpoint("127.0.0.1", 1000, "https"), Endpoint("127.0.0.1", 2000, "https")
ALICE = Identity.from_seed(bytes(range(32)))


@pytest.fixture
async def pair():
    """Two directories with one key, whose nodes have been founders each of its own half, and a third node."""
    async with contextlib.AsyncExitStack() as stack:
        bob = await stack.enter_async_context(DHTNode(Identity.generate()))
        nodes = [await stack.enter_async_context(DHTNode(ALICE, DHTConfig())) for _ in range(2)]
        for node in nodes:
            await node.call(lambda node=node: node.server.bootstrap([bob.address]))
        yield *(ExpertDirectory(node) for node in nodes), ExpertDirectory(bob)


async def endpoints(directory: ExpertDirectory) -> set[int]:
    directory.invalidate()
    return {record.endpoint.port for record in await directory.find_experts("ffn.*")}


async def test_the_one_whose_address_comes_last_stops_and_the_other_goes_on(pair, caplog):
    first, last, bob = pair
    await first.declare(SCHEMAS, FIRST)
    await last.declare(SCHEMAS, LAST)
    assert await endpoints(bob) == {2000}, "nobody can tell the two from one that moved"
    await first.declare(SCHEMAS, FIRST)
    await last.declare(SCHEMAS, LAST)  # it has seen one foreign record
    await first.declare(SCHEMAS, FIRST)  # it has seen two: goes on, and says so
    for _ in range(2):
        with pytest.raises(IdentityError) as caught:
            await last.declare(SCHEMAS, LAST)
        assert str(caught.value) == (
            f"a second node, at https://127.0.0.1:1000, announces experts with this node's key ({ALICE.peer_id}), and "
            f"this one announces nothing more until that is gone: stop one of them, or make it a key of its own with "
            f"`p2pmoe id new FILE`"
        )
        await first.declare(SCHEMAS, FIRST)
        assert await endpoints(bob) == {1000}
    await last.withdraw(list(SCHEMAS))
    assert await endpoints(bob) == {1000}, "what is withdrawn is the other one's now"
    assert [each.getMessage() for each in caplog.records if "goes on" in each.getMessage()] == [
        "a second node, at https://127.0.0.1:2000, announces experts with this node's key; this one goes on: stop the "
        "other, or make it a key of its own with `p2pmoe id new FILE`"
    ]


async def test_it_takes_over_when_the_other_one_has_gone(pair):
    first, last, bob = pair
    for _ in range(2):
        await last.declare(SCHEMAS, LAST)
        await first.declare(SCHEMAS, FIRST)
    with pytest.raises(IdentityError):
        await last.declare(SCHEMAS, LAST)
    await first.withdraw(list(SCHEMAS))
    await last.declare(SCHEMAS, LAST)
    assert await endpoints(bob) == {2000}


async def test_one_foreign_record_may_be_our_own_of_an_earlier_run_whose_clock_was_ahead(pair):
    first, last, _ = pair
    await last.declare(SCHEMAS, LAST)
    await first.declare(SCHEMAS, FIRST)
    for _ in range(3):
        await last.declare(SCHEMAS, LAST)


async def test_a_node_that_changes_its_own_address_is_not_in_its_own_way(pair):
    first, _, bob = pair
    for endpoint in (LAST, FIRST, LAST, FIRST, FIRST):
        await first.declare(SCHEMAS, endpoint)
    assert await endpoints(bob) == {1000}
