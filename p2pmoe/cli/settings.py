"""Where a setting comes from: node.toml, then P2PMOE_* variables, then flags; the later one wins.

The one place that reads environment variables. A key path in capitals with underscores for dots is its variable:
`dht.port` is P2PMOE_DHT_PORT, `torch_threads` is P2PMOE_TORCH_THREADS. An empty variable counts as unset, and so do
those that Kubernetes and Docker set for a service called p2pmoe, or p2pmoe-dht (`P2PMOE_DHT_PORT=udp://10.0.0.7:1`).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from p2pmoe.config import DHTConfig, NodeConfig, Section, field_types, parse_host_port, parse_toml
from p2pmoe.errors import ConfigError, UsageError
from p2pmoe.identity import Identity, SwarmKey

PREFIX: Final = "P2PMOE_"
OF_THE_COMMAND: Final = frozenset({"P2PMOE_DEBUG"})
"""Variables that are no setting of a node."""
OF_THE_TESTS: Final = "P2PMOE_TEST_"

_OF_A_SERVICE: Final = re.compile(
    r"P2PMOE_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)",
    re.ASCII,
)
_ADDRESS_OF_A_SERVICE: Final = re.compile(r"(?:tcp|udp|sctp)://\S+")
_LIST_OF_PATHS: Final = "experts.modules"
_BETWEEN: Final = re.compile(r"[,\s]+")
_BETWEEN_PATHS: Final = re.compile(r"[,\n]+")
_QUOTES: Final = ('"', "'")

_CLIENT_KEYS: Final = ("initial_peers", "swarm_id", "owner", "join_timeout_s")


def key_paths(section: type[msgspec.Struct] = NodeConfig, prefix: str = "") -> Iterator[str]:
    """Every key of node.toml as a dotted path, in the order of the file."""
    for name, kind in field_types(section).items():
        path = prefix + name
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from key_paths(kind, path + ".")
        else:
            yield path


def variable_of(key_path: str) -> str:
    """`dht.port` -> `P2PMOE_DHT_PORT`."""
    return PREFIX + key_path.replace(".", "_").upper()


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Values of the P2PMOE_* variables by key path.

    Raises:
        ConfigError: a variable fits no key, or its text is no value of that key.
    """
    paths = _paths_by_variable()
    values: dict[str, Any] = {}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name.startswith(OF_THE_TESTS) or name in OF_THE_COMMAND:
            continue
        if not environ[name].strip() or _is_of_a_service(name, environ[name]):
            continue
        if name not in paths:
            raise ConfigError(
                f"{name}: no such setting; a variable is a key of node.toml in capitals, e.g. P2PMOE_DHT_PORT"
                f" for dht.port; unset it"
            )
        values[paths[name]] = read_value(paths[name], environ[name], source=name)
    return values


@functools.cache
def _paths_by_variable() -> dict[str, str]:
    return {variable_of(path): path for path in key_paths()}


def read_value(key_path: str, text: str, *, source: str) -> Any:
    """The value that a text stands for: TOML, a list, or the text itself, whichever the key takes.

    Of a list the parts stand between commas, spaces or new lines (paths: between commas or new lines). Quotes that a
    file of variables left around the whole or a part are taken off. Raises ConfigError when the key takes none of it.
    """
    first: ConfigError | None = None
    for candidate in _readings(text.strip(), between=_BETWEEN_PATHS if key_path == _LIST_OF_PATHS else _BETWEEN):
        try:
            NodeConfig.check_value(key_path, candidate, source=source)  # how keys fit together is checked at the end
        except ConfigError as error:
            first = first or error
        else:
            return candidate
    assert first is not None
    raise first


def load_node_config(
    path: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> NodeConfig:
    """The settings of a node.

    Args:
        path: node.toml; None starts from the defaults.
        flags: key path -> value of a command line flag; None means that the flag was not given.
        environ: stands in for the process's environment.

    Raises:
        ConfigError: the message names the file, variable or flag, the key path, and what was expected.
    """
    overrides = from_environment(os.environ if environ is None else environ)
    for key_path, value in flags.items():
        if value is None:
            continue
        NodeConfig.check_value(key_path, value, source="command line")
        overrides[key_path] = value
    if path is None:
        return NodeConfig.from_tree({}, overrides=overrides)
    return NodeConfig.load(path, overrides)


def load_client_config(
    initial_peers: Sequence[str],
    swarm_id: str | None,
    environ: Mapping[str, str] | None = None,
    *,
    owner: str | None = None,
) -> DHTConfig:
    """The `[dht]` section for a command that only asks: where the swarm is, on a port that the system picks.

    Raises:
        ConfigError: as `load_node_config`, or no initial peer is given anywhere.
    """
    flags = {"dht.initial_peers": tuple(initial_peers) or None, "dht.swarm_id": swarm_id, "dht.owner": owner}
    config = load_node_config(None, flags, environ).dht
    if not config.initial_peers:
        raise ConfigError(
            "no initial peer: give --initial-peers HOST:PORT (a node prints it when it starts) or set "
            "P2PMOE_DHT_INITIAL_PEERS"
        )
    for peer in config.initial_peers:
        parse_host_port(peer, what="initial peer")
    return DHTConfig(**{key: getattr(config, key) for key in _CLIENT_KEYS})


def load_swarm_key(path: str | None, environ: Mapping[str, str] | None = None) -> SwarmKey | None:
    """The secret of a private swarm for a command that only asks; None for an open one. Raises IdentityError."""
    found = load_node_config(None, {"access.swarm_key_path": path}, environ).access.swarm_key_path
    return SwarmKey.load(found) if found else None


def load_client_identity(path: str | None, environ: Mapping[str, str] | None = None) -> Identity:
    """The key that a command signs with: that of a file, else a fresh one. Raises IdentityError."""
    config = load_node_config(None, {"identity_path": path}, os.environ if environ is None else environ)
    return Identity.generate() if config.identity_path is None else Identity.load(config.identity_path)


def split_lists(values: Sequence[str] | None, flag: str) -> tuple[str, ...] | None:
    """`["a,b", "c"]` -> `("a", "b", "c")`; None when the flag was not given.

    Raises UsageError where it was given and names nothing, as a shell's unset variable does: a node that was to join
    would found a swarm of its own.
    """
    if not values:
        return None
    parts = tuple(part for value in values for part in _parts(value, _BETWEEN))
    if not parts:
        raise UsageError(f"{flag} is empty; was a variable of the shell unset? Give a value, or leave {flag} out")
    return parts


def _is_of_a_service(name: str, value: str) -> bool:
    """Whether a container system set it, for whom our prefix is the name of somebody's service."""
    if name.endswith("_PORT") and _ADDRESS_OF_A_SERVICE.fullmatch(value.strip()):
        return True
    return _OF_A_SERVICE.fullmatch(name) is not None


def _readings(text: str, between: re.Pattern[str]) -> Iterator[Any]:
    bare = _unquoted(text)
    for each in dict.fromkeys((text, bare)):
        try:
            yield parse_toml(f"value = {each}")["value"]
        except ValueError:
            pass
    yield text
    yield bare
    yield _parts(text, between)


def _parts(text: str, between: re.Pattern[str]) -> list[str]:
    parts = (_unquoted(part.strip()) for part in between.split(_unquoted(text.strip())))
    return [part for part in parts if part]


def _unquoted(text: str) -> str:
    """Without the quotes around the whole, if they are that and not around its first and last parts."""
    for quote in _QUOTES:
        if len(text) > 1 and text[0] == text[-1] == quote and quote not in text[1:-1]:
            return text[1:-1].strip()
    return text
