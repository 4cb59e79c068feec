"""`p2pmoe id`: key files. Knows nothing of nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from p2pmoe.cli.arguments import AsJson
from p2pmoe.cli.output import print_json
from p2pmoe.identity import Identity, save_new_admin_token

app = typer.Typer(help="Make and show key files.", no_args_is_help=True, rich_markup_mode="rich")

KeyFile = Annotated[Path, typer.Argument(metavar="KEY_FILE", help="What node.toml calls identity_path.")]


@app.command("new")
def new(path: KeyFile, as_json: AsJson = False) -> None:
    """Make a key file, readable by you alone; never overwrites one.

    Example: [bold]p2pmoe id new identity.pem[/bold]
    """
    identity = Identity.generate()
    identity.save(path)
    _print(identity, path, as_json=as_json)


@app.command("show")
def show(path: KeyFile, as_json: AsJson = False) -> None:
    """Print the peer id of a key file.

    Example: [bold]p2pmoe id show identity.pem[/bold]
    """
    _print(Identity.load(path), path, as_json=as_json)


@app.command("admin-token")
def admin_token(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What node.toml calls admin.token_path.")],
    as_json: AsJson = False,
) -> None:
    """Make the token that lets you read a node's metrics from another machine; never overwrites one.

    Send it as [bold]Authorization: Bearer TOKEN[/bold].

    Example: [bold]p2pmoe id admin-token admin.token[/bold]
    """
    save_new_admin_token(path)
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(str(path))


def _print(identity: Identity, path: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"peer_id": identity.peer_id, "public_key": identity.public_key.hex(), "path": str(path)})
    else:
        typer.echo(identity.peer_id)
