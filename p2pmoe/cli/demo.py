"""`p2pmoe demo`: a swarm of processes on this machine trains a mixture. Processes are cli/local_swarm.py's affair."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pmoe.cli.arguments import AsJson, BatchSize, Grid, RunDir, Seed, Steps, parse_grid
from p2pmoe.cli.failures import hold_signals, raise_on_sigterm
from p2pmoe.cli.local_swarm import LocalSwarm
from p2pmoe.cli.logs import set_up_logs
from p2pmoe.cli.output import open_console
from p2pmoe.cli.process import prepare_process
from p2pmoe.cli.results import finish, make_run_dir
from p2pmoe.cli.train import load_task, train_with_display
from p2pmoe.config import DHTConfig, LogConfig
from p2pmoe.errors import LocalError
from p2pmoe.experts.directory import ExpertDirectory

if TYPE_CHECKING:
    from p2pmoe.client.swarm import Swarm

HIDDEN_DIM = 64
K_BEST = 4
VISIBLE_WITHIN_S = 15.0


def demo(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Volunteer nodes, each a process of its own.")] = 3,
    grid: Grid = "4x4",
    steps: Steps = 300,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    run_dir: RunDir = None,
    as_json: AsJson = False,
) -> None:
    """Train a mixture of experts on handwritten digits, through a swarm on this machine.

    Node processes on loopback share a grid of experts; all of them are ended again.
    Their logs, result.json and loss.png are in the run's folder.

    Example: [bold]p2pmoe demo --nodes 3 --grid 4x4[/bold]
    """
    prepare_process()
    raise_on_sigterm()
    set_up_logs(LogConfig(level="warning"))
    sizes = parse_grid(grid)
    folder = make_run_dir(run_dir or _default_run_dir())
    console = open_console(stderr=as_json)
    with LocalSwarm(folder, nodes=nodes, grid=sizes, hidden_dim=HIDDEN_DIM, seed=seed) as local:
        console.print(f"starting {nodes + 1} node processes; logs in {folder}", highlight=False, soft_wrap=True)
        local.begin()
        with hold_signals():  # the bootstrap loads torch on one core while we do on another
            import torch

            from p2pmoe.client.swarm import Swarm
            from p2pmoe.training.session import SessionOptions

            make_task = load_task("digits")
        local.complete()
        torch.set_num_threads(1)  # the nodes share the cores with us
        options = SessionOptions(
            task="digits",
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            grid=sizes,
            k_best=min(K_BEST, local.expert_count),
            hidden_dim=HIDDEN_DIM,
        )
        with Swarm(dht_config=DHTConfig(initial_peers=(local.dht_address,))) as swarm:
            _wait_until_visible(swarm, local.expert_count)
            result = train_with_display(swarm, make_task, options, console)
        finish(result, console, folder, as_json=as_json, names=local.names)


def _default_run_dir() -> Path:
    now = datetime.now(UTC).astimezone()
    return Path("runs") / f"demo-{now:%Y%m%d-%H%M%S}-{os.getpid()}"


def _wait_until_visible(swarm: Swarm, count: int) -> None:
    """Every expert is declared before its node says so; records may still be on their way."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while (found := len(swarm.find_experts("ffn."))) < count:
        if time.monotonic() > deadline:
            raise LocalError(f"only {found} of {count} experts can be found in the DHT; see the nodes' logs")
        if isinstance(swarm.directory, ExpertDirectory):
            swarm.directory.invalidate()
        time.sleep(0.1)
