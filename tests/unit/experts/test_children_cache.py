"""The cache of children: freshness, unreachable peers, bounds, threads. Time is a number."""

from __future__ import annotations

import threading

import pytest

from p2pmoe.experts.cache import ChildrenCache
from p2pmoe.experts.children import NO_CHILDREN, Provider, children_of, first_expiry
from p2pmoe.experts.left_out import MAX_UNREACHABLE
from p2pmoe.identity import Identity
from p2pmoe.protocol.records import Record, key_of, sign_record
from p2pmoe.types import Endpoint

HERE = Endpoint("192.0.2.7", 8080)


def provider(peer: str, *, expires_at: float = 1000.0) -> Provider:
    return Provider(peer, HERE, "ab", expires_at, 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cache(clock):
    return ChildrenCache(clock, max_age_s=10, negative_s=3)


ALICE, BOB = provider("alice"), provider("bob")


def test_fresh_for_ten_seconds(cache, clock):
    cache.put("ffn.", {1: (ALICE,)})
    clock.now = 9.9
    assert cache.get("ffn.") == {1: (ALICE,)}
    clock.now = 10
    assert cache.get("ffn.") is None
    assert cache.get("other.") is None


def test_no_longer_than_the_first_expiry(cache, clock):
    cache.put("ffn.", {1: (ALICE, provider("bob", expires_at=4))})
    clock.now = 4
    assert cache.get("ffn.") is None


def test_empty_answers_live_three_seconds(cache, clock):
    cache.put("ffn.", NO_CHILDREN)
    assert cache.get("ffn.") == {}
    clock.now = 3
    assert cache.get("ffn.") is None


def test_an_unreachable_peer_is_left_out_of_cached_answers_until_it_returns(cache, clock):
    cache.put("ffn.", {1: (ALICE, BOB), 2: (BOB,)})
    cache.mark_unreachable("bob", 5)
    assert cache.get("ffn.") == {1: (ALICE,)}
    assert cache.filtered({2: (BOB,)}) == {}
    clock.now = 5
    assert cache.get("ffn.") == {1: (ALICE, BOB), 2: (BOB,)}
    assert cache.filtered({2: (BOB,)}) == {2: (BOB,)}
    cache.mark_unreachable("bob", 5)
    cache.mark_reachable("bob")
    cache.mark_reachable("nobody")
    assert cache.get("ffn.") == {1: (ALICE, BOB), 2: (BOB,)}


def test_a_shorter_mark_does_not_shorten_a_longer_one(cache, clock):
    cache.put("ffn.", {1: (ALICE, BOB)})
    cache.mark_unreachable("bob", 9)
    cache.mark_unreachable("bob", 2)
    clock.now = 5
    assert cache.get("ffn.") == {1: (ALICE,)}


def test_unreachable_peers_are_bounded(cache):
    for number in range(MAX_UNREACHABLE + 10):
        cache.mark_unreachable(f"peer-{number}", 5 + number)
    assert len(cache._unreachable) == MAX_UNREACHABLE
    assert "peer-0" not in cache._unreachable


def test_one_address_of_a_peer_is_left_out_until_it_announces_itself_anew(cache, clock):
    elsewhere = Provider("bob", Endpoint("192.0.2.8", 8080), "ab", 1000.0, 1)
    again = Provider("bob", HERE, "ab", 1000.0, 2)
    cache.put("ffn.", {1: (ALICE, BOB), 2: (elsewhere,), 3: (again,)})
    cache.mark_unreachable("bob", 5, endpoint=HERE, sequence=1)
    shown = {1: (ALICE,), 2: (elsewhere,), 3: (again,)}
    assert cache.get("ffn.") == shown
    assert cache.announced("ffn.") == {1: (ALICE, BOB), 2: (elsewhere,), 3: (again,)}
    cache.mark_unreachable("bob", 2, endpoint=HERE, sequence=2)  # silent again; the longer of the two counts
    clock.now = 4
    assert cache.get("ffn.") == {1: (ALICE,), 2: (elsewhere,)}
    clock.now = 5
    assert cache.get("ffn.") == {1: (ALICE, BOB), 2: (elsewhere,), 3: (again,)}


def test_one_expert_of_a_peer_is_left_out_and_its_others_are_not(cache):
    cache.put("ffn.", {1: (ALICE, BOB), 2: (BOB,)})
    cache.put("ffn.1.", {2: (BOB,)})
    cache.mark_unreachable("bob", 5, uid="ffn.2")
    assert cache.get("ffn.") == {1: (ALICE, BOB)}
    assert cache.get("ffn.1.") == {2: (BOB,)}
    cache.mark_unreachable("bob", 5, uid="ffn.1.2")
    assert cache.get("ffn.1.") == {}
    cache.mark_reachable("bob")
    assert (cache.get("ffn."), cache.get("ffn.1.")) == ({1: (ALICE, BOB), 2: (BOB,)}, {2: (BOB,)})


def test_prefixes_are_bounded(cache, monkeypatch):
    monkeypatch.setattr("p2pmoe.experts.cache.MAX_PREFIXES", 10)
    for number in range(30):
        cache.put(f"p{number}.", {1: (ALICE,)})
    assert len(cache._entries) == 10
    assert cache.get("p29.") is not None


def test_ageing(cache, clock):
    cache.put("ffn.", {1: (ALICE,)})
    assert not cache.is_ageing("ffn.", 0.6)
    clock.now = 6
    assert cache.is_ageing("ffn.", 0.6)
    assert not cache.is_ageing("other.", 0.6)


def test_invalidate(cache):
    for prefix in ("a.", "b."):
        cache.put(prefix, {1: (ALICE,)})
    cache.invalidate("a.")
    assert (cache.get("a."), cache.get("b.")) == (None, {1: (ALICE,)})
    cache.invalidate()
    assert cache.get("b.") is None


def test_readers_and_writers_on_threads(cache):
    stop = threading.Event()
    wrong = []

    def read():
        while not stop.is_set():
            children = cache.get("ffn.")
            if children is not None and 1 in children and ALICE not in children[1]:
                wrong.append(children)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(300):
        cache.put("ffn.", {1: (ALICE, BOB)})
        cache.mark_unreachable("bob", 5)
        cache.mark_reachable("bob")
        cache.invalidate("ffn." if number % 3 == 0 else "x.")
    stop.set()
    for reader in readers:
        reader.join(5)
    assert not wrong


# --- children out of records ------------------------------------------------------------------------------------


def record(identity: Identity, children, digest="ab", *, part=0, sequence=1) -> Record:
    from p2pmoe.experts.bundles import Bundle, encode_bundle

    value = encode_bundle(Bundle(HERE, digest, children))
    return sign_record(identity, key_of("x", "ffn."), value, part=part, sequence=sequence, expires_at_ms=1_000_000)


def test_children_of_several_peers_are_merged():
    alice, bob = Identity.generate(), Identity.generate()
    children = children_of([record(alice, (1, 2)), record(bob, (2, 3))])
    assert {child: {p.peer_id for p in providers} for child, providers in children.items()} == {
        1: {alice.peer_id},
        2: {alice.peer_id, bob.peer_id},
        3: {bob.peer_id},
    }
    (provider,) = children[1]
    assert provider.endpoint == HERE.with_public_key(alice.public_key)
    assert (provider.expires_at, provider.sequence, provider.schema_digest) == (1000.0, 1, "ab")
    assert first_expiry(children) == 1000.0


def test_of_two_bundles_of_one_peer_the_newer_counts():
    alice = Identity.generate()
    older, newer = record(alice, (1, 2), "aa", sequence=1), record(alice, (2,), "bb", part=1, sequence=2)
    for records in ([older, newer], [newer, older]):
        children = children_of(records)
        assert [(child, p.schema_digest) for child, ps in children.items() for p in ps] == [(1, "aa"), (2, "bb")]


def test_a_child_may_be_an_expert_and_a_prefix():
    alice = Identity.generate()
    children = children_of([record(alice, (1,), "aa"), record(alice, (1,), "", part=1)])
    assert [p.schema_digest for p in children[1]] == ["", "aa"]


def test_values_that_are_no_bundles_are_left_out():
    alice = Identity.generate()
    junk = sign_record(alice, key_of("x", "ffn."), b"junk", sequence=1, expires_at_ms=1)
    assert children_of([junk]) == {}
    assert first_expiry({}) == float("inf")
