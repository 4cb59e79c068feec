"""`scripts/attack`: a table, or one JSON line an attack and a summary. Exit code 1: an attack got through."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fnmatch
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attacks.registry import Attack, all_attacks
from attacks.runner import Result, merge_summaries, run_attacks
from attacks.target import Target, own_target, running_target
from p2pmoe.errors import P2PMoEError

Opened = contextlib.AbstractContextManager[Target]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/attack", description="Example: scripts/attack --only 'frame_*' --json"
    )
    parser.add_argument("--only", action="append", metavar="PATTERN", help="names or themes to run, e.g. 'dht_*'")
    parser.add_argument("--list", action="store_true", help="print every attack and what is expected, run none")
    parser.add_argument("--json", action="store_true", help="one JSON line an attack, the last line a summary")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is random")
    parser.add_argument("--endpoint", metavar="URL", help="a node that runs already, and that you may attack")
    parser.add_argument("--dht-address", metavar="HOST:PORT", help="its DHT address")
    parser.add_argument("--swarm-id", default="p2pmoe")
    parser.add_argument("--folder", type=Path, help="where our own node's settings and log go; default: temporary")
    options = parser.parse_args()
    if bool(options.endpoint) != bool(options.dht_address):
        parser.error("--endpoint and --dht-address belong together; leave both out to attack a node of our own")
    chosen = [each for each in all_attacks() if _wanted(each, options.only)]
    if not chosen:
        parser.error(f"no attack is called {' or '.join(options.only)}; see --list")
    if options.list:
        _print_list(chosen, as_json=options.json)
        return 0
    with contextlib.ExitStack() as stack:
        try:
            if options.endpoint:
                running = running_target(options.endpoint, options.dht_address, options.swarm_id)
                targets: list[Opened] = [contextlib.nullcontext(running)]
            else:
                folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attack-")))
                targets = _own_targets(folder, chosen)
            return _run_all(targets, chosen, options.seed, as_json=options.json)
        except (P2PMoEError, RuntimeError, OSError) as error:
            print(f"scripts/attack: {error}", file=sys.stderr)
            return 2


def _own_targets(folder: Path, chosen: Sequence[Attack]) -> list[Opened]:
    """An open node, and one of a private swarm after it: those of them that are attacked at all."""
    private = [each for each in chosen if each.needs == "private"]
    targets: list[Opened] = [own_target(folder)] if len(private) < len(chosen) else []
    return [*targets, own_target(folder / "private", private=True)] if private else targets


def _run_all(targets: Sequence[Opened], chosen: Sequence[Attack], seed: int, *, as_json: bool) -> int:
    """Attack one node after the other; one table, one summary."""
    table, summaries, fitting = _table(), [], set()
    for opened in targets:
        with opened as target:
            summary, names = asyncio.run(_run(target, chosen, seed, table, as_json=as_json))
            summaries.append(summary)
            fitting |= names
    result = merge_summaries(summaries)
    result["left_out"] = [each.name for each in chosen if each.name not in fitting]
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        print("\r", end="", file=sys.stderr)
        Console().print(table)
        Console().print(
            f"{result['attacks']} attacks, {result['refused']} refused, state lost in {result['state_lost']}; "
            f"honest p50 {result['p50_quiet_ms']} ms quiet, {result['p50_quiet_after_ms']} ms afterwards, at worst "
            f"{result['worst_ratio']} times the quiet value"
        )
    return 0 if result["passed"] else 1


async def _run(
    target: Target, chosen: Sequence[Attack], seed: int, table: Table, *, as_json: bool
) -> tuple[dict[str, Any], set[str]]:
    """The summary of one node, and the names of the attacks that make sense there."""
    await target.discover()
    fitting = [each for each in chosen if target.has(each.needs)]
    summary: dict[str, Any] = {}
    async for result in run_attacks(target, fitting, seed):
        if not isinstance(result, Result):
            summary = result
        elif as_json:
            print(json.dumps(result.to_dict()), flush=True)
        else:
            _add_row(table, result)
            print(f"\r{result.name:<48}", end="", file=sys.stderr, flush=True)
    return summary, {each.name for each in fitting}


def _wanted(each: Attack, patterns: Sequence[str] | None) -> bool:
    return not patterns or any(
        fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (each.name, each.theme)
    )


def _print_list(chosen: Sequence[Attack], *, as_json: bool) -> None:
    for each in chosen:
        if as_json:
            print(json.dumps({"name": each.name, "theme": each.theme, "expects": each.expects, "does": each.summary}))
        else:
            print(f"{each.name:<34} {each.expects:<28} {each.summary}")


def _table() -> Table:
    table = Table(box=None)
    for column in ("attack", "sent", "expected", "seen", "p50 ms", "ratio", "state"):
        table.add_column(column, justify="right" if column in {"p50 ms", "ratio"} else "left", overflow="fold")
    return table


def _add_row(table: Table, result: Result) -> None:
    table.add_row(
        result.name,
        " ".join(f"{count} {what}" for what, count in result.sent.items() if what != "attacks"),
        result.expected,
        result.seen,
        str(result.p50_ms),
        str(result.ratio),
        "ok" if result.state_ok else "; ".join(result.lost),
        style=None if result.passed else "bold red",
    )


if __name__ == "__main__":
    sys.exit(main())
