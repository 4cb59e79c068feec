"""Closed swarms: storers refuse and readers ignore what the owner did not allow, whoever lies about it."""

from __future__ import annotations

import logging
import time

import pytest
from dht_swarm import SWARM_ID, identity_of

from p2pmoe.config import DHTConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.dht.ownership import MAX_VERIFIED, ClosedSwarm, OwnDelegation
from p2pmoe.dht.store import RecordStore
from p2pmoe.dht.validation import RecordTrust, status_of
from p2pmoe.errors import BadSignatureError, ConfigError, DelegationError, NotDelegatedError, RecordError
from p2pmoe.protocol.datagrams import Find, Found, Pong, Status, Store
from p2pmoe.protocol.delegations import delegate, format_delegation, wrap
from p2pmoe.protocol.records import key_of, sign_record

OWNER, ALICE, BOB, MALLORY = map(identity_of, ("owner", "alice", "bob", "mallory"))
PREFIX = "ffn.3."
KEY = key_of(SWARM_ID, PREFIX)
NOW = 1_700_000_000.0


def given_to(member=ALICE, *, owner=OWNER, swarm_id=SWARM_ID, scope="", ttl_s=3600.0, now=NOW):
    return delegate(owner, swarm_id, member.public_key, expires_at_ms=int((now + ttl_s) * 1000), scope=scope)


def record(delegation=None, *, who=ALICE, payload=b"payload", ahead_s=0.0, now=NOW, part=0, key=KEY):
    value = payload if delegation is None else wrap(delegation, payload)
    return sign_record(
        who, key, value, part=part, sequence=int((now + ahead_s) * 1e6), expires_at_ms=int((now + 60) * 1000)
    )


def attacks(now=NOW):
    """Name, record, and whether a storer can see it: a storer does not know the prefix."""
    good = given_to(now=now)
    yield "no delegation", record(None, now=now), True
    yield "a foreign owner", record(given_to(owner=MALLORY, now=now), now=now), True
    yield "signed by the member itself", record(given_to(owner=ALICE, now=now), now=now), True
    yield "another member's", record(good, who=BOB, now=now), True
    yield "over", record(given_to(ttl_s=-61, now=now), now=now), True
    yield "of another swarm", record(given_to(swarm_id="other", now=now), now=now), True
    yield "truncated", record(None, payload=wrap(good, b"payload")[:-8], now=now), True
    yield "cut to nothing", record(None, payload=b"", now=now), True
    yield "its end moved", record(_changed(good, expires_at_ms=good.expires_at_ms + 1), now=now), True
    yield "its scope widened", record(_changed(given_to(scope="ffn.3.7.", now=now), scope=""), now=now), True
    yield "of another scope", record(given_to(scope="ffn.4.", now=now), now=now), False
    yield "of a name that begins alike", record(given_to(scope="ffn.33.", now=now), now=now), False


def _changed(delegation, **fields):
    kept = {name: getattr(delegation, name) for name in ("scope", "expires_at_ms", "signature")}
    return type(delegation)(**kept | fields)


@pytest.fixture
def closed():
    return ClosedSwarm(OWNER.public_key, SWARM_ID)


@pytest.fixture
def trust(closed):
    return RecordTrust(RecordStore(), closed=closed)


def admit(trust, record, *, now=NOW, count_nearer=0):
    return trust.admit(KEY, record.raw, source="source", count_nearer=count_nearer, now=now)


def cases():
    return [pytest.param(record, seen, id=name.replace(" ", "-")) for name, record, seen in attacks()]


@pytest.mark.parametrize(("bad", "seen_by_storers"), cases())
def test_storers_refuse_and_readers_ignore(trust, closed, bad, seen_by_storers):
    if seen_by_storers:
        with pytest.raises(NotDelegatedError) as caught:
            admit(trust, bad)
        assert status_of(caught.value) == Status.NOT_DELEGATED
        assert len(trust.store) == 0
        with pytest.raises(NotDelegatedError):
            trust.check_read(KEY, bad.raw, NOW)
    else:
        admit(trust, bad)
        with pytest.raises(NotDelegatedError, match="does not reach"):
            closed.open(trust.check_read(KEY, bad.raw, NOW), PREFIX, NOW)


