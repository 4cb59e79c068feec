"""Hostile datagrams: what the stock package does under attack, each a test that we do not."""

from __future__ import annotations

import asyncio
import random
import time

import msgspec
import pytest
from dht_swarm import HEADER, identity_of, settle, until

from p2pmoe.dht.protocol import MAX_VERIFY_PINGS
from p2pmoe.protocol.datagrams import (
    MAX_DATAGRAM_BYTES,
    Contact,
    Find,
    Found,
    Page,
    Ping,
    Pong,
    Status,
    Store,
    Stored,
    encode_datagram,
    pack_contacts,
)
from p2pmoe.protocol.records import key_of, sign_record

KEY = key_of("test", "ffn.")
ID = b"12345678"


# --- answers ----------------------------------------------------------------------------------------------------


async def test_ping_find_page_store(make_peer, make_stranger):
    alice, mallory = await make_peer("alice"), make_stranger()
    pong = await mallory.ask(Ping(ID, b"", bytes(16)), alice.address)
    assert (pong.id, pong.sender, len(pong.token)) == (ID, alice.node.id, 8)
    record = alice.record(KEY)
    stored = await mallory.ask(Store(ID, b"", pong.token, KEY, [record.raw]), alice.address)
    assert stored.statuses == bytes([Status.STORED])
    found = await mallory.ask(Find(ID, b"", pong.token, KEY, 8), alice.address)
    assert (found.records, found.pages, len(found.digest)) == ([record.raw], 1, 8)
    paged = await mallory.ask(Page(ID, b"", pong.token, KEY, 0), alice.address)
    assert (paged.records, paged.digest) == ([record.raw], found.digest)
    assert (await mallory.ask(Page(ID, b"", pong.token, KEY, 1), alice.address)).pages == 0


async def test_a_client_answers_nobody_and_enters_no_table(make_peer, make_stranger):
    alice = await make_peer("alice")
    carol = await make_peer("carol", client_mode=True, bootstrap=alice)
    await carol.set(KEY, [carol.record(KEY)])
    assert [record.value for record in await carol.get(KEY)] == [b"value"]
    await settle(alice)
    assert len(alice.table) == 0
    mallory = make_stranger()
    mallory.send(Ping(ID, b"", bytes(16)), carol.address)
    mallory.send(Find(ID, b"", b"", KEY, 8, bytes(330)), carol.address)
    await mallory.ask(Ping(b"to alice", b"", bytes(16)), alice.address)
    assert [message.id for message in mallory.heard] == [b"to alice"]


# --- who enters the table ---------------------------------------------------------------------------------------


async def test_a_contact_enters_only_after_it_answered_our_ping(make_peer, make_stranger):
    alice = await make_peer("alice")
    bob = make_stranger("bob", answer=lambda message, _: Pong(message.id, identity_of("bob").node_id, b"", b"", 0))
    silent = make_stranger("silent", answer=lambda *_: None)
    for stranger in (bob, silent):
        stranger.send(Find(ID, stranger.identity.node_id, b"", KEY, 8, bytes(330)), alice.address)
    alice.protocol.book.typical.sample(0.001)
    await until(lambda: bob.heard and silent.heard)
    await settle(alice)
    assert [contact.contact for contact in alice.table] == [bob.contact]


async def test_verify_pings_are_bounded(make_peer, make_stranger):
    alice, mallory = await make_peer("alice"), make_stranger(answer=lambda *_: None)
    for number in range(MAX_VERIFY_PINGS * 3):
        alice.protocol._verify(Contact(bytes([number]) * 20, "127.0.0.1", 20_000 + number))
    assert len(alice.protocol._verifying) == MAX_VERIFY_PINGS
    mallory.send(Ping(ID, b""), alice.address)


async def test_a_claimed_id_does_not_take_a_live_contacts_place(make_peer, make_stranger):
    """Mallory says it is bob, from another address, and even answers to that name."""
    alice = await make_peer("alice")
    bob = await make_peer("bob", bootstrap=alice)
    await settle(alice)
    mallory = make_stranger(answer=lambda message, _: Pong(message.id, bob.node.id, b"", b"", 0))
    mallory.send(Find(ID, bob.node.id, b"", KEY, 8, bytes(330)), alice.address)
    await alice.protocol.call_ping(mallory.address)
    assert alice.table.get(bob.node.id).address == bob.address


