"""TaskPool: bounded, batched, in order, and nothing dead ever reaches a device."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe import TaskPool
from p2pmoe.errors import BadRequestError, ExpiredCallError, OverloadedError, SchemaError


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bell:
    """A runtime that only listens."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def queued(self, pool: TaskPool) -> None:
        self.events.append("queued")

    def wake(self) -> None:
        self.events.append("wake")


def double(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor * 2 for tensor in tensors)


def make_pool(clock: Clock | None = None, **options: object) -> TaskPool:
    return TaskPool(double, uid="ffn.0/forward", clock=clock or Clock(), **options)  # type: ignore[arg-type]


def rows(count: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((count, 2), value)


async def test_tasks_leave_in_order_up_to_max_batch_size() -> None:
    pool = make_pool(max_batch_size=5)
    tasks = [pool.submit((rows(count),)) for count in (2, 3, 1, 4, 2)]
    batches = []
    while (batch := pool.take_batch()) is not None:
        batches.append(batch)
    assert [[task.rows for task in batch.tasks] for batch in batches] == [[2, 3], [1, 4], [2]]
    assert [batch.rows for batch in batches] == [5, 5, 2]
    assert [task for batch in batches for task in batch.tasks] == tasks
    assert all(task.taken for task in tasks)
    assert len(pool) == 0
    assert pool.take_batch() is None


async def test_a_task_larger_than_a_batch_goes_alone() -> None:
    pool = make_pool(max_batch_size=4)
    for count in (1, 9, 1):
        pool.submit((rows(count),))
    taken = [pool.take_batch() for _ in range(3)]
    assert [batch.rows for batch in taken if batch] == [1, 9, 1]


async def test_a_later_small_task_never_overtakes_one_that_does_not_fit() -> None:
    pool = make_pool(max_batch_size=4)
    for count in (3, 2, 1):
        pool.submit((rows(count),))
    first = pool.take_batch()
    assert first is not None
    assert [task.rows for task in first.tasks] == [3]


async def test_min_batch_size_waits_for_rows_no_longer_than_the_delay() -> None:
    clock = Clock()
    pool = make_pool(clock, min_batch_size=4, max_queue_delay_ms=50.0)
    assert pool.ready_at() is None
    pool.submit((rows(2),))
    assert pool.ready_at() == pytest.approx(100.05)
    clock.now = 100.02
    pool.submit((rows(1),))
    assert pool.ready_at() == pytest.approx(100.05), "the oldest task counts"
    pool.submit((rows(1),))
    assert pool.ready_at() == 100.0, "enough rows: now"


async def test_without_a_delay_the_pool_waits_for_its_rows() -> None:
    clock = Clock()
    pool = make_pool(clock, min_batch_size=2)
    pool.submit((rows(1),))
    clock.now += 1e6
    assert pool.ready_at() == math.inf
    pool.submit((rows(1),))
    assert pool.ready_at() == 100.0


async def test_a_pool_that_waits_for_rows_still_tells_when_its_task_expires() -> None:
    clock = Clock()
    pool = make_pool(clock, min_batch_size=8)
    task = pool.submit((rows(1),), deadline=105.0)
    assert pool.ready_at() == 105.0, "somebody must look then"
    clock.now = 105.0
    assert pool.ready_at() is None
    with pytest.raises(ExpiredCallError):
        async with asyncio.timeout(5):
            await task.future


def test_min_batch_size_over_max_is_refused() -> None:
    with pytest.raises(SchemaError, match="9"):
        make_pool(min_batch_size=9, max_batch_size=8)


async def test_the_queue_is_bounded() -> None:
    pool = make_pool(max_queue_size=2)
    pool.submit((rows(1),))
    pool.submit((rows(1),))
    with pytest.raises(OverloadedError, match=r"ffn\.0/forward") as caught:
        pool.submit((rows(1),))
    assert caught.value.retry_after_s
    assert len(pool) == 2


async def test_dead_tasks_make_room_before_a_call_is_refused() -> None:
    clock = Clock()
    pool = make_pool(clock, max_queue_size=3)
    live = pool.submit((rows(1),))
    cancelled = pool.submit((rows(2),))
    expired = pool.submit((rows(4),), deadline=101.0)
    cancelled.future.cancel()
    clock.now = 102.0
    newest = pool.submit((rows(8),))
    batch = pool.take_batch()
    assert batch is not None
    assert batch.tasks == [live, newest]
    assert batch.rows == 9
    with pytest.raises(ExpiredCallError):
        async with asyncio.timeout(5):
            await expired.future


async def test_cancelled_and_expired_tasks_never_reach_a_device() -> None:
    clock = Clock()
    pool = make_pool(clock)
    first, second, third = (pool.submit((rows(1),), deadline=deadline) for deadline in (None, 100.5, None))
    first.future.cancel()
    clock.now = 100.5
    batch = pool.take_batch()
    assert batch is not None
    assert batch.tasks == [third]
    with pytest.raises(ExpiredCallError, match="deadline"):
        async with asyncio.timeout(5):
            await second.future
    assert pool.oldest() is None


async def test_a_pool_of_the_dead_is_empty() -> None:
    clock = Clock()
    pool = make_pool(clock)
    for _ in range(3):
        pool.submit((rows(1),)).future.cancel()
    assert pool.ready_at() is None
    assert pool.take_batch() is None
    assert "0 tasks, 0 rows" in repr(pool)


async def test_rows_of_the_dead_do_not_count_for_min_batch_size() -> None:
    pool = make_pool(min_batch_size=4, max_queue_delay_ms=1000.0)
    alive = pool.submit((rows(1),))
    pool.submit((rows(3),)).future.cancel()
    assert pool.ready_at() == pytest.approx(alive.arrived + 1.0)


async def test_cancel_works_until_a_device_took_the_task() -> None:
    pool = make_pool()
    waiting, taken = pool.submit((rows(1),)), None
    assert pool.cancel(waiting)
    assert waiting.future.cancelled()
    taken = pool.submit((rows(1),))
    assert pool.take_batch() is not None
    assert not pool.cancel(taken)
    assert not taken.future.cancelled()


async def test_drain_hands_out_what_still_waits() -> None:
    pool = make_pool()
    tasks = [pool.submit((rows(1),)) for _ in range(3)]
    assert pool.drain() == tasks
    assert pool.drain() == []
    assert "0 rows" in repr(pool)


@pytest.mark.parametrize(
    "tensors",
    [(), (torch.zeros(()),), (torch.zeros(2, 1), torch.zeros(3, 1)), (torch.zeros(2), torch.zeros(()))],
)
async def test_tensors_that_are_no_batch_are_refused(tensors: tuple[torch.Tensor, ...]) -> None:
    pool = make_pool()
    with pytest.raises(BadRequestError):
        pool.submit(tensors)
    assert len(pool) == 0


async def test_submit_queues_and_submit_task_also_wakes() -> None:
    pool, bell = make_pool(), Bell()
    pool.runtime = bell
    pool.submit((rows(1),))
    assert bell.events == ["queued"]
    future = pool.submit_task(rows(1))
    assert bell.events == ["queued", "queued", "wake"]
    assert isinstance(future, asyncio.Future)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    dead=st.sets(st.integers(0, 29)),
    limit=st.integers(1, 12),
)
def test_every_live_task_leaves_exactly_once_in_order(sizes: list[int], dead: set[int], limit: int) -> None:
    async def play() -> None:
        pool = make_pool(max_batch_size=limit)
        tasks = [pool.submit((rows(size),)) for size in sizes]
        for index in dead & set(range(len(tasks))):
            tasks[index].future.cancel()
        taken = []
        while (batch := pool.take_batch()) is not None:
            assert batch.rows == sum(task.rows for task in batch.tasks)
            assert len(batch.tasks) == 1 or batch.rows <= limit
            taken += batch.tasks
        assert taken == [task for index, task in enumerate(tasks) if index not in dead]
        assert "0 tasks, 0 rows" in repr(pool)

    asyncio.run(play())


async def test_a_full_queue_gives_up_the_newest_call_of_who_has_most() -> None:
    pool = make_pool(max_queue_size=4)
    greedy = [pool.submit((rows(1),), caller="greedy") for _ in range(4)]
    honest = pool.submit((rows(1),), caller="honest")
    with pytest.raises(OverloadedError) as caught:
        async with asyncio.timeout(5):
            await greedy[-1].future
    assert caught.value.retry_after_s
    with pytest.raises(OverloadedError):
        pool.submit((rows(1),), caller="greedy")
    batch = pool.take_batch()
    assert batch is not None
    assert set(batch.tasks) == {*greedy[:3], honest}


async def test_batches_alternate_between_callers() -> None:
    pool = make_pool(max_batch_size=4)
    for caller, count in (("greedy", 6), ("honest", 2)):
        for _ in range(count):
            pool.submit((rows(4),), caller=caller)
    order = []
    while (batch := pool.take_batch()) is not None:
        order += [task.caller for task in batch.tasks]
    assert order[:4] in (["greedy", "honest"] * 2, ["honest", "greedy"] * 2)
    assert order[4:] == ["greedy"] * 4
