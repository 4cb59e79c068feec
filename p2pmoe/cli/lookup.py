"""`p2pmoe lookup`: who is there. Reads the DHT and asks nodes for schemas; never loads torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer
from rich import box
from rich.live import Live
from rich.table import Table
from rich.tree import Tree

from p2pmoe.cli.arguments import AsJson, InitialPeers, Owner, SwarmId, SwarmKeyFile
from p2pmoe.cli.failures import raise_on_sigterm
from p2pmoe.cli.logs import set_up_logs
from p2pmoe.cli.output import open_console, print_json
from p2pmoe.cli.overview import EVERYTHING, overview_document, overview_table, survey_swarm
from p2pmoe.cli.settings import load_client_config, load_swarm_key, split_lists
from p2pmoe.cli.survey import Sighting, Survey, format_schema
from p2pmoe.cli.tree import make_branches, make_tree
from p2pmoe.config import LogConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import ExpertNotFoundError
from p2pmoe.experts.directory import ExpertDirectory, ExpertRecord
from p2pmoe.experts.uid import UidPattern, parse_uid
from p2pmoe.identity import Identity
from p2pmoe.rpc.http.documents import HttpDocuments
from p2pmoe.types import Endpoint

MAX_SINGLE_ROWS: Final = 40
"""More experts than that are shown in groups."""


def lookup(
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN", help="A uid (ffn.3.1), a prefix (ffn.3.) or a glob ('ffn.3.*'); everything if left out."
        ),
    ] = EVERYTHING,
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

    Without a pattern (or with '*'): what the swarm contains, a line for each name in front of coordinates, with its
    grid and how much of it is served, nodes, updates and schemas.

    With --json one document on a line: a list with an object for every expert and node, of which the first one of
    each schema_digest has the schema; with --tree a list of nested prefixes; without a pattern an object. Every record
    shown was signed by its node; forged ones are counted and left out, and so are, in a closed swarm (--owner), those
    without the owner's delegation.
    Nothing found is exit code 7.

    Example: [bold]p2pmoe lookup 'ffn.3.*' --initial-peers 127.0.0.1:31337[/bold]
    """
    raise_on_sigterm()
    set_up_logs(LogConfig(level="warning"))
    if pattern != EVERYTHING:
        UidPattern.parse(pattern)
    config = load_client_config(split_lists(initial_peers, "--initial-peers") or (), swarm_id, owner=owner)
    dht = DHTNode(Identity.generate(), config, client_mode=True, swarm_key=load_swarm_key(swarm_key))
    view = _View(pattern, config.swarm_id, timeout_s, as_json=as_json, tree=tree)
    if watch:
        asyncio.run(_watch(view, dht, every_s))
        return
    sight = asyncio.run(_look_once(view, dht))
    if as_json:
        print_json(sight.document)
    elif sight.found:
        open_console().print(sight.shown)
    if not sight.found:
        raise ExpertNotFoundError(view.nothing_found)


@dataclass(frozen=True, slots=True)
class _Sight:
    found: bool
    document: Any
    shown: Table | Tree


class _View:
    """What is looked for and how it is shown."""

    def __init__(self, pattern: str, swarm_id: str, timeout_s: float, *, as_json: bool, tree: bool) -> None:
        self._pattern, self._swarm_id, self.timeout_s = pattern, swarm_id, timeout_s
        self.as_json, self._tree = as_json, tree

    async def look(self, survey: Survey, documents: HttpDocuments) -> _Sight:
        if self._pattern != EVERYTHING:
            sightings = await survey.look(self._pattern)
        else:
            summaries, sightings = await survey_swarm(survey, documents, self.timeout_s)
            if not self._tree:
                document = overview_document(self._swarm_id, summaries, sightings)
                return _Sight(bool(sightings), document, overview_table(self._swarm_id, summaries, sightings))
        return _Sight(
            bool(sightings),
            make_document(sightings, tree=self._tree),
            make_view(self._pattern, sightings, tree=self._tree),
        )

    @property
    def nothing_found(self) -> str:
        if self._pattern == EVERYTHING:
            return (
                f"nobody serves an expert in swarm {self._swarm_id}; a node with experts: p2pmoe node --experts "
                f"'ffn.[0:4].[0:4]' --initial-peers HOST:PORT"
            )
        wider = f"{UidPattern.parse(self._pattern).name}.*"
        of_name = f"for everything of that name with `p2pmoe lookup '{wider}'`, or "
        return (
            f"no live expert matches {self._pattern}; it may have expired a moment ago: look "
            f"{'' if self._pattern == wider else of_name}for all with `p2pmoe lookup`"
        )


