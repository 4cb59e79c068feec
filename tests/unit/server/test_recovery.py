"""One bad call fails alone, whoever shares its batch, at a bounded cost; who does it again and again waits longer."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from swarm_kit import WAIT_S, make_backend, same_bits
from torch import nn

from p2pmoe import BatchTensorProto, ExpertBackend, Runtime, TaskPool
from p2pmoe.config import GateConfig
from p2pmoe.errors import CallError, ExpertFailedError, ExpiredCallError
from p2pmoe.metrics import NodeMetrics
from p2pmoe.server.recovery import FORGIVEN_AFTER_S, MAX_CULPRITS, MAX_FAILED_PARTS, MAX_PATIENCE_S, Culprits
from p2pmoe.server.screening import guard_experts
from p2pmoe.server.task_pool import Task

Flat = tuple[torch.Tensor, ...]
Calls = Sequence[tuple[str, Flat]]


@contextmanager
def opened(*pools: TaskPool) -> Iterator[Runtime]:
    runtime = Runtime(pools)
    try:
        yield runtime
    finally:
        runtime.close()


def run_together(pool: TaskPool, calls: Calls) -> list[Any]:
    """Results and errors of calls that are queued before the device looks: one batch."""

    async def ask() -> list[Any]:
        futures = [pool.submit(tensors, caller=caller).future for caller, tensors in calls]
        runtime.start()
        async with asyncio.timeout(WAIT_S):
            return await asyncio.gather(*futures, return_exceptions=True)

    with opened(pool) as runtime:
        return asyncio.run(ask())


class Table(nn.Module):
    """Ten rows to look up, and no eleventh."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        self.seen += len(index)
        rows: torch.Tensor = self.table(index)
        return rows


def table(*, guarded: bool = True, backend: type[ExpertBackend] = ExpertBackend, **options: Any) -> ExpertBackend:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = Table()
    made = backend(
        "table.0",
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        args_schema=(BatchTensorProto(dtype=torch.int64),),
        **options,
    )
    if guarded:
        guard_experts([made], GateConfig(), NodeMetrics())
    return made


def look_up(*rows: int, gradient: bool = False) -> Flat:
    index = torch.tensor(rows)
    return (index, torch.ones(len(rows), 4)) if gradient else (index,)


# ------------------------------------------------------------------------------------------- the culprit alone


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("bad", [[0], [31], [59], [3, 17, 40], list(range(0, 60, 2))])
def test_an_index_out_of_range_fails_its_own_call(guarded: bool, bad: list[int]) -> None:
    backend = table(guarded=guarded)
    calls = [("alice", look_up(99 if index in bad else index % 10)) for index in range(60)]
    results = run_together(backend.forward_pool, calls)
    for index, result in enumerate(results):
        if index in bad:
            assert isinstance(result, ExpertFailedError)
            assert str(result).startswith("table.0/forward: the expert failed: IndexError: index out of range")
        else:
            assert same_bits(result[0], backend.expert.table.weight[index % 10 : index % 10 + 1])
    assert backend.expert.seen.item() == 0, "only training writes to buffers"


@pytest.mark.parametrize("guarded", [True, False])
def test_the_neighbours_of_a_bad_backward_call_are_trained_once(guarded: bool) -> None:
    attacked, quiet = table(guarded=guarded), table(guarded=guarded)
    honest = [("alice", look_up(index % 10, gradient=True)) for index in range(8)]
    results = run_together(attacked.backward_pool, [*honest[:5], ("bob", look_up(1, 99, gradient=True)), *honest[5:]])
    assert [isinstance(each, CallError) for each in results] == [False] * 5 + [True] + [False] * 3
    trained = attacked.expert.table.weight
    run_together(quiet.backward_pool, honest)
    assert torch.allclose(trained, quiet.expert.table.weight), "the sum of all steps, in whatever parts"
    assert 1 <= attacked.update_count <= 4
    assert attacked.expert.seen.item() == 8, "what failed has left the buffers as they were"


