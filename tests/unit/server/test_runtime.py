"""Runtime: one device thread that serves every pool, fails nobody else's calls, and never misses a ring."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from raising_kit import HOSTILE, Mute
from swarm_kit import WAIT_S

from p2pmoe import Runtime, TaskPool
from p2pmoe.errors import (
    BadRequestError,
    CallError,
    DrainingError,
    ExpertFailedError,
    ExpiredCallError,
    NonFiniteResultError,
    OutOfMemoryError,
)
from p2pmoe.protocol.messages import encode_json, error_header
from p2pmoe.server import outbox
from p2pmoe.server.task_pool import Batch, Task

Flat = tuple[torch.Tensor, ...]


class Device:
    """A function that a test can hold up; it remembers the batches that it computed."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()
        self.batches: list[list[float]] = []

    def __call__(self, x: torch.Tensor) -> Flat:
        self.batches.append(x[:, 0].tolist())
        self.begun.release()
        assert self.go.wait(WAIT_S), "the test never opened the gate"
        if (x < 0).any():
            raise ValueError("negative\nand a second line")
        return (x * 2,)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def start(no_new_threads: None) -> Iterator[Callable[..., Runtime]]:
    runtimes = []

    def make(*pools: TaskPool, **options: Any) -> Runtime:
        runtimes.append(Runtime(pools, **options))
        runtimes[-1].start()
        return runtimes[-1]

    yield make
    for runtime in runtimes:
        runtime.close()


def row(value: float, rows: int = 1) -> torch.Tensor:
    return torch.full((rows, 1), value)


async def hold(device: Device, pool: TaskPool, value: float = 0.0) -> asyncio.Future[Flat]:
    """Occupy the device thread with one task until `device.go` is set."""
    device.go.clear()
    future = pool.submit_task(row(value))
    assert await asyncio.to_thread(device.begun.acquire, timeout=WAIT_S)
    return future


async def test_calls_get_their_own_rows_back(device: Device, start: Callable[..., Runtime]) -> None:
    pool = TaskPool(device)
    start(pool)
    async with asyncio.timeout(WAIT_S):
        results = await asyncio.gather(*(pool.submit_task(row(i, rows=i % 3 + 1)) for i in range(20)))
    for index, (result,) in enumerate(results):
        assert result.tolist() == [[2.0 * index]] * (index % 3 + 1)


async def test_what_waited_is_computed_together(device: Device, start: Callable[..., Runtime]) -> None:
    pool = TaskPool(device)
    start(pool)
    async with asyncio.timeout(WAIT_S):
        first = await hold(device, pool)
        others = [pool.submit_task(row(i)) for i in range(1, 6)]
        device.go.set()
        await asyncio.gather(first, *others)
    assert device.batches == [[0.0], [1.0, 2.0, 3.0, 4.0, 5.0]]


async def test_the_pool_whose_oldest_task_waited_longest_goes_first(
    device: Device, start: Callable[..., Runtime]
) -> None:
    pools = [TaskPool(device, uid=str(index), max_batch_size=1) for index in range(3)]
    start(*pools)
    async with asyncio.timeout(WAIT_S):
        futures = [await hold(device, pools[0])]
        for value, index in [(1.0, 2), (2.0, 0), (3.0, 1), (4.0, 2), (5.0, 0)]:
            futures.append(pools[index].submit_task(row(value)))
            await asyncio.sleep(0.001)  # not to synchronise: arrival times must differ
        device.go.set()
        await asyncio.gather(*futures)
    assert device.batches == [[float(i)] for i in range(6)]


async def test_priority_goes_before_age(device: Device, start: Callable[..., Runtime]) -> None:
    low, high = TaskPool(device, max_batch_size=1), TaskPool(device, max_batch_size=1, priority=1)
    start(low, high)
    async with asyncio.timeout(WAIT_S):
        futures = [await hold(device, low)]
        futures += [low.submit_task(row(3.0)), low.submit_task(row(4.0))]
        futures += [high.submit_task(row(1.0)), high.submit_task(row(2.0))]
        device.go.set()
        await asyncio.gather(*futures)
    assert device.batches == [[0.0], [1.0], [2.0], [3.0], [4.0]]


