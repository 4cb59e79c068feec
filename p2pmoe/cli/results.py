"""What is shown and kept when training has ended: the table of experts, the accuracy, the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from p2pmoe.cli.failures import need_package
from p2pmoe.cli.output import print_json
from p2pmoe.errors import ConfigError

if TYPE_CHECKING:
    from p2pmoe.training.census import ExpertCount
    from p2pmoe.training.session import Result

SHORT_PEER_ID = 8


def make_run_dir(path: Path) -> Path:
    """The folder, made if it is missing. Raises ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--run-dir {path} cannot be made: {error.strerror}; choose another folder") from error
    return path


def finish(
    result: Result, console: Console, run_dir: Path | None, *, as_json: bool, names: dict[str, str] | None = None
) -> None:
    """Write the run's folder, show the table, and with `as_json` end standard output with the document.

    `names` calls peers by something shorter than their id.
    """
    document = result.to_json()
    if run_dir is not None:
        document["run_dir"] = str(run_dir)
        keep(result, document, run_dir)
    show(result, console, names=names or {})
    if run_dir is not None:
        console.print(f"run folder: {run_dir}", highlight=False, soft_wrap=True, markup=False)
    if as_json:
        print_json(document)


def keep(result: Result, document: dict[str, Any], run_dir: Path) -> None:
    """result.json and loss.png. A missing drawing package costs the drawing, not the result."""
    (run_dir / "result.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    try:
        from p2pmoe.training.curve import draw_curve
    except ImportError as error:
        typer.echo(f"warning: no loss.png: {need_package('it', error)}", err=True)
        return
    if result.history.losses:
        title = f"{result.options.task}: {len(result.experts)} experts, held-out accuracy {result.accuracy:.1%}"
        draw_curve(result.history, title, run_dir / "loss.png")


def show(result: Result, console: Console, names: dict[str, str]) -> None:
    """The table of experts and the figures below it."""
    history = result.history
    console.print(experts_table(result.experts, names))
    console.print(
        f"held-out accuracy [bold]{result.accuracy:.4f}[/bold] after {len(history.losses)} steps "
        f"in {history.seconds:.1f} s, {history.samples_per_s:.0f} samples/s, {history.failed_steps} failed steps",
        highlight=False,
        soft_wrap=True,
    )


def experts_table(experts: list[ExpertCount], names: dict[str, str]) -> Table:
    """One row an expert."""
    table = Table("expert", "node", title="experts", title_justify="left")
    table.add_column("updates", justify="right")
    table.add_column("requests", justify="right")
    for each in experts:
        peer_id = each["peer_id"]
        name = f"{names[peer_id]} ({peer_id[:SHORT_PEER_ID]})" if peer_id in names else peer_id[:SHORT_PEER_ID]
        table.add_row(each["uid"], name, _number(each["updates"]), _number(each["requests"]))
    return table


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)
