"""Flags that several commands share, and flags that take several values. Knows no command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from p2pmoe.cli.terminal import legible
from p2pmoe.errors import ConfigError, UsageError
from p2pmoe.files import expand_home


def at_home(path: Path | None) -> Path | None:
    """`~` that the shell left alone, as in `--config=~/node.toml`. Raises ConfigError."""
    return None if path is None else Path(expand_home(str(path)))


_SEVERAL: Final = {
    "--initial-peers": re.compile(r"[^\s/]+:\d+(,[^\s/]+:\d+)*"),
    "--experts": re.compile(r"[A-Za-z_][\w.\-\[\]:,]*"),
}
"""Flags that may be followed by several values, and what such a value looks like."""

InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        metavar="HOST:PORT…",
        help="DHT addresses of nodes in the swarm; one that answers is enough. [P2PMOE_DHT_INITIAL_PEERS]",
    ),
]
SwarmId = Annotated[
    str | None,
    typer.Option("--swarm-id", metavar="NAME", help="The swarm's name, if it is not p2pmoe. [P2PMOE_DHT_SWARM_ID]"),
]
Owner = Annotated[
    str | None,
    typer.Option(
        "--owner", metavar="PUBLIC_KEY", help="Closed swarm: its owner's key, 64 hexadecimal digits. [P2PMOE_DHT_OWNER]"
    ),
]
SwarmKeyFile = Annotated[
    str | None,
    typer.Option(
        "--swarm-key", metavar="FILE", help="Private swarm: the file with its secret. [P2PMOE_ACCESS_SWARM_KEY_PATH]"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output.")]
Grid = Annotated[str, typer.Option("--grid", metavar="4x4", help="Experts along each dimension of the grid.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples a step.")]
Seed = Annotated[int, typer.Option(min=0, help="Seeds the initial parameters and the order of samples.")]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir", metavar="FOLDER", file_okay=False, callback=at_home, help="Where loss.png and result.json go."
    ),
]


def check_text(arguments: Sequence[str]) -> None:
    r"""Raises UsageError for an argument whose bytes are no text, such as `$'\xff'`."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the argument '{legible(argument)}' is no text in this locale's encoding; write it in UTF-8, with "
                f"LC_ALL=C.UTF-8 where the locale is another, and rename a file of such a name"
            ) from error


def spread_values(arguments: Sequence[str]) -> list[str]:
    """`--initial-peers A B` -> `--initial-peers A --initial-peers B`: the parser wants the flag before each value."""
    spread: list[str] = []
    flag: str | None = None
    for index, argument in enumerate(arguments):
        follows_flag = index > 0 and arguments[index - 1] in _SEVERAL
        if flag is not None and not follows_flag:
            if not _SEVERAL[flag].fullmatch(argument):
                flag = None
            else:
                spread.append(flag)
        if argument == "--":
            return [*spread, *arguments[index:]]
        if argument in _SEVERAL:
            flag = argument
        spread.append(argument)
    return spread


def parse_grid(text: str) -> tuple[int, ...]:
    """`4x4` -> (4, 4); 1 to 4 dimensions. Raises ConfigError."""
    sizes = re.split(r"[x×]", text.strip().lower())
    if not 1 <= len(sizes) <= 4 or not all(re.fullmatch(r"[1-9][0-9]{0,5}", size, re.ASCII) for size in sizes):
        raise ConfigError(f"--grid {text!r} is no grid; write its sizes with x between them, e.g. 4x4")
    return tuple(map(int, sizes))