async def test_a_failing_batch_fails_only_its_own_calls(
    device: Device, start: Callable[..., Runtime], caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = TaskPool(device, uid="ffn.0/forward"), TaskPool(device, uid="ffn.1/forward")
    runtime = start(good, bad)
    async with asyncio.timeout(WAIT_S):
        held = await hold(device, good)
        calls = [bad.submit_task(row(-1.0)), bad.submit_task(row(1.0)), good.submit_task(row(2.0))]
        device.go.set()
        results = await asyncio.gather(held, *calls, return_exceptions=True)
        after = await bad.submit_task(row(5.0))
    assert [type(result) for result in results] == [tuple, ExpertFailedError, ExpertFailedError, tuple]
    assert "ffn.1/forward" in str(results[1])
    assert "ValueError: negative" in str(results[1])
    assert "second line" not in str(results[1])
    assert after[0].item() == 10.0
    assert runtime.tasks_running == 0
    assert sum("failed" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("error", [SystemExit("no"), KeyboardInterrupt(), MemoryError("oom"), RuntimeError()])
async def test_the_thread_survives_every_exception(error: BaseException, start: Callable[..., Runtime]) -> None:
    def explode(x: torch.Tensor) -> Flat:
        if x[0, 0] == 1:
            raise error
        return (x,)

    pool = TaskPool(explode)
    start(pool)
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(ExpertFailedError, match=type(error).__name__):
            await pool.submit_task(row(1.0))
        assert (await pool.submit_task(row(2.0)))[0].item() == 2.0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
    ],
)
async def test_memory_that_the_system_refuses_is_503_of_that_batch(
    error: Exception, start: Callable[..., Runtime], caplog: pytest.LogCaptureFixture
) -> None:
    def explode(x: torch.Tensor) -> Flat:
        if x[0, 0] == 1:
            raise error
        return (x,)

    pool = TaskPool(explode)
    start(pool)
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(OutOfMemoryError, match=f"no memory for this call now .{type(error).__name__}.") as caught:
            await pool.submit_task(row(1.0))
        assert (await pool.submit_task(row(2.0)))[0].item() == 2.0
    assert caught.value.code == 503
    assert all(each.exc_info is None for each in caplog.records)


@pytest.mark.parametrize(
    ("error", "text"),
    [*HOSTILE.values(), (GeneratorExit(), "GeneratorExit"), (asyncio.CancelledError(), "CancelledError")],
    ids=[*HOSTILE, "generator exit", "cancelled"],
)
async def test_whatever_an_expert_raises_its_caller_is_told_and_the_thread_goes_on(
    error: BaseException, text: str, start: Callable[..., Runtime]
) -> None:
    def explode(x: torch.Tensor) -> Flat:
        if x[0, 0] == 1:
            raise error
        return (x,)

    pool = TaskPool(explode, uid="odd")
    runtime = start(pool)
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(ExpertFailedError) as caught:
            await pool.submit_task(row(1.0))
        assert str(caught.value) == f"odd: the expert failed: {text}"
        assert encode_json(error_header("1", "odd", caught.value))
        assert (await pool.submit_task(row(2.0)))[0].item() == 2.0
    assert runtime.alive


@pytest.mark.parametrize("name", ["mute", "leaving", "masked", "empty", "stop", "deep group"])
@pytest.mark.parametrize("place", ["observer", "screen", "inspect", "undo", "split", "failed_alone"])
async def test_whatever_is_raised_around_a_batch_ends_with_it(
    name: str, place: str, device: Device, start: Callable[..., Runtime]
) -> None:
    error = HOSTILE[name][0]

    def observe(*_: object) -> None:
        if place == "observer":
            raise error

    pool = TaskPool(device, uid="odd")
    pool.gate = door = Door(place, error)
    runtime = start(pool, on_batch=observe)
    async with asyncio.timeout(WAIT_S):
        for values in ((200.0, 300.0), (-1.0, 5.0), (400.0,)):
            tasks = [pool.submit((row(value),)) for value in values]
            runtime.wake()
            await asyncio.gather(*(task.future for task in tasks), return_exceptions=True)
        door.broken = ""
        assert (await pool.submit_task(row(2.0)))[0].item() == 4.0
    assert runtime.tasks_running == 0
    assert runtime.alive


