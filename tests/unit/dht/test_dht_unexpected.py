"""What nobody foresaw on the DHT's loop: it fails its own look-up or call, and timers, sockets and threads go on."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest
from dht_swarm import identity_of, until

from p2pmoe import faults
from p2pmoe.config import DHTConfig
from p2pmoe.dht.harvest import Harvest
from p2pmoe.dht.lookup import Lookup
from p2pmoe.dht.loop_thread import LoopThread
from p2pmoe.dht.membership import Membership
from p2pmoe.dht.node import DHTNode
from p2pmoe.dht.requests import ping_message
from p2pmoe.dht.server import SwarmServer
from p2pmoe.errors import ClosedError, UnexpectedError
from p2pmoe.protocol.datagrams import Ping
from p2pmoe.protocol.records import key_of

KEY = key_of("test", "ffn.")
WAIT_S = 5.0


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_told_at", {})


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.exc_info]


def fail(*_, **__):
    raise ZeroDivisionError("nobody foresaw it")


@pytest.mark.parametrize(("room", "method"), [(Lookup, "answered"), (Harvest, "found"), (Lookup, "next_to_ask")])
async def test_an_answer_that_is_too_much_fails_its_look_up_at_once(make_swarm, monkeypatch, caplog, room, method):
    peers = await make_swarm(4)
    await peers[0].set(KEY, [peers[0].record(KEY)])
    with monkeypatch.context() as patch:
        patch.setattr(room, method, fail)
        async with asyncio.timeout(1.0):  # less than a look-up's deadline
            with pytest.raises((UnexpectedError, ZeroDivisionError), match="nobody foresaw it"):
                await peers[1].get(KEY)
    assert len(told(caplog)) <= 1
    assert [record.value for record in await peers[1].get(KEY)] == [b"value"]


async def test_one_listener_that_raises_leaves_the_timer_to_the_others(make_peer, make_stranger, caplog):
    alice, mallory = await make_peer("alice"), make_stranger()
    answers = []
    alice.protocol.call(mallory.address, ping_message, fail)
    alice.protocol.call(mallory.address, ping_message, answers.append, fail)
    async with asyncio.timeout(WAIT_S):
        await until(lambda: answers == [None])
    assert told(caplog) == ["taking an answer of the DHT failed unexpectedly"]
    bob = await make_peer("bob")
    assert await alice.protocol.call_ping(bob.address) is not None


async def test_a_datagram_that_is_too_much_is_one_lost_datagram(make_peer, make_stranger, monkeypatch, caplog):
    alice, mallory = await make_peer("alice"), make_stranger()
    with monkeypatch.context() as patch:
        patch.setattr(alice.protocol._answers, "to", fail)
        before = alice.protocol.counters.malformed
        for _ in range(20):
            mallory.send(Ping(b"12345678", b"", bytes(16)), alice.address)
        async with asyncio.timeout(WAIT_S):
            await until(lambda: alice.protocol.counters.malformed >= before + 20)
    assert told(caplog) == ["taking in a datagram failed unexpectedly"]
    assert await mallory.ask(Ping(b"87654321", b"", bytes(16)), alice.address)


async def test_what_cannot_be_sent_is_a_lost_datagram(make_peer, monkeypatch, caplog):
    alice, bob = await make_peer("alice"), await make_peer("bob")
    real, failures = alice.protocol.transmit, iter([True])

    def transmit(datagram, address):
        if next(failures, False):
            fail()
        real(datagram, address)

    alice.protocol.transmit = transmit
    assert await alice.protocol.call_ping(bob.address) is not None, "sent again by the timer"
    assert told(caplog) == ["sending a datagram failed unexpectedly"]


async def test_a_repair_that_fails_is_told(make_swarm, monkeypatch, caplog):
    peers = await make_swarm(4)
    await peers[0].set(KEY, [peers[0].record(KEY)])
    monkeypatch.setattr(SwarmServer, "_store_batches", fail)
    peers[1].storage.__init__(sizes=peers[1]._sizes)
    peers[2].storage.__init__(sizes=peers[2]._sizes)
    assert [record.value for record in await peers[3].get(KEY)] == [b"value"]
    async with asyncio.timeout(WAIT_S):
        await until(lambda: not peers[3]._repairing)
    assert set(told(caplog)) <= {"repairing a holder's records failed unexpectedly"}


async def test_upkeep_begins_even_when_filling_the_table_fails(make_peer, monkeypatch, caplog):
    alice = await make_peer("alice")
    rounds = asyncio.Event()
    monkeypatch.setattr("p2pmoe.dht.membership.MAINTAIN_EVERY_S", 0.01)
    real, failures = alice.refresh_buckets, iter([True])

    async def refresh_buckets(stale_s):
        if next(failures, False):
            fail()
        await real(stale_s)

    monkeypatch.setattr(alice, "refresh_buckets", refresh_buckets)
    membership = Membership(alice, DHTConfig(), on_round=rounds.set)
    upkeep = asyncio.create_task(membership.upkeep())
    async with asyncio.timeout(WAIT_S):
        await rounds.wait()
    upkeep.cancel()
    assert told(caplog) == ["filling the DHT's table failed unexpectedly"]


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), TypeError("no coroutine")])
def test_a_call_into_the_loop_gets_what_it_raised_and_the_thread_goes_on(error, no_new_threads):
    with DHTNode(identity_of("alice")) as node:

        async def leave():
            raise error

        with pytest.raises((UnexpectedError, TypeError)):
            node.submit(leave).result(WAIT_S)

        def no_coroutine():
            raise error

        with pytest.raises((UnexpectedError, TypeError)):
            node.submit(no_coroutine).result(WAIT_S)

        async def answer():
            return 3

        assert node.submit(answer).result(WAIT_S) == 3


def test_a_thread_that_ended_by_itself_says_why(caplog, no_new_threads):
    thread = LoopThread("p2pmoe-test")
    go = threading.Event()

    async def main(ready, stopping):
        ready()
        await asyncio.to_thread(go.wait, WAIT_S)
        fail()

    thread.start(main, WAIT_S)

    async def forever():
        await asyncio.sleep(3600)

    waiting = thread.submit(forever)
    go.set()
    with pytest.raises(CancelledError):
        waiting.result(WAIT_S)
    thread._thread.join(WAIT_S)
    with pytest.raises(ClosedError, match=r"p2pmoe-test has ended by itself, make it anew: .*nobody foresaw it"):
        thread.submit(forever)
    assert told(caplog) == ["the thread p2pmoe-test failed unexpectedly"]
    thread.stop()
