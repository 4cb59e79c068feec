"""The look-up as a state machine: whom it asks, when it ends, what liars can do to it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.dht.lookup import MAX_ASKED, MAX_CANDIDATES, Lookup
from p2pmoe.protocol.datagrams import Contact


def contact(number: int, host: str = "192.0.2.1", port: int = 1) -> Contact:
    return Contact(number.to_bytes(20, "big"), host, port)


def test_asks_the_nearest_first_and_alpha_at_a_time():
    lookup = Lookup(0, map(contact, range(1, 20)), width=8, alpha=3)
    assert lookup.next_to_ask() == [contact(1), contact(2), contact(3)]
    assert lookup.next_to_ask() == []
    lookup.answered(contact(2))
    assert lookup.next_to_ask() == [contact(4)]


def test_is_done_when_the_width_nearest_have_answered():
    lookup = Lookup(0, map(contact, range(1, 20)), width=4, alpha=4)
    for each in lookup.next_to_ask():
        assert not lookup.done
        lookup.answered(each)
    assert lookup.done
    assert lookup.next_to_ask() == []
    assert lookup.nearest(2) == [contact(1), contact(2)]


def test_nearer_nodes_that_are_found_are_asked_before_it_is_done():
    lookup = Lookup(0, [contact(100)], width=2, alpha=2)
    lookup.next_to_ask()
    lookup.answered(contact(100), [contact(1), contact(2)])
    assert not lookup.done
    assert lookup.next_to_ask() == [contact(1), contact(2)]
    lookup.answered(contact(1))
    lookup.answered(contact(2))
    assert lookup.done
    assert lookup.nearest() == [contact(1), contact(2), contact(100)]


def test_a_slow_request_frees_its_place_and_is_still_awaited():
    lookup = Lookup(0, map(contact, range(1, 10)), width=2, alpha=2)
    assert lookup.next_to_ask() == [contact(1), contact(2)]
    lookup.slow(contact(1))
    assert lookup.next_to_ask() == [contact(3)]
    lookup.answered(contact(2))
    lookup.answered(contact(3))
    assert not lookup.done
    lookup.late(contact(1))
    assert lookup.done
    lookup.answered(contact(1))
    assert lookup.nearest(2) == [contact(1), contact(2)]


def test_without_enough_others_late_ones_are_waited_for():
    lookup = Lookup(0, [contact(1), contact(2)], width=8, alpha=5)
    lookup.next_to_ask()
    lookup.answered(contact(2))
    lookup.late(contact(1))
    assert not lookup.done
    lookup.failed(contact(1))
    assert lookup.done


def test_a_late_node_that_missed_before_is_not_waited_for():
    lookup = Lookup(0, [contact(2)], width=8, alpha=5)
    lookup.add(contact(1), doubtful=True)
    lookup.next_to_ask()
    lookup.answered(contact(2))
    lookup.slow(contact(1))
    lookup.late(contact(1))
    assert lookup.done


def test_where_nobody_answers_those_given_up_are_waited_for():
    """All our contacts missed a request once, and now our own machine is slow."""
    lookup = Lookup(0, [], width=8, alpha=5)
    for number in (1, 2, 3):
        lookup.add(contact(number), doubtful=True)
    for each in lookup.next_to_ask():
        lookup.late(each)
    assert not lookup.done
    lookup.failed(contact(1))
    assert not lookup.done
    lookup.answered(contact(2))
    assert lookup.done
    lookup.answered(contact(3))
    assert lookup.nearest() == [contact(2), contact(3)]


def test_when_all_have_failed_it_is_done():
    lookup = Lookup(0, [], width=8, alpha=5)
    lookup.add(contact(1), doubtful=True)
    lookup.next_to_ask()
    lookup.late(contact(1))
    lookup.failed(contact(1))
    assert lookup.done


@pytest.mark.parametrize(("late", "hasty"), [(0, False), (4, False), (5, True), (8, True)])
def test_a_no_of_a_minority_is_hasty(late, hasty):
    lookup = Lookup(0, [contact(number) for number in range(1, 21)], width=8, alpha=20)
    while asked := lookup.next_to_ask():
        for each in asked:
            (lookup.late if int.from_bytes(each.node_id, "big") <= late else lookup.answered)(each)
    assert lookup.done
    assert lookup.is_hasty == hasty


def test_nobody_to_ask_is_done():
    assert Lookup(0, [], width=8, alpha=5).done


def test_we_are_never_a_candidate():
    lookup = Lookup(0, [contact(1), contact(2)], width=8, alpha=5, own_id=contact(1).node_id)
    assert lookup.next_to_ask() == [contact(2)]


def test_a_good_nodes_id_with_a_dead_address_does_not_hide_the_good_node():
    liar, good = contact(1, port=666), contact(1, port=1)
    lookup = Lookup(0, [contact(9)], width=2, alpha=5)
    lookup.next_to_ask()
    lookup.answered(contact(9), [liar, good, contact(1, port=667)])
    assert sorted(lookup.next_to_ask()) == [good, liar]
    lookup.failed(liar)
    lookup.answered(good)
    assert lookup.done
    assert lookup.nearest() == [good, contact(9)]


def test_a_flood_of_candidates_is_bounded():
    lookup = Lookup(0, [contact(2**100)], width=8, alpha=5)
    lookup.next_to_ask()
    lookup.answered(contact(2**100), map(contact, range(1, 5000)))
    asked = 1
    while not lookup.done:
        for each in lookup.next_to_ask():
            asked += 1
            lookup.failed(each)
    assert asked <= MAX_ASKED
    assert str(MAX_CANDIDATES - 1 - (MAX_ASKED - 1)) in repr(lookup)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(5, 120), st.floats(0, 0.6))
def test_finds_the_nearest_living_whatever_dies_in_whatever_order(seed, size, dead_share):
    """Every node knows its bucket-wise neighbours, as Kademlia's tables do; the dead answer nothing."""
    dice = random.Random(seed)
    numbers = [dice.getrandbits(160) | 1 for _ in range(size)]
    dead = {number for number in numbers[1:] if dice.random() < dead_share}
    target = dice.getrandbits(160)
    table = {number: _kademlia_table(number, numbers, dice) for number in numbers}
    lookup = Lookup(target, map(contact, table[numbers[0]]), width=8, alpha=5, own_id=contact(numbers[0]).node_id)
    under_way: list[Contact] = []
    for _ in range(10_000):
        under_way += lookup.next_to_ask()
        if lookup.done:
            break
        each = under_way.pop(dice.randrange(len(under_way)))
        number = int.from_bytes(each.node_id, "big")
        if number in dead:
            dice.choice([lookup.failed, lambda c: (lookup.slow(c), lookup.late(c), lookup.failed(c))])(each)
        else:
            known = sorted(table[number], key=lambda other: other ^ target)[:12]
            lookup.answered(each, map(contact, known))
    assert lookup.done
    living = [number for number in numbers[1:] if number not in dead]
    found = [int.from_bytes(each.node_id, "big") for each in lookup.nearest(8)]
    reachable = sorted(living, key=lambda number: number ^ target)[: len(found)]
    if not dead:
        assert found == reachable


def _kademlia_table(own: int, numbers: list[int], dice: random.Random) -> list[int]:
    buckets: dict[int, list[int]] = {}
    for number in numbers:
        if number != own:
            buckets.setdefault((number ^ own).bit_length(), []).append(number)
    return [number for bucket in buckets.values() for number in dice.sample(bucket, min(20, len(bucket)))]