@pytest.mark.parametrize("error", [Mute(), SystemExit(1), RuntimeError("no queue")])
@pytest.mark.parametrize("method", ["ready_at", "take_batch"])
async def test_a_broken_queue_fails_what_waits_in_it_and_not_the_thread(
    error: BaseException, method: str, device: Device, start: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = TaskPool(device, uid="odd")
    runtime = start(pool)

    def fail() -> Any:
        raise error

    async with asyncio.timeout(WAIT_S):
        with monkeypatch.context() as patched:
            patched.setattr(pool, method, fail)
            with pytest.raises(ExpertFailedError, match="the node failed: a device thread failed unexpectedly"):
                await pool.submit_task(row(1.0))
        assert (await pool.submit_task(row(2.0)))[0].item() == 4.0
    assert runtime.alive


async def test_a_device_that_cannot_be_opened_refuses_what_waits_and_what_comes(
    device: Device, start: Callable[..., Runtime]
) -> None:
    pool = TaskPool(device, uid="ffn.0/forward")
    waiting = pool.submit_task(row(1.0))
    runtime = start(pool, device="nonsense:7")
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(
            ExpertFailedError, match=r"device nonsense:7 has stopped: RuntimeError: .*; restart the node"
        ):
            await waiting
        with pytest.raises(ExpertFailedError, match="has stopped"):
            await pool.submit_task(row(1.0))
    assert not runtime.alive
    assert runtime.tasks_waiting == 0


async def test_a_result_that_cannot_be_handed_over_takes_no_other_along() -> None:
    class Broken(asyncio.Future[Flat]):
        def set_result(self, result: Flat, /) -> None:
            raise LookupError("no result")

    loop = asyncio.get_running_loop()
    futures = [Broken(loop=loop), loop.create_future()]
    tasks = [Task((row(1.0),), 1, future, 0.0, None) for future in futures]
    outbox.settle([(task, (row(2.0),)) for task in tasks])
    async with asyncio.timeout(WAIT_S):
        assert (await futures[1])[0].item() == 2.0


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: (x[:1],),
        lambda x: (x, x.sum()),
        lambda x: (torch.zeros(0, 1),),
        lambda x: None,
        lambda x: (None,),
        lambda x: ("text",),
    ],
)
async def test_an_answer_of_the_wrong_shape_fails_the_batch(
    answer: Callable[[torch.Tensor], Any], start: Callable[..., Runtime]
) -> None:
    pool = TaskPool(answer, uid="odd")
    start(pool)
    async with asyncio.timeout(WAIT_S):
        for _ in range(2):
            with pytest.raises(ExpertFailedError, match="odd"):
                await pool.submit_task(row(1.0, rows=2))


async def test_a_function_without_outputs_answers_every_call(device: Device, start: Callable[..., Runtime]) -> None:
    silent = TaskPool(lambda x: ())
    held = TaskPool(device)
    start(silent, held)
    async with asyncio.timeout(WAIT_S):
        first = await hold(device, held)
        calls = [silent.submit_task(row(1.0)) for _ in range(3)]
        device.go.set()
        assert await asyncio.gather(*calls) == [(), (), ()]
        await first


