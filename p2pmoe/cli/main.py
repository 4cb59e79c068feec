"""The `p2pmoe` command: its subcommands and their exit codes. Knows nothing of nodes or tensors.

Subcommands import what is heavy when they run: `p2pmoe --help` and `p2pmoe lookup` never load torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from p2pmoe import __version__
from p2pmoe.cli import demo, identity, lookup, node, state, train
from p2pmoe.cli.arguments import check_text, spread_values
from p2pmoe.cli.failures import EXIT_CODES, run_guarded
from p2pmoe.cli.terminal import prepare_streams

_EXIT_CODES = "\n".join(f"{code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
_EPILOG = f"""[bold]Exit codes[/bold]
{_EXIT_CODES}

P2PMOE_* variables override node.toml, flags override both."""

app = typer.Typer(
    name="p2pmoe",
    help="Train a huge mixture of experts through strangers' machines.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("node")(node.node)
app.command("train")(train.train)
app.command("lookup")(lookup.lookup)
app.add_typer(identity.app, name="id")
app.add_typer(state.app, name="state")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"p2pmoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. [P2PMOE_DEBUG=1]")] = False,
) -> None:
    if debug:
        os.environ["P2PMOE_DEBUG"] = "1"


@app.command("version")
def version() -> None:
    """Print the version.

    Example: [bold]p2pmoe version[/bold]
    """
    _print_version(True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    prepare_streams()
    given = sys.argv[1:] if arguments is None else arguments
    return run_guarded(lambda: _run(given))


def _run(arguments: Sequence[str]) -> object:
    check_text(arguments)
    return app(args=spread_values(arguments), prog_name="p2pmoe", standalone_mode=False)
