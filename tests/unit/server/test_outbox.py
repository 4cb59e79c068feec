"""Results on their way to the loops: gathered for a moment, held by nobody for long, delivered in order."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from swarm_kit import WAIT_S, until

from p2pmoe.errors import CallError, ExpertFailedError
from p2pmoe.server import outbox as module
from p2pmoe.server.outbox import HOLD_S, Outbox
from p2pmoe.server.task_pool import Task, TaskPool


def make_tasks(count: int) -> list[Task]:
    pool = TaskPool(lambda x: (x,), uid="ffn.0/forward")
    return [pool.submit((torch.full((1, 1), float(index)),)) for index in range(count)]


def results_of(tasks: list[Task]) -> list[tuple[torch.Tensor, ...] | CallError]:
    return [(torch.full((1, 1), float(index)),) for index in range(len(tasks))]


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_what_may_not_wait_goes_at_once_and_takes_along_what_is_held() -> None:
    busy = True
    outbox = Outbox(lambda: busy)
    outbox.watch()
    first, second, third = tasks = make_tasks(3)
    done: list[Task] = []
    for task in tasks:
        task.future.add_done_callback(lambda _, task=task: done.append(task))
    outbox.put([first], results_of([first]), may_wait=True)
    await turn()
    assert not first.future.done()
    outbox.put([second, third], [ExpertFailedError("no"), (torch.ones(1, 1),)], may_wait=False)
    await turn()
    assert done == tasks
    assert isinstance(second.future.exception(), ExpertFailedError)
    busy = False


async def test_without_a_loop_that_watches_nothing_is_held() -> None:
    outbox = Outbox(lambda: True)
    (task,) = tasks = make_tasks(1)
    outbox.put(tasks, results_of(tasks), may_wait=True)
    await turn()
    assert task.future.done()


async def test_a_device_that_is_stuck_keeps_no_result_that_is_there() -> None:
    """The next batch never ends: what was computed before it arrives all the same."""
    outbox, stop = Outbox(lambda: not stop.is_set()), threading.Event()
    outbox.watch()
    tasks = make_tasks(2)

    def device() -> None:
        outbox.put(tasks, results_of(tasks), may_wait=True)
        stop.wait(WAIT_S)

    thread = threading.Thread(target=device)
    started = time.monotonic()
    thread.start()
    try:
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*(task.future for task in tasks))
        assert time.monotonic() - started < 1.0
    finally:
        stop.set()
        thread.join(WAIT_S)


async def test_the_watch_ends_with_the_work_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOLD_S", 0.001)
    busy = True
    outbox = Outbox(lambda: busy)
    outbox.watch()
    await asyncio.sleep(0.01)
    assert outbox._watching is not None
    busy = False
    await until(lambda: outbox._watching is None)
    tasks = make_tasks(1)
    outbox.put(tasks, results_of(tasks), may_wait=True)
    await turn()
    assert tasks[0].future.done()
    outbox.watch()
    assert outbox._watching is not None


def test_a_loop_that_was_closed_watches_nothing() -> None:
    outbox = Outbox(lambda: True)

    async def begin() -> Task:
        outbox.watch()
        return make_tasks(1)[0]

    asyncio.run(begin())

    async def go_on() -> None:
        tasks = make_tasks(1)
        outbox.put(tasks, results_of(tasks), may_wait=True)
        await turn()
        assert tasks[0].future.done()
        outbox.watch()
        assert outbox._watching is asyncio.get_running_loop()

    asyncio.run(go_on())


async def test_results_of_a_closed_loop_harm_no_others() -> None:
    def elsewhere() -> Task:
        async def make() -> Task:
            return make_tasks(1)[0]

        return asyncio.run(make())

    orphan = await asyncio.to_thread(elsewhere)
    outbox = Outbox(lambda: False)
    tasks = [orphan, *make_tasks(1)]
    outbox.put(tasks, results_of(tasks), may_wait=False)
    await turn()
    assert tasks[1].future.done()
    assert HOLD_S < 0.1