async def test_an_observer_that_fails_does_not_end_the_thread(
    start: Callable[..., Runtime], device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[int, bool]] = []

    def observe(batch: Batch, seconds: float, succeeded: bool) -> None:
        seen.append((batch.rows, succeeded))
        raise LookupError("the observer is broken")

    pool = TaskPool(device)
    start(pool, on_batch=observe)
    async with asyncio.timeout(WAIT_S):
        await pool.submit_task(row(1.0))
        with pytest.raises(ExpertFailedError):
            await pool.submit_task(row(-1.0, rows=2))
        await pool.submit_task(row(1.0))
    assert seen[:2] == [(1, True), (2, False)]
    assert "the observer is broken" in caplog.text


class Door:
    """A gate of a test's own: refuses ones, and finds results over 100 non-finite."""

    def __init__(self, broken: str = "", error: BaseException | None = None) -> None:
        self.broken = broken
        self.error = error or LookupError(f"{broken} is broken")
        self.undone = 0

    def _enter(self, name: str) -> None:
        if name == self.broken:
            raise self.error

    def screen(self, tasks: list[Task]) -> list[tuple[Task, CallError]]:
        self._enter("screen")
        return [(task, BadRequestError("a one")) for task in tasks if task.tensors[0][0, 0] == 1]

    def inspect(self, batch: Batch, outputs: Flat) -> list[tuple[Task, CallError]]:
        self._enter("inspect")
        if (outputs[0] > 100).any():
            raise NonFiniteResultError("too large")
        return [(task, BadRequestError("a three")) for task in batch.tasks if task.tensors[0][0, 0] == 3]

    def undo(self) -> None:
        self.undone += 1
        self._enter("undo")

    def split(self, batch: Batch) -> tuple[Batch, Batch]:
        self._enter("split")
        half = len(batch.tasks) // 2
        return tuple(  # type: ignore[return-value]
            Batch(batch.pool, tasks, sum(task.rows for task in tasks), batch.taken_at)
            for tasks in (batch.tasks[:half], batch.tasks[half:])
        )

    def failed_alone(self, task: Task, error: Exception) -> CallError:
        self._enter("failed_alone")
        return ExpertFailedError(f"alone: {error}")


async def test_a_gate_refuses_before_and_after_and_parts_what_is_spoilt(
    device: Device, start: Callable[..., Runtime]
) -> None:
    pool = TaskPool(device)
    pool.gate = door = Door()
    seen: list[tuple[int, bool]] = []
    runtime = start(pool, on_batch=lambda batch, seconds, succeeded: seen.append((len(batch.tasks), succeeded)))
    async with asyncio.timeout(WAIT_S):
        held = await hold(device, pool)
        calls = [pool.submit_task(row(value, rows=2)) for value in (1.0, 2.0, 3.0, 400.0, 5.0, 1.0, 6.0)]
        device.go.set()
        results = await asyncio.gather(held, *calls, return_exceptions=True)
        await pool.submit_task(row(0.0))  # a batch is observed after its answers left, and before the next begins
    shown = [str(each) if isinstance(each, CallError) else each[0][0, 0].item() for each in results]
    assert shown == [0.0, "a one", 4.0, "a three", "alone: too large", 10.0, "a one", 12.0]
    assert device.batches[1] == [2.0] * 2 + [3.0] * 2 + [400.0] * 2 + [5.0] * 2 + [6.0] * 2
    assert door.undone == 3
    assert seen[:4] == [(1, True), (2, True), (1, False), (2, True)]  # the last one may not have been observed yet
    assert (runtime.tasks_running, runtime.tasks_waiting) == (0, 0)


@pytest.mark.parametrize("broken", ["screen", "inspect", "undo", "split"])
async def test_a_broken_gate_fails_its_batch_and_leaves_the_thread(
    broken: str, device: Device, start: Callable[..., Runtime]
) -> None:
    pool = TaskPool(device, uid="ffn.0/backward")
    pool.gate = door = Door(broken)
    runtime = start(pool)
    async with asyncio.timeout(WAIT_S):
        for value in (200.0, -1.0):
            pair = [pool.submit((row(value),)) for _ in range(2)]
            runtime.wake()
            results = await asyncio.gather(*(task.future for task in pair), return_exceptions=True)
            assert all(isinstance(each, ExpertFailedError) for each in results)
        door.broken = ""
        assert (await pool.submit_task(row(2.0)))[0].item() == 4.0
    assert runtime.tasks_running == 0