@contextlib.asynccontextmanager
async def _open_survey(dht: DHTNode, timeout_s: float) -> AsyncIterator[tuple[Survey, HttpDocuments]]:
    async with dht, HttpDocuments(timeout_s=timeout_s) as documents:
        yield Survey(ExpertDirectory(dht), documents), documents


async def _look_once(view: _View, dht: DHTNode) -> _Sight:
    async with _open_survey(dht, view.timeout_s) as (survey, documents):
        sight = await view.look(survey, documents)
        for count, what in (
            (survey.forged_records, "with a wrong signature"),
            (survey.undelegated_records, "without a delegation of the swarm's owner"),
        ):
            if count:
                open_console(stderr=True).print(f"{count} records {what} were left out")
        return sight


async def _watch(view: _View, dht: DHTNode, every_s: float) -> None:
    console = open_console()
    async with _open_survey(dht, view.timeout_s) as (survey, documents):
        live = Live(console=console, auto_refresh=False) if console.is_terminal and not view.as_json else None
        with live or contextlib.nullcontext():
            while True:
                sight = await view.look(survey, documents)
                if view.as_json:
                    print_json(sight.document)
                elif live is not None:
                    live.update(sight.shown, refresh=True)
                else:
                    console.print(sight.shown)
                await asyncio.sleep(every_s)


def make_document(sightings: list[Sighting], *, tree: bool) -> list[dict[str, Any]]:
    """What --json prints: a schema stands with the first record of its digest."""
    if tree:
        return [branch.to_json() for branch in make_branches(each.record for each in sightings)]
    told: set[str] = set()
    document = []
    for each in sightings:
        fields = each.to_json()
        if each.record.schema_digest in told:
            del fields["schema"]
        elif each.schema is not None:
            told.add(each.record.schema_digest)
        document.append(fields)
    return document


def make_view(pattern: str, sightings: list[Sighting], *, tree: bool) -> Table | Tree:
    """What people see."""
    return make_tree(pattern, [each.record for each in sightings]) if tree else make_table(pattern, sightings)


def format_signature(record: ExpertRecord) -> str:
    """`valid`, and in a closed swarm that its owner let the signer say so, and where."""
    if record.scope is None:
        return record.signature
    return f"{record.signature}, delegated" + (f" {record.scope}*" if record.scope else "")


def make_table(pattern: str, sightings: list[Sighting]) -> Table:
    """One row for each expert and node, those of one expert below one another; of many neighbours one for each node."""
    table = Table(title=f"{pattern}: {len(sightings)} found", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("uid", "node", "endpoint"):
        table.add_column(column, no_wrap=True)
    table.add_column("schema", overflow="fold")
    for column in ("age", "expires", "signature", "round trip"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = ""
    for run in group_neighbours(sightings) if len(sightings) > MAX_SINGLE_ROWS else [[each] for each in sightings]:
        each, record = run[0], run[0].record
        uids = record.uid if len(run) == 1 else span(record.uid, run[-1].record.uid)
        table.add_row(
            uids.replace("[", r"\[") if uids != shown else "",
            record.peer_id[:8],
            record.endpoint.url.replace("[", r"\["),
            format_schema(each.schema).replace("[", r"\["),
            f"{max(other.age_s for other in run):.0f} s",
            f"in {min(other.expires_in_s for other in run):.0f} s",
            format_signature(record).replace("[", r"\["),
            "no answer" if each.round_trip_ms is None else f"{each.round_trip_ms:.1f} ms",
        )
        shown = uids
    return table


def group_neighbours(sightings: Iterable[Sighting]) -> list[list[Sighting]]:
    """Runs of experts of one node whose last coordinates follow one another, and that take and give the same."""
    runs: dict[tuple[str, str, Endpoint, str], list[list[Sighting]]] = {}
    for each in sightings:
        record, uid = each.record, parse_uid(each.record.uid)
        of_one_kind = runs.setdefault((uid.prefix, record.peer_id, record.endpoint, record.schema_digest), [])
        if of_one_kind and parse_uid(of_one_kind[-1][-1].record.uid).suffix + 1 == uid.suffix:
            of_one_kind[-1].append(each)
        else:
            of_one_kind.append([each])
    return sorted(
        (run for of_one_kind in runs.values() for run in of_one_kind),
        key=lambda run: (parse_uid(run[0].record.uid), run[0].record.peer_id),
    )


def span(first: str, last: str) -> str:
    """`ffn.3.[0:16]` of its first and its last uid."""
    start, end = parse_uid(first), parse_uid(last)
    return f"{start.prefix}[{start.suffix}:{end.suffix + 1}]"
