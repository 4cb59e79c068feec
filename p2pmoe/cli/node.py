"""`p2pmoe node`: settings become a running node, until a signal ends it. The parts are put together in p2pmoe.node."""

from __future__ import annotations

import asyncio
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pmoe.cli.arguments import AsJson, InitialPeers, Owner, SwarmId, SwarmKeyFile, at_home
from p2pmoe.cli.logs import set_up_logs
from p2pmoe.cli.output import print_json
from p2pmoe.cli.process import prepare_process
from p2pmoe.cli.settings import load_node_config, split_lists
from p2pmoe.cli.stopping import StopSignals, exit_with_parent
from p2pmoe.cli.terminal import finish_streams
from p2pmoe.config import NodeConfig
from p2pmoe.errors import P2PMoEError
from p2pmoe.server.descriptors import allow_open_files

if TYPE_CHECKING:
    from p2pmoe.node import Node

logger = logging.getLogger(__name__)

Experts = Annotated[
    list[str] | None,
    typer.Option("--experts", metavar="PATTERN…", help="Uids to host, e.g. 'ffn.[0:4].[0:4]'. [P2PMOE_EXPERTS_UIDS]"),
]


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
    identity: Annotated[str | None, typer.Option(metavar="KEY_FILE", help="Key file, made if missing.")] = None,
    swarm_id: SwarmId = None,
    owner: Owner = None,
    delegation: Annotated[
        str | None, typer.Option(metavar="FILE", help="Closed swarm: what its owner gave this node.")
    ] = None,
    swarm_key: SwarmKeyFile = None,
    log_level: Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option("--log-format", help="text or json.")] = None,
    as_json: AsJson = False,
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
    flags = {
        "dht.allow_alone": allow_alone,
        "dht.announce_host": announce_host,
        "dht.announce_port": dht_announce_port,
        "dht.initial_peers": split_lists(initial_peers),
        "dht.host": host,
        "dht.port": dht_port,
        "dht.swarm_id": swarm_id,
        "dht.owner": owner,
        "dht.delegation_path": delegation,
        "access.swarm_key_path": swarm_key,
        "devices": split_lists(device),
        "experts.hidden_dim": hidden_dim,
        "experts.kind": kind,
        "experts.seed": seed,
        "experts.uids": split_lists(experts),
        "http.announce_host": announce_host,
        "http.announce_port": announce_port,
        "http.host": host,
        "http.port": port,
        "identity_path": identity,
        "log.format": log_format,
        "log.level": log_level,
        "torch_threads": torch_threads,
    }
    settings = load_node_config(config, flags)
    set_up_logs(settings.log)
    allow_open_files(settings.limits.max_connections)
    asyncio.run(_serve(settings, as_json=as_json))


async def _serve(config: NodeConfig, *, as_json: bool) -> None:
    with StopSignals() as signals:
        from p2pmoe.node import Node

        node = Node(config)
        if not await _started(node, signals):
            return
        try:
            _introduce(node, as_json=as_json)
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


def _introduce(node: Node, *, as_json: bool) -> None:
    """Say how to join. Where nobody takes that, the node serves all the same."""
    line = join_line(node.dht_address, node.config)
    try:
        if as_json:
            print_json(_describe(node))
        else:
            typer.echo(line)
    except OSError as error:
        finish_streams()
        logger.warning("nobody takes standard output: %s; others join with: %s", error.strerror, line)


def join_line(dht_address: str, config: NodeConfig) -> str:
    """The command that starts another node of the same swarm; files stand for what its keeper has to be given."""
    words = ["p2pmoe", "node", "--initial-peers", dht_address]
    if config.dht.swarm_id != NodeConfig().dht.swarm_id:
        words += ["--swarm-id", config.dht.swarm_id]
    if config.dht.owner is not None:
        words += ["--owner", config.dht.owner, "--identity", "KEY_FILE", "--delegation", "FILE"]
    if config.access.swarm_key_path is not None:
        words += ["--swarm-key", "FILE"]
    return shlex.join(words)


def _describe(node: Node) -> dict[str, Any]:
    return {
        "peer_id": node.peer_id,
        "dht_address": node.dht_address,
        "endpoint": node.endpoint.url,
        "experts": [backend.name for backend in node.backends],
        "join": join_line(node.dht_address, node.config),
    }
