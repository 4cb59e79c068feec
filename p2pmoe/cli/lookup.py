"""`p2pmoe lookup`: who is there. Reads the DHT and asks nodes for schemas; never loads torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import typer
from rich import box
from rich.live import Live
from rich.table import Table
from rich.tree import Tree

from p2pmoe.cli.arguments import AsJson, InitialPeers, Owner, SwarmId, SwarmKeyFile
from p2pmoe.cli.failures import raise_on_sigterm
from p2pmoe.cli.logs import set_up_logs
from p2pmoe.cli.output import open_console, print_json
from p2pmoe.cli.settings import load_client_config, load_swarm_key, split_lists
from p2pmoe.cli.survey import Sighting, Survey, format_schema
from p2pmoe.cli.tree import make_branches, make_tree
from p2pmoe.config import LogConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import ExpertNotFoundError
from p2pmoe.experts.directory import ExpertDirectory, ExpertRecord
from p2pmoe.experts.uid import UidPattern
from p2pmoe.identity import Identity
from p2pmoe.rpc.http.documents import HttpDocuments


def lookup(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="A uid (ffn.3.1), a prefix (ffn.3.) or a glob ('ffn.3.*').")
    ],
    initial_peers: InitialPeers = None,
    swarm_id: SwarmId = None,
    owner: Owner = None,
    swarm_key: SwarmKeyFile = None,
    as_json: AsJson = False,
    tree: Annotated[bool, typer.Option("--tree", help="Show the tree of prefixes with their counts.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again until Ctrl-C.")] = False,
    every_s: Annotated[float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Pause of --watch.")] = 2.0,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="For one node.")] = 5.0,
) -> None:
    """Find experts in the swarm: where they are, what they take, how far away.

    With --json one document on a line: a list with an object for every expert and node; with --tree as well, a list
    of nested prefixes. Every record shown was signed by its node; forged ones are counted and left out, and so are,
    in a closed swarm (--owner), those without the owner's delegation.
    Nothing found is exit code 7.

    Example: [bold]p2pmoe lookup 'ffn.3.*' --initial-peers 127.0.0.1:31337[/bold]
    """
    raise_on_sigterm()
    set_up_logs(LogConfig(level="warning"))
    UidPattern.parse(pattern)
    config = load_client_config(split_lists(initial_peers) or (), swarm_id, owner=owner)
    dht = DHTNode(Identity.generate(), config, client_mode=True, swarm_key=load_swarm_key(swarm_key))
    if watch:
        asyncio.run(_watch(pattern, dht, timeout_s, every_s, as_json=as_json, tree=tree))
        return
    sightings = asyncio.run(_look_once(pattern, dht, timeout_s))
    if as_json:
        print_json(make_document(sightings, tree=tree))
    elif sightings:
        open_console().print(make_view(pattern, sightings, tree=tree))
    if not sightings:
        raise ExpertNotFoundError(
            f"no live expert matches {pattern}; it may have expired a moment ago: look for everything of that name "
            f"with `p2pmoe lookup '{UidPattern.parse(pattern).name}.*'`"
        )


@contextlib.asynccontextmanager
async def _open_survey(dht: DHTNode, timeout_s: float) -> AsyncIterator[Survey]:
    async with dht, HttpDocuments(timeout_s=timeout_s) as documents:
        yield Survey(ExpertDirectory(dht), documents)


async def _look_once(pattern: str, dht: DHTNode, timeout_s: float) -> list[Sighting]:
    async with _open_survey(dht, timeout_s) as survey:
        sightings = await survey.look(pattern)
        for count, what in (
            (survey.forged_records, "with a wrong signature"),
            (survey.undelegated_records, "without a delegation of the swarm's owner"),
        ):
            if count:
                open_console(stderr=True).print(f"{count} records {what} were left out")
        return sightings


async def _watch(pattern: str, dht: DHTNode, timeout_s: float, every_s: float, *, as_json: bool, tree: bool) -> None:
    console = open_console()
    async with _open_survey(dht, timeout_s) as survey:
        live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
        with live or contextlib.nullcontext():
            while True:
                sightings = await survey.look(pattern)
                if as_json:
                    print_json(make_document(sightings, tree=tree))
                elif live is not None:
                    live.update(make_view(pattern, sightings, tree=tree), refresh=True)
                else:
                    console.print(make_view(pattern, sightings, tree=tree))
                await asyncio.sleep(every_s)


def make_document(sightings: list[Sighting], *, tree: bool) -> list[dict[str, Any]]:
    """What --json prints."""
    if tree:
        return [branch.to_json() for branch in make_branches(each.record for each in sightings)]
    return [each.to_json() for each in sightings]


def make_view(pattern: str, sightings: list[Sighting], *, tree: bool) -> Table | Tree:
    """What people see."""
    return make_tree(pattern, [each.record for each in sightings]) if tree else make_table(pattern, sightings)


def format_signature(record: ExpertRecord) -> str:
    """`valid`, and in a closed swarm that its owner let the signer say so, and where."""
    if record.scope is None:
        return record.signature
    return f"{record.signature}, delegated" + (f" {record.scope}*" if record.scope else "")


def make_table(pattern: str, sightings: list[Sighting]) -> Table:
    """One row for each expert and node; the nodes of one expert stand below one another."""
    table = Table(title=f"{pattern}: {len(sightings)} found", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("uid", "node", "endpoint"):
        table.add_column(column, no_wrap=True)
    table.add_column("schema", overflow="fold")
    for column in ("age", "expires", "signature", "round trip"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = ""
    for each in sightings:
        round_trip = "no answer" if each.round_trip_ms is None else f"{each.round_trip_ms:.1f} ms"
        record = each.record
        table.add_row(
            record.uid if record.uid != shown else "",
            record.peer_id[:8],
            record.endpoint.url.replace("[", r"\["),
            format_schema(each.schema).replace("[", r"\["),
            f"{each.age_s:.0f} s",
            f"in {each.expires_in_s:.0f} s",
            format_signature(record).replace("[", r"\["),
            round_trip,
        )
        shown = record.uid
    return table