def test_a_batch_that_is_too_large_for_the_memory_is_cut() -> None:
    def compute(x: torch.Tensor) -> Flat:
        if len(x) > 4:
            raise MemoryError("no room")
        return (x * 2,)

    pool = TaskPool(compute)
    pool.may_repeat = lambda: True
    results = run_together(pool, [("alice", (torch.full((1, 1), float(index)),)) for index in range(30)])
    assert [each[0].item() for each in results] == [2.0 * index for index in range(30)]


def test_calls_that_cannot_be_merged_are_computed_apart_by_whatever_function() -> None:
    pool = TaskPool(lambda x: (x.flatten(1).sum(1, keepdim=True),))
    shapes = [(1, 2), (1, 3), (1, 2), (1, 2, 2)]
    results = run_together(pool, [("alice", (torch.ones(shape),)) for shape in shapes])
    assert [each[0].item() for each in results] == [2.0, 3.0, 2.0, 4.0]


class Counting:
    """Refuses negative rows; counts what it computes."""

    def __init__(self) -> None:
        self.passes = self.rows = 0

    def __call__(self, x: torch.Tensor) -> Flat:
        self.passes += 1
        self.rows += len(x)
        if (x < 0).any():
            raise ValueError("negative")
        return (x,)


@pytest.mark.parametrize("share", [1, 2, 3, 10, 100, 1000])
def test_the_cost_is_bounded_however_many_calls_are_bad(share: int) -> None:
    count = 1000
    compute = Counting()
    pool = TaskPool(compute, max_batch_size=count)
    pool.may_repeat = lambda: True
    values = [-1.0 if index % share == 0 else 1.0 for index in range(count)]
    results = run_together(pool, [("alice", (torch.full((1, 1), value),)) for value in values])
    assert [isinstance(each, CallError) for each in results] == [value < 0 for value in values]
    assert compute.passes <= count + 2 * MAX_FAILED_PARTS
    assert compute.rows <= 7 * count
    if share == count:
        assert compute.passes <= 2 * math.ceil(math.log2(count)) + 1


# ------------------------------------------------------------------------------------------------ at most once


class Breaking(ExpertBackend):
    """Raises at a chosen place of `apply_gradients`."""

    place = ""

    def apply_gradients(self) -> None:
        if self.place == "before":
            raise LookupError("before the step")
        super().apply_gradients()
        if self.place == "after":
            raise LookupError("after the step")


class Own(ExpertBackend):
    """A backward of the user's own, which steps whenever it likes."""

    def backward(self, *inputs: torch.Tensor) -> Flat:
        self.opt.zero_grad()
        self.expert(inputs[0] % 10).backward(inputs[1])
        self.opt.step()
        self.update_count += 1
        if (inputs[0] > 9).any():
            raise IndexError("an afterthought")
        return (inputs[0],)


@pytest.mark.parametrize("place", ["before", "after", "hook", "pre-hook", "own"])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_backward_batch_that_may_have_been_applied_is_never_computed_again(guarded: bool, place: str) -> None:
    backend = table(guarded=guarded, backend=Own if place == "own" else Breaking)
    steps: list[int] = []
    backend.opt.register_step_pre_hook(lambda *_: steps.append(1))
    if isinstance(backend, Breaking):
        backend.place = place

    def fail(*_: object) -> None:
        raise LookupError("a hook")

    if place == "hook":
        backend.opt.register_step_post_hook(fail)
    elif place == "pre-hook":
        backend.opt.register_step_pre_hook(fail)
    results = run_together(
        backend.backward_pool,
        [("alice", look_up(index, gradient=True)) for index in (1, 2, 3, 99 if place == "own" else 4)],
    )
    assert all(isinstance(each, ExpertFailedError) for each in results)
    assert len(steps) == (0 if place == "before" else 1)
    assert all(parameter.grad is None for parameter in backend.expert.parameters()) or place == "own"


def test_results_of_the_wrong_shape_after_a_step_do_not_lead_to_a_second_one() -> None:
    class Short(ExpertBackend):
        def backward(self, *inputs: torch.Tensor) -> Flat:
            return tuple(each[:1] for each in super().backward(*inputs))

    for backend in (table(backend=Short), table(backend=ExpertBackend)):
        if type(backend) is ExpertBackend:
            whole = backend.backward_pool.process_function
            backend.backward_pool.process_function = lambda *inputs, whole=whole: whole(*inputs)[0][:1]
        results = run_together(backend.backward_pool, [("alice", look_up(index, gradient=True)) for index in range(4)])
        assert all(isinstance(each, ExpertFailedError) for each in results)
        assert backend.update_count == 1


