"""`p2pmoe state`: a folder of checkpoints, looked at and carried elsewhere. Needs no node and no network; no torch.

Looking (`list`, `verify`, `export`) may be done beside a node that writes there; `import` takes the folder for itself.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from p2pmoe.cli.arguments import AsJson, at_home
from p2pmoe.cli.output import open_console, print_json
from p2pmoe.errors import ConfigError, ExpertNotFoundError, StateError
from p2pmoe.experts.uid import UidPattern
from p2pmoe.server.checkpoints import document_name
from p2pmoe.server.state_folder import Found, StateFolder
from p2pmoe.server.state_index import Entry

app = typer.Typer(
    help="Checkpoints of experts: look at them, check them, carry them elsewhere.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", callback=at_home, help="What node.toml calls state.path.")]
Pattern = Annotated[
    str | None,
    typer.Option("--experts", metavar="PATTERN", help="A uid, a prefix or a glob such as 'ffn.3.*'; all if left out."),
]


@app.command("list")
def list_checkpoints(folder: Folder, pattern: Pattern = None, as_json: AsJson = False) -> None:
    """Show which checkpoints there are, the newest of each expert first; nothing is read but their names and index.

    Example: [bold]p2pmoe state list ~/p2pmoe-state --experts 'ffn.3.*'[/bold]
    """
    opened = _look(folder)
    entries = _chosen(opened, pattern)
    if as_json:
        print_json({"folder": str(folder), "checkpoints": [_document(entry) for entry in entries]})
        return
    table = Table("expert", "updates", "written", "bytes", "incarnation", "file", box=box.SIMPLE)
    for entry in entries:
        table.add_row(
            entry.uid,
            "?" if entry.is_bad else str(entry.updates),
            _when(entry.saved_at),
            str(entry.nbytes),
            "not whole" if entry.is_bad else entry.incarnation[:8],
            document_name(entry.uid, entry.sequence),
        )
    open_console().print(table)


@app.command("verify")
def verify(folder: Folder, pattern: Pattern = None, as_json: AsJson = False) -> None:
    """Read every checkpoint and compare its digests. Ends with 8 when one is torn or tampered with.

    Example: [bold]p2pmoe state verify ~/p2pmoe-state[/bold]
    """
    opened = _look(folder)
    checked = [(entry, opened.check(entry)) for entry in _chosen(opened, pattern)]
    broken = [(entry, problem) for entry, problem in checked if problem is not None]
    lost = sorted({entry.uid for entry, _ in checked} - {entry.uid for entry, problem in checked if problem is None})
    if as_json:
        documents = [_document(entry) | {"problem": problem} for entry, problem in checked]
        print_json({"folder": str(folder), "checkpoints": documents, "whole": not broken, "lost": lost})
    else:
        for entry, problem in broken:
            typer.echo(f"{document_name(entry.uid, entry.sequence)}: {problem}")
        typer.echo(f"{len(checked) - len(broken)} of {len(checked)} checkpoints are whole")
    if broken:
        of = f"; {len(lost)} experts have no whole one left: {', '.join(lost[:8])}" if lost else ""
        raise StateError(f"{len(broken)} of {len(checked)} checkpoints in {folder} are not whole{of}")


@app.command("export")
def export(
    folder: Folder,
    to: Annotated[Path, typer.Argument(metavar="TO", callback=at_home, help="A new folder, or an empty one.")],
    pattern: Pattern = None,
    as_json: AsJson = False,
) -> None:
    """Copy the newest whole checkpoint of each expert to a folder of its own, which another node can import or use.

    Example: [bold]p2pmoe state export ~/p2pmoe-state /media/stick/experts --experts 'ffn.3.*'[/bold]
    """
    source = _look(folder)
    uids = list(dict.fromkeys(entry.uid for entry in _chosen(source, pattern)))
    if _is_full(to):
        raise ConfigError(f"{to} exists and is not empty; choose another folder")
    with _opened(to) as target:
        copied = [target.adopt(_newest(source, uid)) for uid in uids]
    _report("exported", to, copied, as_json=as_json)


@app.command("import")
def import_checkpoints(
    folder: Folder,
    source: Annotated[
        Path, typer.Option("--from", metavar="FOLDER", callback=at_home, help="Where the checkpoints are now.")
    ],
    pattern: Pattern = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also where the folder has the expert already: they become the newest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take the newest whole checkpoint of each expert of another folder. No node may be using this one.

    An expert that is here already is refused, unless it is the same one with fewer updates.

    Example: [bold]p2pmoe state import ~/p2pmoe-state --from /media/stick/experts[/bold]
    """
    origin = _look(source)
    uids = list(dict.fromkeys(entry.uid for entry in _chosen(origin, pattern)))
    found = [_newest(origin, uid) for uid in uids]
    with _opened(folder) as target:
        if not replace:
            for each in found:
                _check_place(target, each)
        copied = [target.adopt(each) for each in found]
    _report("imported", folder, copied, as_json=as_json)


def _look(folder: Path) -> StateFolder:
    opened = StateFolder(folder)
    try:
        opened.look()
    except OSError as error:
        raise StateError(f"{folder} cannot be read: {error.strerror}") from error
    return opened


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[StateFolder]:
    folder = StateFolder(path)
    try:
        folder.open()
        yield folder
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        folder.close()


def _chosen(folder: StateFolder, pattern: str | None) -> list[Entry]:
    """Raises InvalidUidError, ExpertNotFoundError."""
    parsed = None if pattern is None else UidPattern.parse(pattern)
    entries = [entry for entry in folder.entries if parsed is None or parsed.matches(entry.uid)]
    if not entries:
        which = f" of {pattern}" if pattern else ""
        raise ExpertNotFoundError(f"there is no checkpoint{which} in {folder.path}")
    return entries


def _newest(folder: StateFolder, uid: str) -> Found:
    found = folder.newest(uid)
    assert found is not None
    return found


def _check_place(folder: StateFolder, found: Found) -> None:
    """Raises StateError where an expert would be thrown away."""
    theirs = found.checkpoint
    entries = [entry for entry in folder.entries_of(theirs.uid) if not entry.is_bad]
    if not entries:
        return
    ours = entries[0]
    if ours.incarnation != theirs.incarnation or ours.updates > theirs.updates:
        what = "another one" if ours.incarnation != theirs.incarnation else "newer"
        raise StateError(
            f"{theirs.uid} is in {folder.path} already, at {ours.updates} updates, and is {what} than the one at "
            f"{theirs.updates}; nothing was imported; pass --replace to take it all the same"
        )


def _is_full(path: Path) -> bool:
    try:
        return next(path.iterdir(), None) is not None
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"{path} cannot be used: {error.strerror}; choose another folder") from error


def _report(done: str, path: Path, entries: list[Entry], *, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(path), done: [_document(entry) for entry in entries]})
    else:
        typer.echo(f"{done} {len(entries)} experts: {path}")


def _document(entry: Entry) -> dict[str, Any]:
    return {
        "uid": entry.uid,
        "sequence": entry.sequence,
        "incarnation": entry.incarnation,
        "updates": entry.updates,
        "saved_at": entry.saved_at,
        "nbytes": entry.nbytes,
        "file": document_name(entry.uid, entry.sequence),
        "sha256": entry.document_sha256,
        "tensors_sha256": entry.tensors_sha256,
        "marked_bad": entry.is_bad,
    }


def _when(seconds: float) -> str:
    try:
        return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat(sep=" ", timespec="seconds")
    except (OverflowError, ValueError, OSError):  # a clock that was far off, or somebody's joke
        return "?"
