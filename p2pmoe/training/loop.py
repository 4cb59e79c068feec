"""The trainer's loop: steps, remote failures that are survived, and what happened. Knows nothing of the swarm.

A step that fails on a peer's side is counted and left out; training goes on. Only a row of such failures ends it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import torch

from p2pmoe.errors import RemoteError
from p2pmoe.training.tasks import Task

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_FAILURES_IN_A_ROW: Final = 12
FIRST_PAUSE_S: Final = 0.1
LAST_PAUSE_S: Final = 2.0
LOG_EVERY_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How long to train, and how often to look at the held-out samples."""

    steps: int
    evaluate_every: int = 25
    max_failures_in_a_row: int = MAX_FAILURES_IN_A_ROW


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where training stands after a step. `accuracy` is the last held-out one, None before the first."""

    step: int
    loss: float
    accuracy: float | None
    samples_per_s: float
    failed_steps: int


@dataclass(slots=True)
class History:
    """What happened: the loss of every step that went through, held-out accuracies by step."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    failed_steps: int = 0
    samples: int = 0
    seconds: float = 0.0

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds if self.seconds > 0 else 0.0

    @property
    def accuracy(self) -> float | None:
        """The last one."""
        return self.accuracies[-1][1] if self.accuracies else None


class TrainingLoop:
    """Trains a task with Adam.

    Args:
        task: what to train.
        options: for how long.
        on_step: called with a snapshot after every step that went through.
        sleep: waits between tries after a failure.
    """

    def __init__(
        self,
        task: Task,
        options: LoopOptions,
        *,
        on_step: Callable[[Snapshot], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.task, self.options, self.history = task, options, History()
        self._on_step = on_step
        self._sleep = sleep
        self._optimizer = torch.optim.Adam(task.model.parameters(), lr=task.learning_rate)
        self._in_a_row = 0
        self._logged_at = -LOG_EVERY_S

    def __repr__(self) -> str:
        return f"<TrainingLoop: step {len(self.history.losses)} of {self.options.steps}>"

    def run(self) -> History:
        """Train to the end. Raises the last RemoteError when too many steps in a row failed."""
        history, started = self.history, time.perf_counter()
        for step in range(1, self.options.steps + 1):
            loss = self._survive(self._train_step)
            if loss is None:
                continue
            history.seconds = time.perf_counter() - started
            history.steps.append(step)
            history.losses.append(loss)
            if step % self.options.evaluate_every == 0 and step < self.options.steps:
                self._evaluate(step)
            self._on_step(Snapshot(step, loss, history.accuracy, history.samples_per_s, history.failed_steps))
        self._finish()
        history.seconds = time.perf_counter() - started
        return history

    # -- private

    def _train_step(self) -> float:
        inputs, targets = next(self.task.batches)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.task.model(inputs), targets)
        loss.backward()
        self._optimizer.step()
        self.history.samples += len(inputs)
        return float(loss.detach())

    def _evaluate(self, step: int) -> bool:
        accuracy = self._survive(self.task.evaluate)
        if accuracy is not None:
            self.history.accuracies.append((step, accuracy))
        return accuracy is not None

    def _finish(self) -> None:
        """The last accuracy is the result, so it is asked for until it comes or the failures are too many."""
        while not self._evaluate(self.options.steps):
            pass

    def _survive(self, action: Callable[[], T]) -> T | None:
        """None when a peer's side failed and training may go on. What is our own fault is raised."""
        try:
            result = action()
        except RemoteError as error:
            self._note_failure(error)
            return None
        self._in_a_row = 0
        return result

    def _note_failure(self, error: RemoteError) -> None:
        self.history.failed_steps += 1
        self._in_a_row += 1
        if self._in_a_row >= self.options.max_failures_in_a_row:
            error.add_note(f"({self._in_a_row} steps in a row failed; training ended)")
            raise error
        now = time.monotonic()
        if now - self._logged_at >= LOG_EVERY_S:  # one line, however many steps fail
            self._logged_at = now
            logger.warning("%d steps failed so far, going on; the last one: %s", self.history.failed_steps, error)
        # Peers that were silent come back into searches after seconds: do not use up all tries before.
        self._sleep(min(FIRST_PAUSE_S * 2 ** (self._in_a_row - 1), LAST_PAUSE_S))
