"""One training run from a swarm to a result: finds the experts' width, builds mixture and task, trains, counts.

Knows nothing of terminals or files; what is shown on the way is its caller's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from p2pmoe.client.mixture import RemoteMixtureOfExperts
from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import ExpertNotFoundError, SchemaError
from p2pmoe.training.census import ExpertCount, count_experts
from p2pmoe.training.loop import History, LoopOptions, Snapshot, TrainingLoop
from p2pmoe.training.tasks import MakeTask, TaskOptions


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
        SchemaError: the experts take something else than one tensor of [B, hidden_dim].
        RemoteError: too many steps in a row failed.
    """
    hidden_dim = options.hidden_dim or experts_width(swarm, options.uid_prefix)
    torch.manual_seed(options.seed)
    mixture = RemoteMixtureOfExperts(
        swarm,
        in_features=hidden_dim,
        grid_size=options.grid,
        uid_prefix=options.uid_prefix,
        k_best=options.k_best,
        forward_timeout_s=options.timeout_s,
        backward_timeout_s=options.timeout_s,
    )
    task = make_task(mixture, TaskOptions(hidden_dim, options.batch_size, options.seed))
    history = TrainingLoop(task, LoopOptions(options.steps), on_step=on_step).run()
    return Result(options, history, count_experts(swarm, f"{options.uid_prefix}."))


def experts_width(swarm: Swarm, uid_prefix: str) -> int:
    """The number of features that the experts below a prefix take. Raises as `run_session`."""
    records = swarm.find_experts(f"{uid_prefix}.")
    if not records:
        raise ExpertNotFoundError(
            f"no expert below {uid_prefix}. is alive; start one with "
            f"`p2pmoe node --initial-peers … --experts '{uid_prefix}.[0:4].[0:4]'`"
        )
    uid = records[0].uid
    providers = swarm.run(swarm.find_providers(uid))
    info = swarm.run(swarm.expert_info(uid, providers))
    if len(info.inputs) != 1 or len(info.inputs[0].shape) != 1:
        raise SchemaError(f"{uid} takes more than one row of features; a task needs experts such as kind = 'ffn'")
    return info.inputs[0].shape[0]
