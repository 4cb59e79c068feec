"""`p2pmoe node`: settings become a running node, until a signal ends it. The parts are put together in p2pmoe.node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

import p2pmoe
from p2pmoe.cli.arguments import AsJson, InitialPeers, Owner, SwarmId, SwarmKeyFile, at_home
from p2pmoe.cli.joining import NO_EXPERTS, explain, free_experts, join_line
from p2pmoe.cli.logs import set_up_logs
from p2pmoe.cli.output import print_json
from p2pmoe.cli.own_identity import own_identity_path
from p2pmoe.cli.own_state import with_own_state
from p2pmoe.cli.process import prepare_process
from p2pmoe.cli.settings import load_node_config, read_value, split_lists
from p2pmoe.cli.stopping import StopSignals, exit_with_parent
from p2pmoe.cli.terminal import finish_streams
from p2pmoe.config import NodeConfig
from p2pmoe.errors import ConfigError, InvalidUidError, P2PMoEError
from p2pmoe.experts.uid import expand_pattern
from p2pmoe.server.descriptors import allow_open_files

if TYPE_CHECKING:
    from p2pmoe.node import Node

logger = logging.getLogger(__name__)

Experts = Annotated[
    list[str] | None,
    typer.Option("--experts", metavar="PATTERN…", help="Uids to host, e.g. 'ffn.[0:4].[0:4]'. [P2PMOE_EXPERTS_UIDS]"),
]


def print_config(wanted: bool) -> None:
    """The commented file that lies in the package, of a checkout beside it (setup.py). For `--print-config`."""
    if wanted:
        package = Path(p2pmoe.__file__).parent
        shipped = package / "node.toml"
        typer.echo(
            (shipped if shipped.exists() else package.parent / "node.toml").read_text(encoding="utf-8"), nl=False
        )
        raise typer.Exit


def node(
    config: Annotated[
        Path | None,
        typer.Option("-c", "--config", metavar="FILE", callback=at_home, help="A node.toml; without it the defaults."),
    ] = None,
    initial_peers: InitialPeers = None,
    experts: Experts = None,
    kind: Annotated[str | None, typer.Option(help="ffn, transformer, nop, det_dropout, or your own.")] = None,
    hidden_dim: Annotated[int | None, typer.Option("--hidden-dim", help="Width of the experts.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes initial parameters reproducible.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="cpu, cuda:0, …; repeat it for several.")] = None,
    torch_threads: Annotated[int | None, typer.Option("--torch-threads", help="Threads torch computes with.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that both ports listen on; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port of the calls; 0 lets the system pick.")] = None,
    dht_port: Annotated[int | None, typer.Option("--dht-port", help="UDP port of the DHT; 0 likewise.")] = None,
    announce_host: Annotated[
        str | None, typer.Option("--announce-host", metavar="HOST", help="Address that others are told for both ports.")
    ] = None,
    announce_port: Annotated[
        int | None, typer.Option("--announce-port", help="Port of the calls as others reach it: a mapping's outer end.")
    ] = None,
    dht_announce_port: Annotated[
        int | None, typer.Option("--dht-announce-port", help="UDP port of the DHT as others reach it.")
    ] = None,
    allow_alone: Annotated[
        bool | None, typer.Option("--allow-alone", help="Start also when no initial peer answers, and go on trying.")
    ] = None,
    modules: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Python files with expert classes of your own.")
    ] = None,
    expert_options: Annotated[
        str | None,
        typer.Option("--expert-options", metavar="TOML", help="More of the class, e.g. '{inner_dim = 1024}'."),
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option(metavar="KEY_FILE", help="Key file, made if missing; without it one in your data folder."),
    ] = None,
    temporary: Annotated[
        bool, typer.Option("--temporary-identity", help="A key that ends with this node; for nodes of a moment.")
    ] = False,
    state: Annotated[
        str | None,
        typer.Option(
            "--state", metavar="FOLDER", help="Checkpoints of the experts; without it a folder beside the key."
        ),
    ] = None,
    fresh: Annotated[
        str | None, typer.Option(help="When experts begin anew: if_vacant (no checkpoint is kept), never, always.")
    ] = None,
    swarm_id: SwarmId = None,
    owner: Owner = None,
    delegation: Annotated[
        str | None, typer.Option(metavar="FILE", help="Closed swarm: what its owner gave this node.")
    ] = None,
    swarm_key: SwarmKeyFile = None,
    log_level: Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option("--log-format", help="text or json.")] = None,
    as_json: AsJson = False,
    _print: Annotated[
        bool,
        typer.Option(
            "--print-config",
            callback=print_config,
            is_eager=True,
            help="Print a node.toml with every default, and end.",
        ),
    ] = False,
    parent: Annotated[bool, typer.Option("--exit-with-parent", hidden=True)] = False,
) -> None:
    r"""Run a volunteer's node: host experts for a swarm.

    Prints the line that lets another node join; logs go to standard error.
    The first Ctrl-C or SIGTERM lets running calls end, the second one does not.

    Example: [bold]p2pmoe node --dht-port 31337 --experts 'ffn.\[0:4].\[0:4]' --hidden-dim 64[/bold]
    """
    if parent:
        exit_with_parent()
    prepare_process()
    uids = split_lists(experts, "--experts")
    for pattern in uids or ():
        expand_pattern(pattern)  # wrong usage where it is none; of a file it is a wrong setting
    flags = {
        "dht.allow_alone": allow_alone,
        "dht.announce_host": announce_host,
        "dht.announce_port": dht_announce_port,
        "dht.initial_peers": split_lists(initial_peers, "--initial-peers"),
        "dht.host": host,
        "dht.port": dht_port,
        "dht.swarm_id": swarm_id,
        "dht.owner": owner,
        "dht.delegation_path": delegation,
        "access.swarm_key_path": swarm_key,
        "devices": split_lists(device, "--device"),
        "experts.fresh": fresh,
        "experts.hidden_dim": hidden_dim,
        "experts.kind": kind,
        "experts.modules": tuple(modules) if modules else None,
        "experts.options": expert_options and read_value("experts.options", expert_options, source="--expert-options"),
        "experts.seed": seed,
        "experts.uids": uids,
        "http.announce_host": announce_host,
        "http.announce_port": announce_port,
        "http.host": host,
        "http.port": port,
        "identity_path": identity,
        "log.format": log_format,
        "log.level": log_level,
        "state.path": state,
        "torch_threads": torch_threads,
    }
    settings = load_node_config(config, flags)
    _check_patterns(settings, "P2PMOE_EXPERTS_UIDS" if config is None else str(config))
    set_up_logs(settings.log)
    allow_open_files(settings.limits.max_connections)
    with contextlib.nullcontext() if temporary or settings.identity_path else own_identity_path() as own:
        if own is not None or temporary:
            settings = msgspec.structs.replace(settings, identity_path=str(own) if own else None)
        settings = with_own_state(settings)
        asyncio.run(_serve(settings, as_json=as_json))


def _check_patterns(settings: NodeConfig, source: str) -> None:
    """Raises ConfigError: a pattern of a file or a variable is a setting."""
    try:
        for pattern in settings.experts.uids:
            expand_pattern(pattern)
    except InvalidUidError as error:
        raise ConfigError(f"{source}: experts.uids: {error}") from error


async def _serve(config: NodeConfig, *, as_json: bool) -> None:
    with StopSignals() as signals:
        from p2pmoe.node import Node

        node = Node(config)
        if not await _started(node, signals):
            return
        try:
            await _introduce(node, as_json=as_json)
            await signals.wait()
            logger.info("leaving: running calls may end; a second signal ends them")
        finally:
            await node.close()


async def _started(node: Node, signals: StopSignals) -> bool:
    """Whether the node has started before a signal came."""
    starting = asyncio.create_task(node.start())
    stopping = asyncio.create_task(signals.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return False
        try:
            starting.result()
        except P2PMoEError as error:
            error.add_note(f"(while starting: {node.stage})")
            raise
        return True
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


async def _introduce(node: Node, *, as_json: bool) -> None:
    """Say how to join. Where nobody takes that, the node serves all the same."""
    if node.config.identity_path is not None:
        logger.info("this node's key is %s", node.config.identity_path)
    line = join_line(node.dht_address, node.config, await free_experts(node))
    if not node.backends:
        logger.warning(NO_EXPERTS)
    if explanation := explain(node.config):
        logger.info("%s", explanation)
    try:
        if as_json:
            print_json(describe(node, line))
        else:
            typer.echo(line)
    except OSError as error:
        finish_streams()
        logger.warning("nobody takes standard output: %s; others join with: %s", error.strerror, line)


def describe(node: Node, line: str) -> dict[str, Any]:
    """What `--json` prints of a node that has started."""
    return {
        "peer_id": node.peer_id,
        "dht_address": node.dht_address,
        "endpoint": node.endpoint.url,
        "experts": [backend.name for backend in node.backends],
        "waiting": [] if node.announcer is None else node.announcer.waiting,  # somebody else serves them
        "join": line,
    }
