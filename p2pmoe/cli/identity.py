"""`p2pmoe id`: key files, the delegations of closed swarms, the keys of private ones. Knows nothing of nodes."""

from __future__ import annotations

import datetime as dt
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from p2pmoe.cli.arguments import AsJson, SwarmId, at_home
from p2pmoe.cli.output import print_json
from p2pmoe.cli.settings import load_node_config
from p2pmoe.errors import ConfigError, DecodeError, IdentityError
from p2pmoe.experts.uid import parse_prefix
from p2pmoe.files import expand_home, without_mark
from p2pmoe.identity import (
    MAX_KEY_FILE_BYTES,
    PUBLIC_KEY_BYTES,
    Identity,
    SwarmKey,
    peer_id_of,
    save_new_admin_token,
)
from p2pmoe.protocol.delegations import MAX_FILE_BYTES, delegate, format_delegation, parse_delegation

app = typer.Typer(
    help="Key files, delegations of closed swarms, keys of private swarms.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
swarm_key_app = typer.Typer(
    help="The secret that the members of a private swarm share.", no_args_is_help=True, rich_markup_mode="rich"
)
app.add_typer(swarm_key_app, name="swarm-key")

KeyFile = Annotated[
    Path, typer.Argument(metavar="KEY_FILE", callback=at_home, help="What node.toml calls identity_path.")
]

_WARNING: Final = (
    "warning: this is the PRIVATE key of peer {peer_id}. Whoever reads it is that peer, for ever: it cannot be taken "
    "back. Keep it off screens, chats and shared folders; never run two nodes with it."
)


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
    """Print the peer id of a key file; with --json its public key too.

    Example: [bold]p2pmoe id show identity.pem[/bold]
    """
    _print(Identity.load(path), path, as_json=as_json)


@app.command("export")
def export_key(
    path: KeyFile,
    yes: Annotated[bool, typer.Option("--yes", help="Print it even where a screen would show it.")] = False,
) -> None:
    """Print the private key, to move a node to another machine. Warns; refuses to show it on a terminal.

    Example: [bold]p2pmoe id export identity.pem | ssh newhost p2pmoe id import identity.pem[/bold]
    """
    identity = Identity.load(path)
    if sys.stdout.isatty() and not yes:
        raise IdentityError(
            "the private key would be shown on the screen; send it through a pipe (p2pmoe id export KEY_FILE | ssh "
            "HOST p2pmoe id import KEY_FILE), or pass --yes"
        )
    typer.echo(_WARNING.format(peer_id=identity.peer_id), err=True)
    sys.stdout.write(identity.export_pem().decode("ascii"))
    sys.stdout.flush()


@app.command("import")
def import_key(
    path: KeyFile,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", callback=at_home, help="The exported key; standard input if left out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an exported private key to a new key file, readable by you alone; never overwrites one.

    Example: [bold]p2pmoe id import identity.pem < exported.pem[/bold]
    """
    if source is not None:
        identity = Identity.load(source)  # a file that others can read is refused: the key is not yours alone
    else:
        if sys.stdin is None:
            raise IdentityError("standard input is closed; name the exported key's file with --from FILE")
        identity = Identity.from_pem(sys.stdin.buffer.read(MAX_KEY_FILE_BYTES + 1))
    identity.save(path)
    _print(identity, path, as_json=as_json)


@app.command("delegate")
def delegate_to(
    owner: Annotated[
        Path, typer.Argument(metavar="OWNER_KEY_FILE", callback=at_home, help="Key file of the swarm's owner.")
    ],
    member: Annotated[
        str,
        typer.Argument(
            metavar="MEMBER", help="The member's public key in hexadecimal, a file with it, or its key file."
        ),
    ],
    scope: Annotated[
        str, typer.Option(metavar="PREFIX", help="Uids that it may announce, such as ffn.3.; all if left out.")
    ] = "",
    days: Annotated[float, typer.Option(min=0.001, max=36_500, help="How long from now.")] = 30.0,
    swarm_id: SwarmId = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=at_home, help="Where to write it; an older delegation there is replaced."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let a member of a closed swarm announce experts: prints what its node.toml calls dht.delegation_path.

    The result is no secret. It cannot be taken back before it ends: give it for as long as you would wait.

    Example: [bold]p2pmoe id delegate owner.pem 9f2c…41 --scope ffn.3. --days 30 --out member.txt[/bold]
    """
    if scope:
        parse_prefix(scope)
    identity = Identity.load(owner)
    public_key = _read_member(member)
    swarm = load_node_config(None, {"dht.swarm_id": swarm_id}).dht.swarm_id
    expires_at_ms = int((time.time() + days * 86_400) * 1000)
    given = delegate(identity, swarm, public_key, expires_at_ms=expires_at_ms, scope=scope)
    expires = dt.datetime.fromtimestamp(expires_at_ms / 1000, dt.UTC).isoformat(timespec="seconds")
    text = format_delegation(given, public_key, swarm, expires)
    if out is not None:
        _replace_delegation(out, text)
    if as_json:
        print_json(
            {
                "owner": identity.public_key.hex(),
                "member": public_key.hex(),
                "peer_id": peer_id_of(public_key),
                "swarm_id": swarm,
                "scope": scope,
                "expires_at": expires_at_ms / 1000,
                "delegation": text,
                "path": str(out) if out else None,
            }
        )
    elif out is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(f"{peer_id_of(public_key)} may announce {scope or 'all uids'} in {swarm!r} until {expires}: {out}")
        typer.echo(f"its node needs: dht.owner = {identity.public_key.hex()}, dht.delegation_path = FILE", err=True)


@swarm_key_app.command("new")
def new_swarm_key(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", callback=at_home, help="What node.toml calls access.swarm_key_path.")
    ],
    as_json: AsJson = False,
) -> None:
    """Make the secret of a private swarm, readable by you alone; never overwrites one.

    Example: [bold]p2pmoe id swarm-key new swarm.key[/bold]
    """
    SwarmKey.generate().save(path)
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(f"{path}: give every member a copy over a channel that nobody else reads")


@app.command("admin-token")
def admin_token(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", callback=at_home, help="What node.toml calls admin.token_path.")
    ],
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


def _read_member(text: str) -> bytes:
    """The public key that a text is, or that lies in the file it names."""
    public_key = _from_hex(text)
    if public_key is not None:
        return public_key
    try:
        path = expand_home(text)
        with Path(path).open("rb") as file:
            content = without_mark(file.read(MAX_FILE_BYTES))
    except OSError as error:
        raise ConfigError(
            f"{text!r} is neither a public key ({2 * PUBLIC_KEY_BYTES} hexadecimal digits) nor a file that can be "
            f"read: {error.strerror}; the member's `p2pmoe id show KEY_FILE --json` prints its public key"
        ) from error
    public_key = _from_hex(content.decode("ascii", errors="replace"))
    return public_key if public_key is not None else Identity.load(path).public_key


def _from_hex(text: str) -> bytes | None:
    try:
        public_key = bytes.fromhex(text.strip())
    except ValueError:
        return None
    return public_key if len(public_key) == PUBLIC_KEY_BYTES else None


def _replace_delegation(path: Path, text: str) -> None:
    """Write it whole or not at all: a running node may read it at any moment."""
    try:
        if path.exists():
            parse_delegation(without_mark(path.read_bytes()).decode())
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)  # noqa: PTH105 - Path.replace is the same; the pair reads better
        finally:
            temporary.unlink(missing_ok=True)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} exists and is no delegation; choose another --out") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another --out") from error
