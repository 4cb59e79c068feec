"""The trainer's loop, with failures scripted by step."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from p2pmoe.errors import DeadlineError, ExpertsUnavailableError, RemoteError, SchemaError
from p2pmoe.training.loop import History, LoopOptions, Snapshot, TrainingLoop
from p2pmoe.training.tasks import Task


class ScriptedModel(nn.Module):
    """A linear layer whose n-th call raises what the script says; calls are counted from 1."""

    def __init__(self, fail_at: dict[int, Exception]) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.fail_at, self.calls = fail_at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls in self.fail_at:
            raise self.fail_at[self.calls]
        y: torch.Tensor = self.layer(x)
        return y


def make_task(model: nn.Module, accuracies: list[float | Exception] | None = None) -> Task:
    def batches():  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(0)
        while True:
            x = torch.randn(4, 2, generator=generator)
            yield x, x.sum(1, keepdim=True)

    scripted = iter(accuracies or [])

    def evaluate() -> float:
        answer = next(scripted, 0.5)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Task(model, batches(), functional.mse_loss, evaluate, learning_rate=0.1)


def run(
    fail_at: dict[int, Exception] | None = None,
    accuracies: list[float | Exception] | None = None,
    *,
    steps: int = 20,
    evaluate_every: int = 5,
    max_failures: int = 3,
) -> tuple[History, list[Snapshot], list[float]]:
    snapshots: list[Snapshot] = []
    pauses: list[float] = []
    torch.manual_seed(0)
    loop = TrainingLoop(
        make_task(ScriptedModel(fail_at or {}), accuracies),
        LoopOptions(steps, evaluate_every, max_failures),
        on_step=snapshots.append,
        sleep=pauses.append,
    )
    return loop.run(), snapshots, pauses


def test_it_learns_and_tells() -> None:
    history, snapshots, pauses = run(accuracies=[0.1, 0.2, 0.3, 0.4], steps=20)

    assert history.losses[-1] < history.losses[0]
    assert history.steps == list(range(1, 21))
    assert history.accuracies == [(5, 0.1), (10, 0.2), (15, 0.3), (20, 0.4)]
    assert history.accuracy == 0.4
    assert history.samples == 80
    assert history.samples_per_s > 0
    assert [each.step for each in snapshots] == history.steps
    assert snapshots[3].accuracy is None
    assert snapshots[4].accuracy == 0.1
    assert pauses == []


def test_a_step_that_fails_on_a_peers_side_is_counted_and_left_out() -> None:
    history, snapshots, pauses = run({3: DeadlineError("bob is slow"), 7: ExpertsUnavailableError("nobody")})

    assert history.failed_steps == 2
    assert 3 not in history.steps
    assert 7 not in history.steps
    assert len(history.losses) == 18
    assert snapshots[-1].failed_steps == 2
    assert len(pauses) == 2


def test_a_failed_step_leaves_no_gradient_behind() -> None:
    class FailsInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            raise DeadlineError("carol left")

    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    task = make_task(model)
    broken = Task(
        model,
        task.batches,
        lambda y, target: functional.mse_loss(FailsInBackward.apply(y), target),  # type: ignore[no-untyped-call]
        task.evaluate,
        0.1,
    )

    with pytest.raises(DeadlineError):
        TrainingLoop(broken, LoopOptions(5, max_failures_in_a_row=2), sleep=lambda _: None).run()
    assert torch.equal(model.weight, before)


def test_too_many_failures_in_a_row_end_it_with_the_last_error() -> None:
    last = DeadlineError("third")

    with pytest.raises(DeadlineError, match="third") as caught:
        run({4: RemoteError("first"), 5: RemoteError("second"), 6: last}, max_failures=3)
    assert caught.value is last
    assert "3 steps in a row failed" in caught.value.__notes__[0]


def test_failures_that_are_not_in_a_row_do_not_end_it() -> None:
    history, _, _ = run({number: RemoteError("again") for number in range(2, 20, 2)}, max_failures=2)

    assert history.failed_steps == 9


def test_pauses_grow_while_failures_follow_each_other() -> None:
    failures = {number: RemoteError("silent") for number in range(2, 9)}

    _, _, pauses = run(failures, max_failures=9)

    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_an_error_of_our_own_ends_it_at_once() -> None:
    with pytest.raises(SchemaError):
        run({2: SchemaError("wrong width")})


def test_many_failures_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run({number: RemoteError("silent") for number in range(2, 12, 2)})

    assert len(caplog.records) == 1
    assert "going on" in caplog.text


def test_an_evaluation_that_fails_costs_a_point_of_the_curve() -> None:
    history, _, _ = run(accuracies=[RemoteError("silent"), 0.2, 0.3, 0.4])

    assert history.accuracies == [(10, 0.2), (15, 0.3), (20, 0.4)]
    assert history.failed_steps == 1


def test_the_last_evaluation_is_tried_until_it_answers() -> None:
    history, _, _ = run(accuracies=[RemoteError("silent"), RemoteError("silent"), 0.9], steps=3)

    assert history.accuracies == [(3, 0.9)]
