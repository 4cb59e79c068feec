"""The store: slots, caps, expiry, pages, and who has to go when it is full."""

from __future__ import annotations

from dht_swarm import identity_of
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.dht.store import EMPTY, RecordStore, cut_pages, digest_of
from p2pmoe.protocol.datagrams import MAX_FIRST_PAGE_BYTES, MAX_PAGE_BYTES
from p2pmoe.protocol.records import Record, decode_record, key_of, sign_record

ALICE, BOB, CAROL = map(identity_of, ("alice", "bob", "carol"))
KEY, OTHER = key_of("test", "ffn."), key_of("test", "ffn.3.")
NOW = 1_000_000.0


def record(who=ALICE, *, key=KEY, part=0, sequence=1, ttl_s=60.0, value=b"value") -> Record:
    return sign_record(who, key, value, part=part, sequence=sequence, expires_at_ms=int((NOW + ttl_s) * 1000))


def fake(number: int, *, ttl_s: float = 60.0, value: bytes = b"") -> Record:
    """A record of another signer each, unsigned: the store trusts what it is given."""
    return Record(0, value, 1, int((NOW + ttl_s) * 1000), number.to_bytes(32, "big"), bytes(64), value + bytes(100))


def test_a_slot_holds_the_newest_and_signers_have_their_own():
    store = RecordStore()
    old, new, bobs = record(sequence=1), record(sequence=2), record(BOB)
    for each in (old, bobs, new):
        assert store.put(KEY, each, "source", NOW)
    assert set(store.records(KEY, NOW)) == {new, bobs}
    assert store.get(KEY, old.slot) is new
    assert (len(store), store.key_count, store.size) == (2, 1, len(new.raw) + len(bobs.raw))
    assert store.records(OTHER, NOW) == []


def test_what_has_expired_is_gone_and_leaves_nothing_behind():
    store = RecordStore()
    store.put(KEY, record(ttl_s=10), "source", NOW)
    store.put(KEY, record(BOB, ttl_s=20), "source", NOW)
    assert len(store.records(KEY, NOW + 9.9)) == 2
    assert [each.public_key for each in store.records(KEY, NOW + 10)] == [BOB.public_key]
    assert store.view(KEY, NOW + 20) is EMPTY
    assert (len(store), store.size, store.key_count) == (0, 0, 0)


def test_a_refreshed_record_lives_on():
    store = RecordStore()
    store.put(KEY, record(sequence=1, ttl_s=10), "source", NOW)
    store.put(KEY, record(sequence=2, ttl_s=60), "source", NOW)
    assert len(store.records(KEY, NOW + 30)) == 1


def test_many_refreshes_do_not_grow_the_store():
    store = RecordStore()
    for sequence in range(5000):
        store.put(KEY, fake(1, ttl_s=60 + sequence / 1000), "source", NOW)
    assert len(store) == 1
    assert len(store._expiries) <= 2 + 1024 + 1


def test_equal_sets_have_equal_digests_and_pages_however_they_came():
    one, two = RecordStore(), RecordStore()
    records = [record(who, part=part) for who in (ALICE, BOB, CAROL) for part in range(3)]
    for each in records:
        one.put(KEY, each, "source", NOW)
    for each in reversed(records):
        two.put(KEY, each, "another", NOW)
    assert one.view(KEY, NOW) == two.view(KEY, NOW)
    assert one.view(KEY, NOW).digest == digest_of(records)
    two.put(KEY, record(sequence=2), "source", NOW)
    assert one.view(KEY, NOW).digest != two.view(KEY, NOW).digest


@given(st.lists(st.integers(0, 1040), max_size=60))
def test_pages_hold_everything_within_their_sizes(sizes):
    raws = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    pages = cut_pages(raws)
    assert [raw for page in pages for raw in page] == raws
    for number, page in enumerate(pages):
        assert sum(len(raw) + 3 for raw in page) <= (MAX_PAGE_BYTES if number else MAX_FIRST_PAGE_BYTES)
        assert len(page) <= 16


def test_a_full_key_lets_the_soonest_expiring_of_its_largest_source_go():
    store = RecordStore(max_slots_per_key=10)
    store.put(KEY, fake(100, ttl_s=1), "honest", NOW)
    for number in range(9):
        assert store.put(KEY, fake(number, ttl_s=30 + number), "flood", NOW)
    assert store.put(KEY, fake(50, ttl_s=5), "another", NOW)
    kept = {int.from_bytes(each.public_key, "big") for each in store.records(KEY, NOW)}
    assert kept == {100, 50, *range(1, 9)}


