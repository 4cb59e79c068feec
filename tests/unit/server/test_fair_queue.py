"""FairQueue and DeviceShares: whoever waits gets a fair part, whatever the others ask for."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.server.fair_queue import DeviceShares, FairQueue

NAMES = "abcd"


@dataclass(eq=False)
class Item:
    caller: str
    rows: int = 1
    arrived: float = 0.0
    dead: bool = False

    def is_dead(self, now: float) -> bool:
        return self.dead


def fill(queue: FairQueue[Item], *groups: tuple[str, int, int]) -> None:
    for caller, count, rows in groups:
        for _ in range(count):
            queue.append(Item(caller, rows))


def served(queue: FairQueue[Item], rounds: int, max_rows: int = 1) -> Counter[str]:
    """Rows by caller of so many batches."""
    rows: Counter[str] = Counter()
    for _ in range(rounds):
        for item in queue.take(max_rows, 0.0)[0]:
            rows[item.caller] += item.rows
    return rows


def test_one_caller_is_served_in_order() -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item("a", 1 + index % 3) for index in range(20)]
    for item in items:
        queue.append(item)
    taken: list[Item] = []
    while queue:
        taken += queue.take(4, 0.0)[0]
    assert taken == items


def test_two_callers_get_half_each_whatever_the_size_of_their_calls() -> None:
    queue: FairQueue[Item] = FairQueue()
    fill(queue, ("greedy", 1000, 16), ("honest", 1000, 4))
    rows = served(queue, 500)
    assert abs(rows["greedy"] - rows["honest"]) <= 20


def test_a_batch_takes_from_everybody_who_waits() -> None:
    queue: FairQueue[Item] = FairQueue()
    fill(queue, ("greedy", 1000, 1), ("honest", 3, 1), ("other", 3, 1))
    taken, rows, _ = queue.take(64, 0.0)
    assert rows == 64
    assert Counter(item.caller for item in taken) == {"greedy": 58, "honest": 3, "other": 3}


def test_a_newcomer_is_next_but_one() -> None:
    queue: FairQueue[Item] = FairQueue()
    fill(queue, ("greedy", 1000, 1))
    served(queue, 300)
    queue.append(Item("honest"))
    assert "honest" in served(queue, 2)


def test_a_pause_earns_nothing() -> None:
    queue: FairQueue[Item] = FairQueue()
    fill(queue, ("early", 1, 1), ("busy", 1000, 1))
    served(queue, 500)
    fill(queue, ("early", 500, 1))
    rows = served(queue, 100)
    assert abs(rows["early"] - rows["busy"]) <= 2


def test_coming_one_at_a_time_earns_nothing() -> None:
    """A caller whose line is empty again and again must still pay for what it was given."""
    queue: FairQueue[Item] = FairQueue()
    fill(queue, ("patient", 2000, 1))
    rows: Counter[str] = Counter()
    queue.append(Item("large", 100))
    for _ in range(1000):
        for item in queue.take(1, 0.0)[0]:
            rows[item.caller] += item.rows
            if item.caller == "large":
                queue.append(Item("large", 100))
    assert abs(rows["large"] - rows["patient"]) <= 200


def test_push_out_takes_from_the_longest_line_only_for_a_shorter_one() -> None:
    queue: FairQueue[Item] = FairQueue()
    fill(queue, ("greedy", 5, 2), ("other", 2, 2))
    newest = Item("greedy", 7)
    queue.append(newest)
    assert queue.push_out("greedy") is None
    assert queue.push_out("honest") is newest
    assert (len(queue), queue.rows) == (7, 14)
    fill(queue, ("honest", 4, 1))
    assert queue.push_out("honest") is None, "its line would be as long as the longest"
    assert queue.push_out("other") is not None


Step = tuple[str, int, str]
steps = st.lists(
    st.tuples(st.sampled_from(NAMES), st.integers(0, 9), st.sampled_from(["add", "take", "kill", "sweep", "push"])),
    max_size=120,
)


@given(steps, st.integers(1, 20))
def test_every_task_leaves_once_in_its_callers_order(script: list[Step], max_rows: int) -> None:
    queue: FairQueue[Item] = FairQueue()
    model: dict[str, deque[Item]] = {name: deque() for name in NAMES}

    def gone(items: list[Item], *, dead: bool) -> None:
        for item in items:
            assert item.dead is dead
            model[item.caller].remove(item)

    for index, (name, number, action) in enumerate(script):
        if action == "add":
            item = Item(name, number, arrived=float(index))
            model[name].append(item)
            queue.append(item)
        elif action == "kill" and len(model[name]) > number:
            model[name][number].dead = True
        elif action == "sweep":
            gone(queue.drop_dead_heads(0.0) if number % 2 else queue.drop_dead(0.0), dead=True)
        elif action == "push":
            lengths = {each: len(items) for each, items in model.items()}
            out = queue.push_out(name)
            if out is None:
                assert max(lengths.values()) <= lengths[name] + 1
            else:
                assert out is model[out.caller].pop()
                assert lengths[out.caller] == max(lengths.values()) > lengths[name] + 1
        elif action == "take":
            waiting = sum(not item.dead for items in model.values() for item in items)
            taken, rows, dead = queue.take(max_rows, 0.0)
            gone(dead, dead=True)
            assert rows == sum(item.rows for item in taken)
            assert bool(taken) == bool(waiting)
            assert len(taken) <= 1 or rows <= max_rows
            for caller in NAMES:  # in order: what was taken of a line stood in front of it
                ours = [item for item in taken if item.caller == caller]
                live = [item for item in model[caller] if not item.dead]
                assert ours == live[: len(ours)]
            gone(taken, dead=False)
        queue.drop_dead_heads(0.0) if action == "sweep" else None
        left = [item for items in model.values() for item in items]
        assert len(queue) == len(queue.tasks()) >= len(left) - sum(item.dead for item in left)
        assert queue.rows == sum(item.rows for item in queue.tasks())
        if not any(item.dead for item in left):
            assert queue.oldest() == min((item.arrived for item in left), default=None)
            assert sorted(queue.callers()) == sorted(name for name in NAMES if model[name])


@given(
    sizes=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 20), min_size=2),
    max_rows=st.integers(1, 40),
    rounds=st.integers(1, 60),
)
def test_the_backlogged_get_equal_rows_within_one_call_each(sizes: dict[str, int], max_rows: int, rounds: int) -> None:
    queue: FairQueue[Item] = FairQueue()
    fill(queue, *((name, rounds * 40, rows) for name, rows in sizes.items()))
    rows = served(queue, rounds, max_rows)
    first, second = max(sizes.values()), sorted(sizes.values())[-2]
    assert max(rows[name] for name in sizes) - min(rows[name] for name in sizes) <= first + second


def test_idle_lines_are_forgotten() -> None:
    queue: FairQueue[Item] = FairQueue()
    fill(queue, ("busy", 5000, 1))
    for index in range(2000):
        queue.append(Item(f"passer {index}"))
        queue.take(2, 0.0)
    assert len(queue._lines) < 100
    while queue:
        queue.take(1000, 0.0)
    assert not queue._lines


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.001, 1.0)), min_size=10, max_size=60))
def test_the_device_goes_to_who_used_least(batches: list[tuple[str, float]]) -> None:
    """Two callers in queues of their own, always waiting, with batches of any length: seconds stay level."""
    costs = {name: deque(cost for each, cost in batches if each == name) for name in "ab"}
    shares, used = DeviceShares(), Counter[str]()
    while all(costs.values()):
        tags = {name: shares.least([name]) for name in "ab"}
        chosen = min(tags, key=lambda name: tags[name])
        shares.advance(tags[chosen])
        cost = costs[chosen].popleft()
        shares.charge([Item(chosen)], cost)
        used[chosen] += cost
        assert abs(used["a"] - used["b"]) <= 1.0 + 1e-9


def test_a_batch_is_paid_by_rows_and_a_newcomer_starts_level() -> None:
    shares = DeviceShares()
    shares.charge([Item("a", 3), Item("b", 1), Item("a", 0)], 1.0)
    assert shares.least(["a"]) == pytest.approx(0.8)
    assert shares.least(["b"]) == pytest.approx(0.2)
    assert shares.least(["a", "b"]) == pytest.approx(0.2)
    shares.advance(0.5)
    assert shares.least(["new"]) == shares.least(["b"]) == 0.5
    shares.forget()
    assert shares.least(["a"]) == shares.least(["new"]) == 0.0


def test_the_table_of_shares_stays_small() -> None:
    shares = DeviceShares()
    for index in range(10_000):
        caller = f"passer {index}"
        shares.advance(shares.least([caller]))
        shares.charge([Item(caller)], 0.001)
        shares.advance(index * 0.001)
    assert len(shares._used) < 100