@pytest.mark.parametrize("scope", ["", "ffn.", "ffn.3.", "ffn.3.7."])
def test_a_member_is_stored_and_read(trust, closed, scope):
    good = record(given_to(scope=scope))
    admit(trust, good)
    opened = closed.open(trust.check_read(KEY, good.raw, NOW), PREFIX, NOW)
    assert (opened.value, opened.scope, opened.raw) == (b"payload", scope, good.raw)


def test_a_tombstone_needs_a_delegation_too(trust):
    good = record(given_to())
    admit(trust, good)
    with pytest.raises(NotDelegatedError):
        admit(trust, record(None, payload=b"", ahead_s=1))
    assert trust.store.records(KEY, NOW) == [good]


def test_a_delegation_does_not_replace_the_records_own_signature(trust):
    good = record(given_to())
    forged = sign_record(MALLORY, KEY, good.value, sequence=good.sequence, expires_at_ms=good.expires_at_ms)
    stolen = forged.raw.replace(MALLORY.public_key, ALICE.public_key)
    with pytest.raises(BadSignatureError):
        trust.admit(KEY, stolen, source="s", count_nearer=0, now=NOW)


@pytest.mark.parametrize(("late_s", "taken"), [(-1, True), (59, True), (60, False), (3600, False)])
def test_clocks_a_minute_apart_agree_on_the_end(trust, late_s, taken):
    late = record(given_to(ttl_s=-late_s))
    if taken:
        admit(trust, late)
    else:
        with pytest.raises(NotDelegatedError, match="ended"):
            admit(trust, late)


def test_a_delegation_that_ends_between_storing_and_reading(trust, closed):
    good = record(given_to(ttl_s=1))
    admit(trust, good)
    with pytest.raises(NotDelegatedError):
        closed.open(good, PREFIX, NOW + 61)


def test_one_signature_of_the_owner_for_all_records_of_a_member(trust, monkeypatch):
    import p2pmoe.protocol.delegations as module

    seen = []
    real = module.verify
    monkeypatch.setattr(module, "verify", lambda *arguments: seen.append(arguments) or real(*arguments))
    for part in range(8):
        admit(trust, record(given_to(), part=part))
    assert len(seen) == 1
    admit(trust, record(given_to(BOB), who=BOB))
    assert len(seen) == 2


def test_what_was_seen_is_bounded(closed, monkeypatch):
    monkeypatch.setattr("p2pmoe.protocol.delegations.verify", lambda *_: None)
    one = record(given_to())
    for number in range(MAX_VERIFIED + 10):
        closed.check(one, _changed(given_to(), expires_at_ms=number))
    assert len(closed._verified) == MAX_VERIFIED


def test_the_cheap_rules_come_first(trust, monkeypatch):
    def never(*_):
        pytest.fail("a signature was checked")

    monkeypatch.setattr("p2pmoe.protocol.delegations.verify", never)
    monkeypatch.setattr("p2pmoe.protocol.records.verify", never)
    foreign = record(given_to(owner=MALLORY))
    for bad, arguments in [(record(None), {}), (record(given_to(ttl_s=-61)), {}), (foreign, {"count_nearer": 16})]:
        with pytest.raises(RecordError):
            admit(trust, bad, **arguments)


def test_a_foreign_delegation_costs_one_signature_not_two(trust, monkeypatch):
    monkeypatch.setattr("p2pmoe.protocol.records.verify", lambda *_: pytest.fail("the record's was checked as well"))
    with pytest.raises(NotDelegatedError):
        admit(trust, record(given_to(owner=MALLORY)))