async def test_another_node_at_a_known_address_is_not_taken_for_the_old_one(make_peer, make_stranger):
    alice = await make_peer("alice")
    bob = make_stranger("bob", answer=lambda message, _: Pong(message.id, identity_of("eve").node_id, b"", b"", 0))
    alice.table.heard_from(bob.contact, 0)
    assert await alice.protocol.call_ping(bob.contact) is None
    assert alice.table.get(bob.contact.node_id) is None


# --- malformed --------------------------------------------------------------------------------------------------


def _contacts_that_closed_the_stock_transport():
    """Replies to Find with contacts as the stock package sends them, and packed ones that lie."""

    def body(v4, v6=b""):
        return [17, None, b"m" * 20, b"", v4, v6, b"", 0, []]

    yield "port 99999", body([[b"x" * 20, "127.0.0.1", 99999]])
    yield "ip zz", body([[b"x" * 20, "zz", 1]])
    yield "ip None", body([[b"x" * 20, None, 1]])
    yield "hostname", body([[b"x" * 20, "slow.example.org", 1]])
    yield "no list", body(None)
    yield "port 0", body(b"x" * 20 + b"\x7f\0\0\1" + b"\0\0")
    yield "multicast", body(b"x" * 20 + b"\xe0\0\0\1" + b"\0\1")
    yield "unspecified", body(b"x" * 20 + b"\0\0\0\0" + b"\0\1")
    yield "broadcast", body(b"x" * 20 + b"\xff\xff\xff\xff" + b"\0\1")
    yield "half a contact", body(b"x" * 25)
    yield "IPv6 on an IPv4 socket", body(b"", b"x" * 20 + bytes(15) + b"\1" + b"\0\1")
    yield "mapped IPv4", body(b"", b"x" * 20 + bytes(10) + b"\xff\xff\x7f\0\0\1" + b"\0\1")
    yield "records that are none", [17, None, b"m" * 20, b"", b"", b"", b"digest!!", 3, [b"junk"]]
    yield "pages without end", [17, None, b"m" * 20, b"", b"", b"", b"digest!!", 65535, [b"junk"]]
    yield "a map", {"value": 1}
    yield "nothing", None


async def test_malformed_replies_neither_raise_nor_close_the_transport(make_peer, make_stranger):
    def liar(name, body):
        node_id = identity_of(name).node_id

        def answer(message, _):
            if not isinstance(message, Find):
                return Pong(message.id, node_id, b"", b"", 0)
            if not isinstance(body, list):
                return HEADER + msgspec.msgpack.encode(body)
            return HEADER + msgspec.msgpack.encode([body[0], message.id, node_id, *body[3:]])

        return make_stranger(name, answer)

    alice, bob = await make_peer("alice"), await make_peer("bob")
    await alice.bootstrap([bob.address])
    await bob.set(KEY, [bob.record(KEY)])
    liars = [liar(name, body) for name, body in _contacts_that_closed_the_stock_transport()]
    for each in liars:
        alice.table.heard_from(each.contact, 0)
    alice.protocol.book.typical.sample(0.001)
    async with asyncio.timeout(8):
        await alice.find_nearest(KEY, width=40)
        records = await alice.get(KEY)
    assert [record.value for record in records] == [b"value"]
    assert all(each.heard for each in liars)
    assert await alice.protocol.call_ping(bob.address) is not None
    assert not alice.transport.is_closing()


async def test_fuzzed_datagrams_raise_nothing_and_the_node_still_answers(make_peer, make_stranger):
    seed = 7
    print("seed", seed)
    dice = random.Random(seed)
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    alice, mallory = await make_peer("alice"), make_stranger()
    token = await mallory.token_from(alice)
    record = alice.record(KEY)
    good = [
        encode_datagram(HEADER, message)
        for message in (
            Ping(ID, b"m" * 20, bytes(16)),
            Find(ID, b"m" * 20, token, KEY, 8),
            Page(ID, b"m" * 20, token, KEY, 0),
            Store(ID, b"m" * 20, token, KEY, [record.raw]),
            Pong(ID, b"m" * 20, b"", b"", 0),
            Found(ID, b"m" * 20, b"", bytes(26), bytes(38), b"", 1, [record.raw]),
            Stored(ID, b"m" * 20, b"", b"\0"),
        )
    ]
    for _ in range(8000):
        datagram = bytearray(dice.choice(good))
        for _ in range(dice.randrange(6)):
            datagram[dice.randrange(len(datagram))] = dice.randrange(256)
        if dice.random() < 0.2:
            del datagram[dice.randrange(len(datagram)) :]
        if dice.random() < 0.1:
            datagram = bytearray(HEADER + dice.randbytes(dice.randrange(1500)))
        alice.protocol.datagram_received(
            bytes(datagram), (f"127.0.0.{dice.randrange(1, 250)}", dice.randrange(1, 65536))
        )
    assert not errors
    assert not alice.transport.is_closing()
    assert len(alice.protocol._verifying) <= MAX_VERIFY_PINGS
    assert len(alice.storage) <= 1
    while True:  # whatever was answered to us before
        reply = await mallory.ask(Ping(b"alive???", b""), alice.address)
        if reply.id == b"alive???":
            break


