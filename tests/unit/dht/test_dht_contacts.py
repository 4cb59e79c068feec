"""The routing table: who enters, who leaves, who is nearest."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.dht.contacts import BUCKET_SIZE, MAX_MISSES, STALE_AFTER_S, ContactTable
from p2pmoe.protocol.datagrams import Contact

OWN = bytes(20)


def contact(number: int, host: str = "127.0.0.1", port: int = 1) -> Contact:
    return Contact(number.to_bytes(20, "big"), host, port)


def table_of(*contacts: Contact) -> ContactTable:
    table = ContactTable(OWN)
    for each in contacts:
        table.heard_from(each, 0)
    return table


def test_we_are_not_in_our_own_table():
    assert len(table_of(Contact(OWN, "127.0.0.1", 1))) == 0
    assert not table_of().wants(Contact(OWN, "127.0.0.1", 1))


def test_a_contact_leaves_after_three_misses_that_others_did_not_share():
    alice = contact(1)
    table = table_of(alice)
    for _ in range(10):
        table.missed(alice, heard_others=False)
    assert table.get(alice.node_id).misses == 0
    for _ in range(MAX_MISSES - 1):
        table.missed(alice, heard_others=True)
    assert table.closest(0, 8, answering_only=True) == []
    assert [each.contact for each in table.closest(0, 8)] == [alice]
    table.heard_from(alice, 1)
    assert table.get(alice.node_id).misses == 0
    for _ in range(MAX_MISSES):
        table.missed(alice, heard_others=True)
    assert table.get(alice.node_id) is None
    assert len(table) == 0


def test_an_id_keeps_its_address_while_it_answers_there():
    alice, moved = contact(1, port=1), contact(1, port=2)
    table = table_of(alice)
    assert not table.wants(moved)
    table.heard_from(moved, 1)
    assert table.get(alice.node_id).contact == alice
    table.missed(moved, heard_others=True)
    assert table.get(alice.node_id).misses == 0
    table.missed(alice, heard_others=True)
    assert table.wants(moved)
    table.heard_from(moved, 2)
    assert table.get(alice.node_id).contact == moved


def test_another_node_at_its_address_ends_a_contact():
    alice = contact(1)
    table = table_of(alice)
    table.forget(contact(1, port=2))
    assert len(table) == 1
    table.forget(alice)
    assert len(table) == 0


def test_a_subnet_of_the_world_has_two_places_in_a_bucket():
    far = 2**159 + 1
    crowd = [contact(far + number, host=f"8.8.8.{number + 1}") for number in range(50)]
    table = table_of(*crowd)
    assert len(table) == 2
    assert not table.wants(contact(far + 99, host="8.8.8.99"))
    assert table.wants(contact(far + 99, host="8.8.9.99"))
    table.heard_from(contact(far + 99, host="8.8.9.99"), 0)
    assert len(table) == 3


def test_a_far_bucket_is_full_at_k_and_old_contacts_stay():
    far = 2**159 + 1
    crowd = [contact(far + number) for number in range(100)]
    table = table_of(*crowd)
    for each in crowd[:BUCKET_SIZE]:
        assert table.get(each.node_id) is not None
    assert len(table) == BUCKET_SIZE
    assert not table.wants(contact(far + 1000))
    near = [contact(number) for number in range(1, 50)]
    for each in near:
        table.heard_from(each, 0)
    assert len(table) > BUCKET_SIZE


def test_a_replacement_takes_the_place_of_one_that_left():
    far = 2**159 + 1
    table = table_of(contact(1), *(contact(far + number) for number in range(BUCKET_SIZE + 1)))
    assert table.get(contact(far + BUCKET_SIZE).node_id) is None
    for _ in range(MAX_MISSES):
        table.missed(contact(far), heard_others=True)
    assert table.get(contact(far + BUCKET_SIZE).node_id) is not None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 40))
def test_the_nearest_are_exact(seed, size, count):
    """The stock table's `find_neighbors` finds 57 to 76 % of them."""
    dice = random.Random(seed)
    table = ContactTable(dice.randbytes(20))
    for _ in range(size):
        table.heard_from(Contact(dice.randbytes(20), "127.0.0.1", 1), 0)
    target = dice.getrandbits(160)
    exact = sorted((each.long_id for each in table), key=lambda number: number ^ target)[:count]
    assert [each.long_id for each in table.closest(target, count)] == exact
    assert sum(len(bucket) for bucket in table.buckets) == len(table)


def test_the_silent_are_to_be_pinged_the_longest_silent_first():
    table = table_of(contact(1), contact(2), contact(3))
    table.heard_from(contact(2), STALE_AFTER_S)
    table.heard_from(contact(3), 1)
    table.missed(contact(2), heard_others=True)
    stale = [each.contact for each in table.stale_contacts(STALE_AFTER_S + 2)]
    assert stale == [contact(1), contact(3), contact(2)]


def test_how_many_are_nearer_than_we_are():
    table = table_of(contact(1), contact(2), contact(2**100))
    assert table.count_nearer(0) == 0
    assert table.count_nearer(3) == 2
    table.missed(contact(1), heard_others=True)
    assert table.count_nearer(3) == 1


def test_state_is_printed():
    table = table_of(contact(1))
    assert "1 contacts" in repr(table)
    assert "127.0.0.1:1" in repr(table.get(contact(1).node_id))
