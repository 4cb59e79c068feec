"""The replay window: a backward id is applied at most once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from p2pmoe import TaskPool
from p2pmoe.errors import ExpertFailedError, ReplayConflictError
from p2pmoe.server.replay import ReplayWindow
from p2pmoe.server.task_pool import Task

Flat = tuple[torch.Tensor, ...]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Play:
    """A window before a pool; batches are taken and answered by hand."""

    def __init__(self, **options: float) -> None:
        self.clock = Clock()
        self.window = ReplayWindow(clock=self.clock, **options)  # type: ignore[arg-type]
        self.pool = TaskPool(lambda *x: x, uid="ffn.0/backward")

    def call(self, call_id: str, uid: str = "ffn.0") -> asyncio.Future[Flat]:
        repeated = self.window.repeat(call_id, uid)
        if repeated is not None:
            return repeated
        return self.window.first(call_id, uid, self.pool, self.pool.submit((torch.ones(1, 4),)))

    def take(self) -> list[Task]:
        batch = self.pool.take_batch()
        return batch.tasks if batch else []

    async def answer(self, value: float = 1.0) -> int:
        tasks = self.take()
        for task in tasks:
            task.future.set_result((torch.full((1, 4), value),))
        await settle()
        return len(tasks)


async def settle() -> None:
    """Let callbacks of futures run."""
    for _ in range(4):
        await asyncio.sleep(0)


@pytest.fixture
def make() -> Callable[..., Play]:
    return Play


async def test_a_repeated_id_gets_the_first_answer_and_runs_once(make: Callable[..., Play]) -> None:
    play = make()
    first = play.call("a")
    assert await play.answer(5.0) == 1
    again = play.call("a")
    assert await play.answer(6.0) == 0
    assert (await first)[0] is (await again)[0]
    assert (await again)[0][0, 0] == 5.0


async def test_also_while_the_first_still_waits_or_runs(make: Callable[..., Play]) -> None:
    play = make()
    calls = [play.call("a"), play.call("a")]
    (task,) = play.take()
    calls.append(play.call("a"))
    task.future.set_result((torch.ones(1, 4),))
    results = await asyncio.wait_for(asyncio.gather(*calls), 5)
    assert len({id(result[0]) for result in results}) == 1
    assert play.take() == []


async def test_also_after_the_first_caller_left(make: Callable[..., Play]) -> None:
    play = make()
    gone = play.call("a")
    (task,) = play.take()
    gone.cancel()
    await settle()
    again = play.call("a")
    task.future.set_result((torch.ones(1, 4),))
    await asyncio.wait_for(again, 5)
    assert play.take() == []


async def test_one_of_two_callers_who_leaves_does_not_take_the_call_along(make: Callable[..., Play]) -> None:
    play = make()
    gone, stays = play.call("a"), play.call("a")
    gone.cancel()
    await settle()
    assert await play.answer() == 1
    await asyncio.wait_for(stays, 5)


async def test_cancelled_in_the_queue_leaves_no_trace(make: Callable[..., Play]) -> None:
    play = make()
    play.call("a").cancel()
    await settle()
    assert play.take() == []
    assert "0 ids" in repr(play.window)
    again = play.call("a")
    assert await play.answer() == 1
    await asyncio.wait_for(again, 5)


async def test_an_id_that_comes_again_right_after_its_cancellation_is_remembered(make: Callable[..., Play]) -> None:
    """The cancelled call's last callback must not wipe out the new one."""
    play = make()
    gone = play.call("a")
    gone.cancel()
    second: list[asyncio.Future[Flat]] = []
    gone.add_done_callback(lambda _: second.append(play.call("a")))
    await settle()
    assert len(second) == 1
    third = play.call("a")
    assert await play.answer() == 1, "applied once"
    await asyncio.wait_for(asyncio.gather(second[0], third), 5)


async def test_another_uid_under_the_same_id_is_a_conflict(make: Callable[..., Play]) -> None:
    play = make()
    play.call("a")
    with pytest.raises(ReplayConflictError, match=r"ffn\.0"):
        play.call("a", "ffn.1")


async def test_an_expired_call_leaves_no_trace(make: Callable[..., Play]) -> None:
    play = make()
    task = play.pool.submit((torch.ones(1, 4),), deadline=0.0)
    late = play.window.first("a", "ffn.0", play.pool, task)
    assert play.take() == []
    await settle()
    assert late.exception() is not None
    assert "0 ids" in repr(play.window)


async def test_a_failure_on_the_device_is_repeated_not_retried(make: Callable[..., Play]) -> None:
    play = make()
    first = play.call("a")
    play.take()[0].future.set_exception(ExpertFailedError("no"))
    await settle()
    again = play.call("a")
    await settle()
    assert play.take() == []
    for call in (first, again):
        with pytest.raises(ExpertFailedError):
            call.result()


async def test_answers_over_the_byte_limit_are_dropped_oldest_first_but_their_ids_stay(
    make: Callable[..., Play],
) -> None:
    play = make(max_bytes=40)  # two answers of 16 bytes
    for name in "abc":
        play.call(name)
        await play.answer()
    with pytest.raises(ReplayConflictError, match="no longer kept"):
        play.call("a")
    for name in "bc":
        await asyncio.wait_for(play.call(name), 5)
    assert play.take() == []
    assert "3 ids, 32 bytes" in repr(play.window)


async def test_ids_are_forgotten_after_the_window(make: Callable[..., Play]) -> None:
    play = make(window_s=10.0)
    play.call("a")
    await play.answer()
    play.clock.now = 9.0
    play.call("b")
    await play.answer()
    play.clock.now = 10.0
    again = play.call("a")
    assert await play.answer() == 1, "a new call"
    await asyncio.wait_for(again, 5)
    assert "2 ids, 32 bytes" in repr(play.window)
    play.clock.now = 100.0
    play.window.repeat("x", "ffn.0")
    assert "0 ids, 0 bytes" in repr(play.window)


async def test_the_number_of_ids_is_bounded(make: Callable[..., Play]) -> None:
    play = make(max_ids=3)
    for index in range(10):
        play.call(str(index))
        await play.answer()
    play.window.repeat("x", "ffn.0")
    assert "3 ids, 48 bytes" in repr(play.window)


async def test_forgetting_a_running_call_does_not_confuse_the_count(make: Callable[..., Play]) -> None:
    play = make(window_s=10.0)
    first = play.call("a")
    tasks = play.take()
    play.clock.now = 50.0
    play.window.repeat("x", "ffn.0")
    tasks[0].future.set_result((torch.ones(1, 4),))
    await asyncio.wait_for(first, 5)
    await settle()
    assert "0 ids, 0 bytes" in repr(play.window)