async def test_oversized_datagrams_are_dropped(make_peer, make_stranger):
    alice, mallory = await make_peer("alice"), make_stranger()
    before = alice.protocol.counters.malformed
    mallory.send(encode_datagram(HEADER, Ping(ID, b"", bytes(16))) + bytes(5000), alice.address)
    mallory.send(HEADER + bytes(60_000), alice.address)
    await mallory.silence(alice)
    assert alice.protocol.counters.malformed == before + 2


async def test_unknown_attributes_are_no_rpcs(make_peer):
    alice = await make_peer("alice")
    assert not hasattr(alice.protocol, "find_vaule")
    with pytest.raises(AttributeError):
        alice.protocol.pign(("127.0.0.1", 1))


# --- forged sources ---------------------------------------------------------------------------------------------


async def test_a_spoofed_request_is_answered_with_at_most_three_times_its_bytes(make_peer, make_stranger):
    alice, mallory = await make_peer("alice"), make_stranger()
    for number in range(40):
        record = sign_record(
            identity_of(f"signer-{number}"),
            KEY,
            bytes(300),
            sequence=int(time.time() * 1e6),
            expires_at_ms=int(time.time() * 1000) + 60_000,
        )
        alice.trust.admit(KEY, record.raw, source="x", count_nearer=0, now=time.time())
    for number in range(30):
        alice.table.heard_from(Contact(bytes([number]) * 20, "127.0.0.1", 1000 + number), 0)
    for request in (
        Ping(ID, b""),
        Ping(ID, b"", bytes(16)),
        Find(ID, b"", b"", KEY, 32),
        Find(ID, b"", bytes(8), KEY, 32, bytes(100)),
        Find(ID, b"", b"", KEY, 32, bytes(330)),
        Page(ID, b"", b"", KEY, 1),
        Store(ID, b"", b"", KEY, [b"x"]),
    ):
        sent = mallory.send(request, alice.address)
        reply, size = await mallory.receive()
        assert size <= 3 * sent, reply
        assert size <= MAX_DATAGRAM_BYTES


async def test_what_a_spoofed_stranger_is_sent_in_all_is_bounded(make_peer, make_stranger):
    """Whoever names a node id is pinged as well, at most three times: that does not depend on what was asked."""
    alice = await make_peer("alice")
    alice.protocol.book.typical.sample(0.001)
    ping_bytes = len(encode_datagram(HEADER, Ping(ID, bytes(20), bytes(16))))
    for request in (Ping(ID, b"m" * 20, bytes(16)), Find(ID, b"n" * 20, b"", KEY, 32, bytes(330))):
        victim = make_stranger(request.sender.hex())
        sent = victim.send(request, alice.address)
        before = alice.protocol.counters.bytes_out
        await until(lambda: alice.protocol._verifying)
        await settle(alice)
        assert len(alice.table) == 0
        assert alice.protocol.counters.bytes_out - before <= 3 * sent + 3 * ping_bytes


async def test_without_a_token_of_its_own_address_nobody_writes(make_peer, make_stranger):
    alice, mallory, eve = await make_peer("alice"), make_stranger("mallory"), make_stranger("eve")
    record = alice.record(KEY)
    stolen = await eve.token_from(alice)
    for token in (b"", bytes(8), stolen):
        reply = await mallory.ask(Store(ID, b"", token, KEY, [record.raw]), alice.address)
        assert reply.statuses == bytes([Status.BAD_TOKEN])
    assert len(alice.storage) == 0
    assert (await mallory.ask(Store(ID, b"", reply.token, KEY, [record.raw]), alice.address)).statuses == b"\0"


async def test_a_reply_from_another_address_is_no_reply(make_peer, make_stranger):
    alice = await make_peer("alice")
    eve = make_stranger("eve")
    forged = []

    def answer(message, _):
        pong = Pong(message.id, identity_of("eve").node_id, b"", b"", 0)
        eve.send(pong, alice.address)
        forged.append(message.id)

    bob = make_stranger("bob", answer=answer)
    alice.protocol.book.typical.sample(0.001)
    assert await alice.protocol.call_ping(bob.address) is None
    assert len(forged) == 3, "one transmission and two retransmissions"
    assert len(alice.table) == 0