def test_a_second_step_of_ones_own_that_overflows_does_not_repeat_the_first() -> None:
    class Twice(ExpertBackend):
        def apply_gradients(self) -> None:
            self.opt.step()
            for parameter in self.expert.parameters():
                if parameter.grad is not None and parameter.grad.abs().max() > 1.5:
                    parameter.grad.fill_(math.inf)
            super().apply_gradients()

    backend = table(backend=Twice)
    steps: list[int] = []
    backend.opt.register_step_post_hook(lambda *_: steps.append(1))
    calls = [("alice", look_up(index, gradient=True)) for index in range(3)]
    index, gradient = look_up(5, gradient=True)
    results = run_together(backend.backward_pool, [*calls, ("bob", (index, gradient * 2))])
    assert all(isinstance(each, ExpertFailedError) for each in results)
    assert len(steps) == 1


class Gathering(ExpertBackend):
    """Steps every second pass."""

    passes = 0

    def apply_gradients(self) -> None:
        self.passes += 1
        if self.passes % 2 == 0:
            super().apply_gradients()


def test_gathered_gradients_survive_a_call_that_raises() -> None:
    attacked, quiet = table(backend=Gathering), table(backend=Gathering)
    for index in range(4):
        call = [("alice", look_up(index, gradient=True))]
        (error,) = run_together(attacked.backward_pool, [("bob", look_up(99, gradient=True))])
        assert isinstance(error, ExpertFailedError)
        run_together(attacked.backward_pool, call)
        run_together(quiet.backward_pool, call)
    assert same_bits(attacked.expert.table.weight, quiet.expert.table.weight)
    assert attacked.update_count == quiet.update_count == 2


# -------------------------------------------------------------------------------------------------- the culprits


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tasks_of(*callers: str) -> list[Task]:
    loop = asyncio.new_event_loop()
    try:
        return [Task((torch.ones(1),), 1, loop.create_future(), 0.0, None, caller) for caller in callers]
    finally:
        loop.close()


def test_a_culprit_is_parted_from_the_others_waits_longer_each_time_and_is_forgotten() -> None:
    clock = Clock()
    culprits = Culprits(clock)
    tasks = tasks_of("alice", "bob", "alice", "carol")
    assert culprits.part(tasks) == (tasks, [])
    assert culprits.patience_s(tasks) == 0.0
    waits = []
    for _ in range(20):
        culprits.blame("bob")
        waits.append(culprits.patience_s(tasks))
    assert waits[:3] == [0.05, 0.1, 0.2]
    assert waits[-1] == MAX_PATIENCE_S
    assert culprits.part(tasks) == ([tasks[0], tasks[2], tasks[3]], [tasks[1]])
    clock.now += FORGIVEN_AFTER_S + 1
    assert culprits.part(tasks) == (tasks, [])
    assert repr(culprits) == "<Culprits: 0 callers>"


def test_the_memory_of_culprits_is_bounded() -> None:
    culprits = Culprits(Clock())
    for index in range(10 * MAX_CULPRITS):
        culprits.blame(str(index))
    assert repr(culprits) == f"<Culprits: {MAX_CULPRITS} callers>"


class Device:
    """Refuses negative rows; a test can hold it up. It remembers its batches."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.batches: list[list[float]] = []

    def __call__(self, x: torch.Tensor) -> Flat:
        self.batches.append(x[:, 0].tolist())
        self.begun.release()
        assert self.go.wait(WAIT_S), "the test never let it go on"
        if (x < 0).any():
            raise ValueError("negative")
        return (x,)


async def submit(pool: TaskPool, caller: str, value: float, **options: Any) -> asyncio.Future[Flat]:
    return pool.submit((torch.full((1, 1), value),), caller=caller, **options).future


async def blame_bob(pool: TaskPool, runtime: Runtime) -> None:
    """Bob fails a batch of Alice's."""
    futures = [await submit(pool, caller, value) for caller, value in (("alice", 0.0), ("bob", -1.0))]
    runtime.wake()
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(each) for each in results] == [tuple, ExpertFailedError]