# --- over the network -------------------------------------------------------------------------------------------


async def test_a_storer_answers_with_a_status_and_charges_for_it(make_peer, make_stranger, closed):
    alice, mallory = await make_peer("alice", closed=closed), make_stranger()
    alice.budgets._rate, alice.budgets._burst = 0, 60_000
    token = await mallory.token_from(alice)
    now = time.time()
    for name, bad, seen in attacks(now):
        if seen:
            reply = await mallory.ask(Store(b"12345678", b"", token, KEY, [bad.raw]), alice.address)
            assert reply.statuses == bytes([Status.NOT_DELEGATED]), name
    assert len(alice.storage) == 0
    good = record(given_to(now=now), now=now)
    assert (await mallory.ask(Store(b"12345678", b"", token, KEY, [good.raw]), alice.address)).statuses == b"\0"
    for _ in range(10):
        mallory.send(Store(b"12345678", b"", token, KEY, [record(None, now=now).raw]), alice.address)
    await make_stranger("bob").silence(alice)
    assert alice.protocol.counters.over_budget > 0


async def test_a_reader_ignores_what_a_lying_storer_hands_out(make_peer, make_stranger, closed):
    now = time.time()
    bad = [each.raw for _, each, seen in attacks(now) if seen]
    good = record(given_to(now=now), now=now, part=7)
    alice = await make_peer("alice", closed=closed)
    for number in range(0, len(bad), 2):
        lies = [*bad[number : number + 2], good.raw]
        liar = make_stranger(f"liar-{number}", _liar(identity_of(f"liar-{number}"), lies))
        alice.table.heard_from(liar.contact, 0)
    assert [each.raw for each in await alice.get(KEY)] == [good.raw]
    assert alice.undelegated == len(bad)


def _liar(identity, records):
    def answer(message, _):
        if not isinstance(message, Find):
            return Pong(message.id, identity.node_id, b"", b"", 0)
        return Found(message.id, identity.node_id, b"", b"", b"", identity.node_id[:8], 1, records)

    return answer


async def test_nodes_of_a_closed_swarm(start_closed, write_delegation, caplog):
    """alice may write anything, bob below ffn.3. only, carol has no delegation, dave reads, eve is not told."""
    alice = start_closed("alice", delegation_path=write_delegation("alice"))
    peers = (alice.dht_address,)
    bob = start_closed("bob", initial_peers=peers, delegation_path=write_delegation("bob", scope="ffn.3."))
    carol = start_closed("carol", initial_peers=peers)
    dave = start_closed("dave", initial_peers=peers, client_mode=True)
    await alice.put("ffn.3.", [b"of alice"])
    await bob.put("ffn.3.", [b"of bob"])
    await bob.put("ffn.", [b"the way"])
    for node in (alice, bob, carol, dave):
        assert {(each.value, each.scope) for each in await node.get("ffn.3.")} == {
            (b"of alice", ""),
            (b"of bob", "ffn.3."),
        }
    with pytest.raises(DelegationError, match=r"covers ffn\.3\.\*, not ffn\.4\."):
        await bob.put("ffn.4.", [b"not mine"])
    with pytest.raises(DelegationError, match="ask the owner for one"):
        await carol.put("ffn.3.", [b"no leave"])
    eve = start_closed("eve", initial_peers=peers, client_mode=True, owner=None)
    with caplog.at_level(logging.WARNING):
        assert len(await eve.get("ffn.3.")) == 2
    assert "it has an owner" in caplog.text


async def test_a_member_with_a_cheating_node_gets_nothing_outside_its_scope_read(start_closed, write_delegation):
    alice = start_closed("alice", delegation_path=write_delegation("alice"))
    bob = start_closed(
        "bob", initial_peers=(alice.dht_address,), delegation_path=write_delegation("bob", scope="ffn.3.")
    )
    bob.signer.require_scope = lambda _: None
    assert await bob.put("ffn.4.", [b"not mine"]) == 2, "storers cannot see the prefix"
    assert await alice.get("ffn.4.") == []
    assert alice.stats().records_undelegated == 1