async def test_nobody_makes_us_send_to_our_own_local_network(make_peer):
    alice = await make_peer("alice")
    lan, world = Contact(b"x" * 20, "192.168.1.1", 53), Contact(b"y" * 20, "8.8.8.8", 53)
    loopback = Contact(b"z" * 20, "127.0.0.1", 22)
    reply = Found(ID, b"m" * 20, b"", *pack_contacts([lan, world, loopback]), b"", 0, [])
    assert alice.protocol.contacts_in(reply, "9.9.9.9") == [world]
    assert alice.protocol.contacts_in(reply, "192.168.1.77") == [lan, world]
    assert alice.protocol.contacts_in(reply, "127.0.0.1") == [lan, world, loopback]


# --- floods -----------------------------------------------------------------------------------------------------


async def test_tiny_datagrams_cost_what_they_take_in_time(make_peer, make_stranger):
    alice = await make_peer("alice")
    alice.budgets._rate, alice.budgets._burst = 0, 1000
    mallory, bob = make_stranger("mallory"), make_stranger("bob")
    for _ in range(5):
        mallory.send(b"\0", alice.address)
    mallory.send(Ping(ID, b"", bytes(16)), alice.address)
    await bob.ask(Ping(ID, b"", bytes(16)), alice.address)
    assert mallory.heard == []
    assert alice.protocol.counters.over_budget == 1


async def test_a_source_over_its_budget_is_ignored_and_others_are_not(make_peer, make_stranger):
    alice = await make_peer("alice")
    alice.budgets._rate, alice.budgets._burst = 0, 1000
    mallory, bob = make_stranger("mallory"), make_stranger("bob")
    for _ in range(100):
        mallory.send(Find(ID, b"", b"", KEY, 8, bytes(330)), alice.address)
    await bob.ask(Ping(ID, b"", bytes(16)), alice.address)
    assert len(mallory.heard) <= 3
    assert alice.protocol.counters.over_budget >= 97


async def test_wrong_signatures_cost_their_sender_dearly(make_peer, make_stranger):
    alice, mallory = await make_peer("alice"), make_stranger()
    alice.budgets._rate, alice.budgets._burst = 0, 20_000
    token = await mallory.token_from(alice)
    good = alice.record(KEY).raw
    bad = good[:-1] + bytes([good[-1] ^ 1])
    for _ in range(50):
        mallory.send(Store(ID, b"", token, KEY, [bad]), alice.address)
    bob = make_stranger("bob")
    await bob.silence(alice)
    assert alice.protocol.counters.records_refused <= 5


async def test_cancelling_a_call_leaves_nothing_behind(make_peer, make_stranger):
    alice = await make_peer("alice")
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    mallory = make_stranger(answer=lambda *_: None)
    task = asyncio.create_task(alice.protocol.call_ping(mallory.address))
    await until(lambda: mallory.heard)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(alice.protocol.book) == 0
    mallory.send(Pong(mallory.heard[0].id, b"m" * 20, b"", b"", 0), alice.address)
    await make_stranger("bob").silence(alice)
    assert not errors
    assert len(alice.table) == 0


async def test_a_stalled_loop_evicts_nobody(make_peer):
    alice = await make_peer("alice")
    bob = await make_peer("bob", bootstrap=alice)
    await settle(alice)
    for _ in range(2):
        task = asyncio.create_task(
            alice.protocol.call_ping(bob.table.get(alice.node.id) and Contact(bob.node.id, *bob.address))
        )
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251 - the stall is what is tested
        assert await task is not None
    assert alice.table.get(bob.node.id).misses == 0
    assert alice.protocol.caller.timeouts == 0


async def test_many_waiting_replies_are_read_before_anybody_is_called_late(make_peer, make_stranger):
    """200 answers wait in the socket while our loop stands still for longer than every timeout."""
    alice = await make_peer("alice")
    answered = []
    alice.protocol.book.typical.sample(0.001)  # timeouts of 0.1, 0.2 and 0.4 s
    mallory = make_stranger(answer=lambda message, _: Pong(message.id, identity_of("mallory").node_id, b"", b"", 0))
    for _ in range(60):
        alice.protocol.call(mallory.address, lambda i, s, t: Ping(i, s, bytes(16)), answered.append)
    while len(mallory.heard) < 60:
        mallory._read()
    time.sleep(0.8)  # noqa: ASYNC251 - the stall is what is tested
    await until(lambda: len(answered) == 60)
    assert all(answered)
    assert alice.protocol.caller.timeouts == 0