async def test_a_known_culprit_costs_the_others_nothing_and_comes_after_them() -> None:
    device = Device()
    device.go.set()
    pool = TaskPool(device)
    pool.may_repeat = lambda: True
    with opened(pool) as runtime:
        runtime.start()
        async with asyncio.timeout(WAIT_S):
            await blame_bob(pool, runtime)
            device.batches.clear()
            device.go.clear()
            while device.begun.acquire(blocking=False):
                pass
            futures = [await submit(pool, "alice", 1.0)]
            runtime.wake()
            assert await asyncio.to_thread(device.begun.acquire, timeout=WAIT_S)
            futures += [
                await submit(pool, caller, value) for caller, value in (("bob", -2.0), ("alice", 2.0), ("bob", 3.0))
            ]
            device.go.set()
            results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(each) for each in results] == [tuple, ExpertFailedError, tuple, tuple]
    assert device.batches[:3] == [[1.0], [2.0], [-2.0, 3.0]]


async def test_a_call_that_was_set_aside_expires_in_time_and_may_come_again() -> None:
    device = Device()
    device.go.set()
    pool = TaskPool(device)
    pool.may_repeat = lambda: True
    with opened(pool) as runtime:
        async with asyncio.timeout(WAIT_S):
            runtime._culprits.blame("bob")
            alice, bob = await submit(pool, "alice", 1.0), pool.submit((torch.ones(1, 1),), caller="bob", deadline=1e18)
            first = await asyncio.to_thread(runtime._wait_for_batch)
            assert first is not None
            assert [task.caller for task in first.tasks] == ["alice"]
            assert runtime.tasks_waiting == 1
            bob.deadline = 0.0
            assert await asyncio.to_thread(runtime._wait_for_batch) is None
            with pytest.raises(ExpiredCallError):
                await bob.future
            assert not bob.taken
            assert runtime.tasks_waiting == 0
            alice.cancel()


async def test_an_expert_that_always_fails_makes_nobody_a_culprit() -> None:
    def fail(x: torch.Tensor) -> Flat:
        raise RuntimeError("broken")

    pool = TaskPool(fail)
    pool.may_repeat = lambda: True
    with opened(pool) as runtime:
        futures = [await submit(pool, caller, 1.0) for caller in ("alice", "bob", "carol")]
        runtime.start()
        async with asyncio.timeout(WAIT_S):
            results = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(each, ExpertFailedError) for each in results)
        assert repr(runtime._culprits) == "<Culprits: 0 callers>"


def test_failures_that_callers_cause_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    backend = make_backend("ffn.0")
    backend.forward_pool.process_function = lambda *_: 1 / 0
    run_together(backend.forward_pool, [("alice", (torch.ones(1, 4),)) for _ in range(50)])
    assert sum("failed" in record.getMessage() for record in caplog.records) == 1


PLACES: dict[str, Callable[[ExpertBackend], Any]] = {
    "forward hook": lambda backend: backend.expert.register_forward_hook(lambda *_: 1 / 0),
    "forward pre-hook": lambda backend: backend.expert.register_forward_pre_hook(lambda *_: 1 / 0),
    "backward hook": lambda backend: backend.expert.register_full_backward_hook(lambda *_: 1 / 0),
    "tensor hook": lambda backend: backend.expert[0].weight.register_hook(lambda *_: 1 / 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_hooks_that_raise_fail_calls_and_leave_no_gradient(place: str) -> None:
    backend = make_backend("ffn.0")
    guard_experts([backend], GateConfig(), NodeMetrics())
    before = [parameter.detach().clone() for parameter in backend.expert.parameters()]
    handle = PLACES[place](backend)
    calls = [("alice", (torch.ones(1, 4), torch.ones(1, 4))) for _ in range(3)]
    results = run_together(backend.backward_pool, calls)
    assert all("ZeroDivisionError" in str(each) for each in results)
    assert all(parameter.grad is None for parameter in backend.expert.parameters())
    assert all(map(same_bits, before, backend.expert.parameters()))
    handle.remove()
    assert not any(isinstance(each, CallError) for each in run_together(backend.backward_pool, calls))