@pytest.fixture
def write_delegation(tmp_path):
    def write(name, *, scope="", ttl_s=7200.0, owner=OWNER, swarm_id=SWARM_ID, path=None):
        given = given_to(identity_of(name), owner=owner, scope=scope, ttl_s=ttl_s, swarm_id=swarm_id, now=time.time())
        path = path or tmp_path / f"{name}.txt"
        path.write_text(format_delegation(given, identity_of(name).public_key, swarm_id, ""))
        return str(path)

    return write


@pytest.fixture
def start_closed():
    nodes = []

    def start(name, *, client_mode=False, **config):
        config = {"owner": OWNER.public_key.hex()} | config
        node = DHTNode(identity_of(name), DHTConfig(swarm_id=SWARM_ID, **config), client_mode=client_mode)
        nodes.append(node)
        node.start()
        return node

    yield start
    for node in nodes:
        node.close()


# --- our own delegation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "zz" * 32, "ab" * 31, "ab" * 33])
def test_an_owner_is_a_public_key(text):
    with pytest.raises(ConfigError, match=r"dht\.owner"):
        DHTNode(ALICE, DHTConfig(owner=text))


def test_a_delegation_without_an_owner_is_a_config_error():
    with pytest.raises(ConfigError, match=r"needs dht\.owner"):
        DHTNode(ALICE, DHTConfig(delegation_path="x"))


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"#" * 5000, b"lAGg", b"not base64 at all"])
def test_a_file_that_is_no_delegation_stops_the_start(tmp_path, closed, content):
    path = tmp_path / "alice.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DelegationError, match=r"alice\.txt"):
        OwnDelegation(str(path), closed, ALICE.public_key).load()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_delegation(write_delegation, closed, tmp_path, encoding):
    path = tmp_path / "alice.txt"
    write_delegation("alice", path=path)
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    own = OwnDelegation(str(path), closed, ALICE.public_key)
    own.load()
    assert own.current(time.time()).scope == ""


@pytest.mark.parametrize("wrong", [{"owner": MALLORY}, {"swarm_id": "other"}, {"name": "bob"}])
def test_a_delegation_for_somebody_else_stops_the_start(write_delegation, closed, wrong):
    path = write_delegation(wrong.pop("name", "alice"), **wrong)
    with pytest.raises(DelegationError, match="was not given by"):
        OwnDelegation(path, closed, ALICE.public_key).load()


def test_an_end_in_sight_is_said_once_and_a_new_file_is_taken_without_a_restart(
    write_delegation, closed, caplog, tmp_path
):
    now = time.time()
    path = tmp_path / "alice.txt"
    own = OwnDelegation(write_delegation("alice", ttl_s=7100, path=path), closed, ALICE.public_key)
    own.load()
    with caplog.at_level(logging.WARNING):
        first = own.current(now)
        own.current(now + 60)
    assert caplog.text.count("ends in 1 h") == 1
    with pytest.raises(DelegationError, match="no restart is needed"):
        own.current(now + 7300)
    write_delegation("alice", ttl_s=10 * 86_400, scope="ffn.", path=path)
    renewed = own.current(now + 7300)
    assert renewed.expires_at > first.expires_at
    assert renewed.scope == "ffn."
    with caplog.at_level(logging.WARNING):
        own.current(now + 7400)
    assert caplog.text.count("ends in") == 1


def test_a_broken_new_file_leaves_the_old_delegation_in_force(write_delegation, closed, tmp_path):
    now = time.time()
    path = tmp_path / "alice.txt"
    own = OwnDelegation(write_delegation("alice", ttl_s=7200, path=path), closed, ALICE.public_key)
    own.load()
    path.write_text("half a fi")
    assert own.current(now + 60).scope == ""