def test_a_flood_of_long_lived_records_does_not_drive_out_the_others():
    store = RecordStore(max_slots_per_key=64)
    for number in range(8):
        assert store.put(KEY, fake(number, ttl_s=60), f"honest-{number}", NOW)
    for number in range(1000, 2000):
        store.put(KEY, fake(number, ttl_s=3600), "sybil", NOW)
    kept = {int.from_bytes(each.public_key, "big") for each in store.records(KEY, NOW)}
    assert kept >= set(range(8))
    assert len(kept) == 64


def test_a_signer_with_many_parts_goes_before_others_of_its_source():
    store = RecordStore(max_slots_per_key=4)
    greedy = [record(ALICE, part=part, ttl_s=100 + part) for part in range(3)]
    for each in (*greedy, record(BOB, ttl_s=10)):
        assert store.put(KEY, each, "relay", NOW)
    assert store.put(KEY, record(CAROL, ttl_s=50), "relay", NOW)
    assert {each.slot for each in store.records(KEY, NOW)} == {
        greedy[1].slot,
        greedy[2].slot,
        (BOB.public_key, 0),
        (CAROL.public_key, 0),
    }


def test_a_newcomer_that_would_be_next_to_go_is_refused():
    store = RecordStore(max_slots_per_key=2)
    store.put(KEY, fake(1, ttl_s=50), "source", NOW)
    store.put(KEY, fake(2, ttl_s=60), "source", NOW)
    assert not store.has_room(KEY, fake(3, ttl_s=40), "source")
    assert not store.put(KEY, fake(3, ttl_s=40), "source", NOW)
    assert store.has_room(KEY, fake(3, ttl_s=70), "source")
    assert store.put(KEY, fake(3, ttl_s=70), "source", NOW)
    assert len(store) == 2


def test_bytes_per_key_are_capped():
    store = RecordStore(max_bytes_per_key=1000)
    for number in range(50):
        store.put(KEY, fake(number, ttl_s=60 + number), f"source-{number}", NOW)
    assert store.size <= 1000


def test_one_source_fills_an_eighth_of_the_store_at_most():
    store = RecordStore(max_bytes=8000)
    taken = sum(store.put(number.to_bytes(20, "big"), fake(number), "flood", NOW) for number in range(100))
    assert taken == 10
    assert store.put(KEY, fake(1), "honest", NOW)


def test_the_whole_store_is_capped_and_the_soonest_expiring_go():
    store = RecordStore(max_bytes=1000, max_keys=5)
    for number in range(20):
        store.put(number.to_bytes(20, "big"), fake(number, ttl_s=60 + number), f"source-{number}", NOW)
    assert store.key_count == 5
    assert store.size <= 1000
    assert {int.from_bytes(key, "big") for key in store.all_keys} == set(range(15, 20))


def test_a_refused_update_leaves_the_old_record():
    store = RecordStore(max_bytes_per_key=300)
    alices, bobs = fake(1), fake(2)
    store.put(KEY, alices, "alice", NOW)
    store.put(KEY, bobs, "bob", NOW)
    assert not store.put(KEY, fake(1, ttl_s=61, value=bytes(250)), "alice", NOW)
    assert set(store.records(KEY, NOW)) == {alices, bobs}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 90), st.integers(0, 3), st.integers(0, 200)),
        max_size=80,
    )
)
def test_the_sums_are_right_whatever_is_put(operations):
    store = RecordStore(max_slots_per_key=4, max_bytes_per_key=900, max_keys=3, max_bytes=2400)
    now = NOW
    for signer, key, ttl_s, source, size in operations:
        now += 1
        each = fake(signer, ttl_s=now - NOW + ttl_s, value=bytes(size))
        store.put(bytes([key]) * 20, each, f"source-{source}", now)
        keys = store.all_keys
        held = [r for k in keys for r in store.records(k, now)]
        assert store.size == sum(len(r.raw) for r in held) <= 2400
        assert len(store) == len(held)
        assert store.key_count <= 3
        assert sum(store._by_source.values()) == store.size
    store.expire(now + 1000)
    assert (len(store), store.size, store.key_count, sum(store._by_source.values())) == (0, 0, 0, 0)


def test_what_is_stored_is_relayed_byte_for_byte():
    store = RecordStore()
    original = record()
    store.put(KEY, decode_record(original.raw), "source", NOW)
    assert store.view(KEY, NOW).pages == ((original.raw,),)
