"""Merging what holders answer, some of whom lie."""

from __future__ import annotations

import pytest
from dht_swarm import identity_of

from p2pmoe.dht.harvest import MAX_PAGES, MAX_PAGES_ASKED, Harvest
from p2pmoe.dht.store import RecordStore
from p2pmoe.dht.validation import RecordTrust
from p2pmoe.protocol.datagrams import Contact, Found, Paged
from p2pmoe.protocol.records import key_of, sign_record

KEY = key_of("test", "ffn.")
NOW = 1_700_000_000.0
ALICE, BOB, CAROL = (Contact(bytes([number]) * 20, "192.0.2.1", number) for number in (1, 2, 3))


def record(name="alice", *, sequence=1, value=b"value", ttl_s=60):
    return sign_record(identity_of(name), KEY, value, sequence=sequence, expires_at_ms=int((NOW + ttl_s) * 1000))


def store_of(*records):
    store = RecordStore()
    for each in records:
        store.put(KEY, each, "source", NOW)
    return store.view(KEY, NOW)


def found(view, *, records=None, digest=None, pages=None):
    first = list(view.pages[0]) if view.pages else []
    return Found(
        bytes(8),
        bytes(20),
        b"",
        b"",
        b"",
        view.digest if digest is None else digest,
        view.page_count if pages is None else pages,
        first if records is None else records,
    )


def paged(view, index):
    return Paged(bytes(8), bytes(20), b"", view.digest, view.page_count, list(view.pages[index]))


@pytest.fixture
def harvest():
    return Harvest(KEY, RecordTrust(RecordStore()))


def test_equal_holders_are_read_once(harvest):
    view = store_of(*(record(f"signer-{number}") for number in range(30)))
    assert view.page_count > 3
    assert harvest.found(ALICE, found(view), NOW) == [(ALICE, index) for index in range(1, view.page_count)]
    assert harvest.found(BOB, found(view), NOW) == []
    assert harvest.is_reading
    assert not harvest.agreed()
    for index in range(1, view.page_count):
        assert harvest.paged(ALICE, view.digest, index, paged(view, index), NOW) == []
    assert not harvest.is_reading
    assert harvest.agreed()
    assert len(harvest.merged(NOW)) == 30


def test_the_newest_record_of_each_slot_wins_whoever_answers_first(harvest):
    old, new, bobs = record(sequence=1), record(sequence=2, value=b"new"), record("bob")
    harvest.found(ALICE, found(store_of(new)), NOW)
    harvest.found(BOB, found(store_of(old, bobs)), NOW)
    assert set(harvest.merged(NOW)) == {new, bobs}
    assert not harvest.agreed()


def test_what_holders_lack_is_known(harvest):
    old, new, bobs = record(sequence=1), record(sequence=2), record("bob")
    harvest.found(ALICE, found(store_of(new)), NOW)
    harvest.found(BOB, found(store_of(old, bobs)), NOW)
    harvest.found(CAROL, found(store_of()), NOW)
    assert harvest.lacking(ALICE, NOW) == [bobs]
    assert harvest.lacking(BOB, NOW) == [new]
    assert set(harvest.lacking(CAROL, NOW)) == {new, bobs}


def test_expired_and_forged_records_are_left_out(harvest):
    good, gone = record(), record("bob", ttl_s=-1)
    forged = record("carol").raw[:-1] + b"\0"
    view = store_of(good)
    harvest.found(ALICE, found(view, records=[good.raw, gone.raw, forged, b"junk", b""]), NOW)
    assert harvest.merged(NOW) == [good]
    assert harvest.rejected == 4
    assert harvest.merged(NOW + 61) == []


def test_a_liar_with_an_honest_digest_does_not_silence_the_honest(harvest):
    """Mallory names the digest of what bob holds, and hands out something else."""
    honest = store_of(record())
    harvest.found(ALICE, found(honest, records=[record("mallory").raw]), NOW)
    harvest.found(BOB, found(honest), NOW)
    assert record() in harvest.merged(NOW)
    assert not harvest.agreed()


def test_a_liar_that_withholds_pages_is_replaced(harvest):
    view = store_of(*(record(f"signer-{number}") for number in range(30)))
    harvest.found(ALICE, found(view), NOW)
    harvest.found(BOB, found(view), NOW)
    again = harvest.paged(ALICE, view.digest, 1, None, NOW)
    assert again == [(BOB, index) for index in range(1, view.page_count)]
    assert harvest.paged(ALICE, view.digest, 2, paged(view, 2), NOW) == []
    for _, index in again:
        harvest.paged(BOB, view.digest, index, paged(view, index), NOW)
    assert len(harvest.merged(NOW)) == 30


def test_a_slow_page_is_asked_for_elsewhere_too(harvest):
    view = store_of(*(record(f"signer-{number}") for number in range(12)))
    harvest.found(ALICE, found(view), NOW)
    assert harvest.elsewhere(ALICE, view.digest, 1) == []
    harvest.found(BOB, found(view), NOW)
    assert harvest.elsewhere(ALICE, view.digest, 1) == [(BOB, 1)]
    assert harvest.paged(BOB, view.digest, 1, None, NOW) == [], "the one asked first is still waited for"
    harvest.paged(BOB, view.digest, 1, paged(view, 1), NOW)
    assert harvest.elsewhere(ALICE, view.digest, 1) == []


def test_many_liars_with_an_honest_digest_neither_silence_it_nor_ask_much_of_us(harvest):
    view = store_of(*(record(f"signer-{number}") for number in range(30)))
    asked = 0
    for number in range(20):
        liar = Contact(bytes([number]) * 20, "192.0.2.1", 1)
        asked += len(harvest.found(liar, found(view, records=[b"junk"], pages=500), NOW))
        harvest.paged(liar, view.digest, 1, None, NOW)
    assert asked <= MAX_PAGES_ASKED
    liar = Contact(bytes(20), "192.0.2.1", 1)
    one_page = store_of(record())
    for _ in range(20):
        harvest.found(liar, found(one_page, records=[b"junk"]), NOW)
    harvest.found(CAROL, found(one_page), NOW)
    assert harvest.merged(NOW) == [record()]


def test_pages_and_digests_of_a_liar_are_bounded(harvest):
    asked = harvest.found(ALICE, found(store_of(), digest=b"12345678", pages=65535, records=[b"x"]), NOW)
    assert len(asked) < MAX_PAGES
    for number in range(1000):
        harvest.found(ALICE, found(store_of(), digest=number.to_bytes(8, "big"), pages=1, records=[b"x"]), NOW)
    assert len(harvest._sets) <= 16


def test_answers_that_were_not_asked_for_are_ignored(harvest):
    view = store_of(record())
    assert harvest.paged(ALICE, view.digest, 0, paged(view, 0), NOW) == []
    harvest.found(ALICE, found(view), NOW)
    assert harvest.paged(ALICE, view.digest, 0, paged(view, 0), NOW) == []
    assert len(harvest.merged(NOW)) == 1