async def test_cancelled_tasks_do_not_reach_the_device(device: Device, start: Callable[..., Runtime]) -> None:
    pool = TaskPool(device)
    start(pool)
    async with asyncio.timeout(WAIT_S):
        held = await hold(device, pool)
        gone, stays = pool.submit_task(row(1.0)), pool.submit_task(row(2.0))
        gone.cancel()
        device.go.set()
        await asyncio.gather(held, stays)
    assert device.batches == [[0.0], [2.0]]


async def test_expired_tasks_do_not_reach_the_device(device: Device, start: Callable[..., Runtime]) -> None:
    pool = TaskPool(device)
    start(pool)
    async with asyncio.timeout(WAIT_S):
        held = await hold(device, pool)
        late = pool.submit_task(row(1.0), deadline=time.monotonic())
        device.go.set()
        with pytest.raises(ExpiredCallError):
            await late
        await held
    assert device.batches == [[0.0]]


async def test_a_task_that_waits_for_rows_expires_in_time(device: Device, start: Callable[..., Runtime]) -> None:
    pool = TaskPool(device, min_batch_size=8)
    start(pool)
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(ExpiredCallError):
            await pool.submit_task(row(1.0), deadline=time.monotonic() + 0.05)
    assert device.batches == []


async def test_the_delay_ends_without_a_further_ring(device: Device, start: Callable[..., Runtime]) -> None:
    pool = TaskPool(device, min_batch_size=8, max_queue_delay_ms=20.0)
    start(pool)
    async with asyncio.timeout(WAIT_S):
        await pool.submit_task(row(1.0))
    assert device.batches == [[1.0]]


