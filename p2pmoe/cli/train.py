"""`p2pmoe train`: joins a swarm as a client and trains a task through it. The run itself is p2pmoe.training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from p2pmoe.cli.arguments import (
    AsJson,
    BatchSize,
    Grid,
    InitialPeers,
    Owner,
    RunDir,
    Seed,
    Steps,
    SwarmId,
    SwarmKeyFile,
    parse_grid,
)
from p2pmoe.cli.failures import hold_signals, need_package, raise_on_sigterm
from p2pmoe.cli.logs import set_up_logs
from p2pmoe.cli.output import open_console
from p2pmoe.cli.process import prepare_process
from p2pmoe.cli.progress import open_display
from p2pmoe.cli.results import finish, make_run_dir
from p2pmoe.cli.settings import load_client_config, load_client_identity, load_swarm_key, split_lists
from p2pmoe.config import LogConfig
from p2pmoe.experts.uid import UidPattern
from p2pmoe.training.tasks import TASKS, MakeTask, find_task

if TYPE_CHECKING:
    from p2pmoe.client.swarm import Swarm
    from p2pmoe.training.session import Result, SessionOptions

ALIVE_TIMEOUT_S: Final = 1.0
"""Training waits while the experts are counted."""


def train(
    task: Annotated[str, typer.Argument(metavar="TASK", help=f"One of: {', '.join(sorted(TASKS))}.")],
    initial_peers: InitialPeers = None,
    swarm_id: SwarmId = None,
    owner: Owner = None,
    swarm_key: SwarmKeyFile = None,
    identity: Annotated[
        str | None,
        typer.Option(
            metavar="KEY_FILE",
            help="Who you are to the nodes; a fresh key if left out. `p2pmoe id new` makes one. [P2PMOE_IDENTITY_PATH]",
        ),
    ] = None,
    uid_prefix: Annotated[str, typer.Option("--uid-prefix", help="Name in front of the experts' coordinates.")] = "ffn",
    grid: Grid = "4x4",
    k_best: Annotated[int, typer.Option("--k-best", min=1, help="Experts a sample.")] = 4,
    hidden_dim: Annotated[
        int | None, typer.Option("--hidden-dim", min=1, help="Width of the experts; found out if left out.")
    ] = None,
    partial_grid: Annotated[
        bool, typer.Option("--partial-grid", help="The swarm's grid is larger than --grid; train through a part of it.")
    ] = False,
    steps: Steps = 300,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    run_dir: RunDir = None,
    as_json: AsJson = False,
) -> None:
    """Train a task through the experts of a swarm.

    Experts that fail cost a step, not the run. With --json the last line is one JSON object.

    Example: [bold]p2pmoe train digits --initial-peers 127.0.0.1:31337[/bold]
    """
    prepare_process()
    raise_on_sigterm()
    set_up_logs(LogConfig(level="warning"))
    dht = load_client_config(split_lists(initial_peers, "--initial-peers") or (), swarm_id, owner=owner)
    secret = load_swarm_key(swarm_key)
    key = load_client_identity(identity)
    prefix = UidPattern.parse(f"{uid_prefix.rstrip('.')}.*").name
    sizes = parse_grid(grid)
    with hold_signals():
        make_task = load_task(task)
        from p2pmoe.client.swarm import Swarm
        from p2pmoe.training.session import SessionOptions
    if run_dir is not None:
        make_run_dir(run_dir)

    console = open_console(stderr=as_json)
    options = SessionOptions(
        task=task,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        grid=sizes,
        k_best=k_best,
        uid_prefix=prefix,
        hidden_dim=hidden_dim,
        partial_grid=partial_grid,
    )
    with Swarm(dht_config=dht, identity=key, swarm_key=secret) as swarm:
        result = train_with_display(swarm, make_task, options, console)
    finish(result, console, run_dir, as_json=as_json)


def load_task(name: str) -> MakeTask:
    """A task by name. Raises ConfigError for an unknown one and for missing packages."""
    try:
        return find_task(name)
    except ImportError as error:
        raise need_package(f"the task {name}", error) from error


def train_with_display(swarm: Swarm, make_task: MakeTask, options: SessionOptions, console: Console) -> Result:
    """Run a session and show it on the console."""
    from p2pmoe.training.session import run_session

    with open_display(console, options.steps, alive_counter(swarm, options.uid_prefix, options.grid)) as display:
        return run_session(swarm, make_task, options, on_step=display.show)


def alive_counter(swarm: Swarm, uid_prefix: str, grid: Sequence[int]) -> Callable[[], int]:
    """Counts distinct uids of the grid that somebody serves; answered from the directory's cache most of the time."""
    from p2pmoe.client.offers import read_offers
    from p2pmoe.errors import RemoteError

    def count() -> int:
        try:
            offers = swarm.run(read_offers(swarm.directory, uid_prefix, ALIVE_TIMEOUT_S, within=grid))
        except RemoteError:
            return 0
        return len({offer.uid for offer in offers})

    return count
