"""One training run from a swarm to a result: finds the experts' width, builds mixture and task, trains, counts.

Knows nothing of terminals or files; what is shown on the way is its caller's affair.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from p2pmoe.client.directory import ExpertInfo
from p2pmoe.client.discovery import Wanted, discover, takes_rows_of
from p2pmoe.client.mixture import RemoteMixtureOfExperts
from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import RemoteError
from p2pmoe.training.census import ExpertCount, count_experts
from p2pmoe.training.loop import History, LoopOptions, Snapshot, TrainingLoop
from p2pmoe.training.tasks import MakeTask, TaskOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What to train, and through which experts. `hidden_dim` None takes the width that the experts have."""

    task: str
    steps: int = 300
    batch_size: int = 64
    seed: int = 0
    grid: tuple[int, ...] = (4, 4)
    k_best: int = 4
    uid_prefix: str = "ffn"
    hidden_dim: int | None = None
    timeout_s: float = 10.0
    """For one pass of one step."""
    partial_grid: bool = False
    """The swarm's grid is larger, and a part of it is meant."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to."""

    options: SessionOptions
    history: History
    experts: list[ExpertCount]

    @property
    def accuracy(self) -> float:
        """Held out, after the last step."""
        return self.history.accuracy or 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for programs."""
        history = self.history
        return {
            "task": self.options.task,
            "accuracy": round(self.accuracy, 4),
            "loss": history.losses[-1] if history.losses else None,
            "steps": len(history.losses),
            "failed_steps": history.failed_steps,
            "seconds": round(history.seconds, 3),
            "samples_per_s": round(history.samples_per_s, 1),
            "seed": self.options.seed,
            "experts": self.experts,
        }


def run_session(
    swarm: Swarm,
    make_task: MakeTask,
    options: SessionOptions,
    *,
    on_step: Callable[[Snapshot], None] = lambda _: None,
) -> Result:
    """Train and count.

    Raises:
        ExpertNotFoundError: no expert of the prefix is alive.
        SchemaError: the swarm has another grid, or none of its experts takes one tensor of [B, hidden_dim].
        RemoteError: too many steps in a row failed.
    """
    info = find_experts_to_train(swarm, options)
    (hidden_dim,) = info.inputs[0].sized(1)  # none is free
    torch.manual_seed(options.seed)
    mixture = RemoteMixtureOfExperts(
        swarm,
        in_features=hidden_dim,
        out_features=hidden_dim,
        grid_size=options.grid,
        uid_prefix=options.uid_prefix,
        k_best=options.k_best,
        forward_timeout_s=options.timeout_s,
        backward_timeout_s=options.timeout_s,
        partial_grid=options.partial_grid,
    )
    mixture.check()
    task = make_task(mixture, TaskOptions(hidden_dim, options.batch_size, options.seed))
    history = TrainingLoop(task, LoopOptions(options.steps), on_step=on_step).run()
    return Result(options, history, _count(swarm, options.uid_prefix, mixture.schema_digest))


def _count(swarm: Swarm, uid_prefix: str, schema_digest: str | None) -> list[ExpertCount]:
    """What a run came to is not lost because nobody can be asked any more."""
    try:
        return count_experts(swarm, f"{uid_prefix}.", schema_digest)
    except RemoteError as error:
        logger.warning("the experts were not counted: %s", error)
        return []


def find_experts_to_train(swarm: Swarm, options: SessionOptions) -> ExpertInfo:
    """The schema of the experts that a task can be trained through. Raises as `run_session`."""
    wanted = Wanted(options.uid_prefix, options.grid, partial_grid=options.partial_grid)
    return swarm.run(discover(swarm, wanted, takes_rows_of(options.hidden_dim), options.timeout_s / 2))
