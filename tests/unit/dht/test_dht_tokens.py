"""Write tokens and budgets, on a clock made of numbers."""

from __future__ import annotations

from p2pmoe.dht.tokens import MAX_SOURCES, ROTATE_AFTER_S, SourceBudgets, WriteTokens, source_of

ALICE, BOB = ("192.0.2.1", 1), ("192.0.2.1", 2)


def test_a_token_holds_for_its_address_only():
    tokens = WriteTokens(0)
    token = tokens.make(ALICE, 1)
    assert len(token) == 8
    assert tokens.holds(token, ALICE, 2)
    assert not tokens.holds(token, BOB, 2)
    assert not tokens.holds(b"", ALICE, 2)
    assert not WriteTokens(0).holds(token, ALICE, 2)


def test_a_token_outlives_one_rotation_and_not_two():
    tokens = WriteTokens(0)
    token = tokens.make(ALICE, ROTATE_AFTER_S - 1)
    assert tokens.holds(token, ALICE, ROTATE_AFTER_S + 1)
    assert tokens.make(ALICE, ROTATE_AFTER_S + 1) != token
    assert not tokens.holds(token, ALICE, 2 * ROTATE_AFTER_S + 1)


def test_a_long_silence_rotates_twice():
    tokens = WriteTokens(0)
    token = tokens.make(ALICE, 1)
    assert not tokens.holds(token, ALICE, 5 * ROTATE_AFTER_S)


def test_a_subnet_in_the_world_is_one_source_and_a_port_on_the_local_network_is_one():
    assert source_of(("8.8.8.8", 1)) == source_of(("8.8.8.9", 2)) != source_of(("8.8.9.8", 1))
    assert source_of(("2600:1:2::1", 1)) == source_of(("2600:1:2:3::9", 2)) != source_of(("2600:1:3::1", 1))
    assert source_of(("127.0.0.1", 1)) != source_of(("127.0.0.1", 2))


def test_a_budget_is_spent_and_comes_back():
    budgets = SourceBudgets(bytes_per_s=100, burst_bytes=200)
    assert [budgets.spend("alice", 100, 0) for _ in range(3)] == [True, True, False]
    assert budgets.spend("bob", 200, 0)
    assert not budgets.spend("alice", 101, 1)
    assert budgets.spend("alice", 100, 1)
    assert budgets.spend("alice", 200, 100)


def test_a_charge_empties_the_purse_and_no_more():
    budgets = SourceBudgets(bytes_per_s=100, burst_bytes=200)
    budgets.charge("alice", 10_000, 0)
    assert not budgets.spend("alice", 1, 0)
    assert budgets.spend("alice", 100, 1)


def test_sources_are_bounded():
    budgets = SourceBudgets(100, 100)
    for number in range(MAX_SOURCES + 500):
        budgets.spend(str(number), 1, 0)
        budgets.charge(str(number), 1, 0)
    assert len(budgets._used) == MAX_SOURCES