async def test_close_fails_what_waits_and_lets_the_running_batch_end(
    device: Device, start: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = TaskPool(device, uid="ffn.0/forward")
    runtime = start(pool)
    async with asyncio.timeout(WAIT_S):
        running = await hold(device, pool)
        waiting = [pool.submit_task(row(1.0)) for _ in range(3)]
        monkeypatch.setattr(runtime, "wake", device.go.set)  # what close() does once it has begun
        closing = asyncio.create_task(asyncio.to_thread(runtime.close))
        results = await asyncio.gather(running, *waiting, return_exceptions=True)
        await closing
    assert isinstance(results[0], tuple)
    assert all(isinstance(result, DrainingError) for result in results[1:])
    assert device.batches == [[0.0]]
    runtime.close()


async def test_a_runtime_that_never_started_closes_too(device: Device) -> None:
    pool = TaskPool(device)
    runtime = Runtime([pool])
    future = pool.submit_task(row(1.0))
    runtime.close()
    with pytest.raises(DrainingError):
        async with asyncio.timeout(WAIT_S):
            await future


async def test_tasks_queued_before_the_start_are_served(device: Device, start: Callable[..., Runtime]) -> None:
    pool = TaskPool(device)
    future = pool.submit_task(row(1.0))
    runtime = start()
    runtime.add(pool)
    runtime.wake()
    async with asyncio.timeout(WAIT_S):
        await future
    assert (runtime.tasks_waiting, runtime.tasks_running) == (0, 0)
    assert "1 pools" in repr(runtime)


async def test_a_loop_that_is_gone_does_not_hurt_the_others(device: Device, start: Callable[..., Runtime]) -> None:
    pool = TaskPool(device)
    start(pool)
    held = await hold(device, pool)

    async def ask_and_leave() -> None:
        pool.submit((row(1.0),))
        pool.submit((row(1.0),), deadline=time.monotonic())

    await asyncio.to_thread(asyncio.run, ask_and_leave())
    beside = pool.submit_task(row(3.0))
    device.go.set()
    async with asyncio.timeout(WAIT_S):
        await held
        assert (await beside)[0].item() == 6.0
        await pool.submit_task(row(2.0))


async def test_a_task_that_comes_while_the_queues_are_read_is_not_missed(
    device: Device, no_new_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes to a pool that was looked at already, by a ring that follows another."""
    first, second = TaskPool(device), TaskPool(device, min_batch_size=9)
    runtime = Runtime([first, second])
    futures = [second.submit_task(row(1.0))]
    loop = asyncio.get_running_loop()

    def look() -> float:
        if len(futures) == 1:
            runtime.wake()
            loop.call_soon_threadsafe(lambda: futures.append(first.submit_task(row(2.0))))
            while len(futures) == 1:
                time.sleep(0)
        return time.monotonic() + 1e6

    monkeypatch.setattr(second, "ready_at", look)
    async with asyncio.timeout(WAIT_S):
        batches = [await asyncio.to_thread(runtime._wait_for_batch) for _ in range(2)]
    taken = [batch for batch in batches if batch is not None]
    assert [batch.tasks[0].future for batch in taken] == futures[1:]
    runtime.close()


async def test_no_ring_is_lost_under_hammering(start: Callable[..., Runtime]) -> None:
    """Many tasks, many pools, idle rings from a thread beside: every call is answered, in bounded time."""
    pools = [TaskPool(lambda x: (x + 1,), uid=str(index), min_batch_size=1 + index % 2) for index in range(8)]
    runtime = start(*pools)
    stop = threading.Event()

    def ring() -> None:
        while not stop.is_set():
            runtime.wake()
            stop.wait(0.0003)

    ringer = threading.Thread(target=ring)
    ringer.start()
    try:

        async def ask(worker: int) -> None:
            for step in range(60):
                pool = pools[(worker * 7 + step) % len(pools)]
                two = torch.full((2, 1), float(step))  # two rows satisfy every min_batch_size
                (answer,) = await pool.submit_task(two)
                assert answer[0, 0] == step + 1

        async with asyncio.timeout(20):
            await asyncio.gather(*(ask(worker) for worker in range(32)))
    finally:
        stop.set()
        ringer.join()
    assert runtime.tasks_waiting == runtime.tasks_running == 0


@pytest.mark.parametrize(("second", "held"), [("alice", True), ("bob", False)])
async def test_a_result_waits_only_for_other_calls_of_its_own_caller(
    start: Callable[..., Runtime], device: Device, monkeypatch: pytest.MonkeyPatch, second: str, held: bool
) -> None:
    """Nobody waits for a stranger's batch; what waits goes with the last of its caller's results."""
    monkeypatch.setattr(outbox, "HOLD_S", WAIT_S)
    quick, slow = TaskPool(lambda x: (x,), uid="quick"), TaskPool(device, uid="slow")
    device.go.clear()
    runtime = Runtime([quick, slow])
    first = quick.submit((torch.ones(1, 1),), caller="alice").future
    last = slow.submit((torch.ones(1, 1),), caller=second).future
    runtime.wake()  # on this loop, which looks after what is held
    runtime.start()
    try:
        assert await asyncio.to_thread(device.begun.acquire, timeout=WAIT_S)
        await asyncio.sleep(0.05)
        assert first.done() != held
        device.go.set()
        async with asyncio.timeout(WAIT_S / 2):
            await asyncio.gather(first, last)
    finally:
        device.go.set()
        await asyncio.to_thread(runtime.close)


async def test_pools_with_nothing_to_do_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is asked for after every batch: of ten thousand pools only those with something are looked at."""
    pools = [TaskPool(lambda x: (x,), uid=str(index)) for index in range(10_000)]
    runtime = Runtime(pools)
    looked: list[str] = []
    monkeypatch.setattr(TaskPool, "__len__", lambda pool: looked.append(pool.uid) or len(pool._queue))
    assert runtime.tasks_waiting == 0
    pools[7].submit((torch.ones(1, 1),))
    pools[7].submit((torch.ones(1, 1),))
    assert runtime.tasks_waiting == 2
    assert looked == ["7"]
    monkeypatch.undo()
    runtime.close()
