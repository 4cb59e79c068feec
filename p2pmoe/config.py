"""node.toml: every setting of a node, typed, with its default. Knows nothing of what the settings build.

Each room takes its own section (`HttpConfig`, `DHTConfig`, …), never the whole. Units are in the names.
`node.toml` at the top of the repository is the same list as a commented file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from p2pmoe.errors import ConfigError
from p2pmoe.types import is_loopback

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(gt=0)]
NonNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Milliseconds = Annotated[float, Meta(ge=0)]


class Section(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One table of node.toml. Immutable; unknown keys are refused."""


class HttpConfig(Section, frozen=True):
    """`[http]`: the port that callers reach. Port 0 lets the system pick one.

    Raises ConfigError for `tls = false` with an address that other machines reach.
    """

    host: str = "127.0.0.1"
    port: Port = 0
    announce_host: str | None = None
    """The address written into DHT records; `host` when it is not set."""
    tls: bool = True
    """TLS 1.3 with a certificate of the node's own key. Plain HTTP is allowed on loopback only."""
    drain_timeout_s: Seconds = 10.0
    """How long running calls may take to finish after the first Ctrl-C."""
    keepalive_timeout_s: Seconds = 75.0

    def __post_init__(self) -> None:
        for key, host in (("host", self.host), ("announce_host", self.announce_host)):
            if not self.tls and host is not None and not is_loopback(host):
                raise ConfigError(
                    f"tls = false with {key} = {host!r}: plain HTTP is allowed on loopback only; remove tls = false (a "
                    f"certificate needs no setting up), or listen on 127.0.0.1"
                )


class LimitsConfig(Section, frozen=True):
    """`[limits]`: what a caller may ask for. Over a limit a call is refused before memory is allocated for it."""

    max_header_bytes: Positive = 256 * 1024
    max_body_bytes: Positive = 256 * 1024 * 1024
    """Tensor bytes of one call."""
    max_exchange_bytes: Positive = 1024 * 1024 * 1024
    """Bytes of all calls of one HTTP exchange together."""
    max_json_bytes: Positive = 16 * 1024 * 1024
    """JSON of one Open Inference Protocol request, tensor values written as JSON included."""
    max_json_depth: Positive = 32
    """Arrays and objects inside one another, in any JSON of a call."""
    max_calls_per_exchange: Positive = 1024
    max_tensors: Positive = 256
    """Tensors of one call."""
    max_rank: Positive = 16
    max_connections: Positive = 512
    """Over it, and over the next three, a connection is closed before the TLS handshake costs anything."""
    max_source_connections: Positive = 128
    """Of one IPv4 address or IPv6 /64."""
    max_handshakes_per_s: Seconds = 100.0
    """New connections a second, of all callers; after a pause `max_connections` may come at once."""
    max_source_handshakes_per_s: Seconds = 20.0
    """The same of one source, after a pause `max_source_connections` at once."""
    handshake_timeout_s: Seconds = 5.0
    max_http_head_bytes: Positive = 32 * 1024
    """Request line and header fields of one HTTP request."""
    http_head_timeout_s: Seconds = 10.0
    """How long they may take to arrive, counted from the first byte; on a new connection from its opening."""
    max_inflight_bytes: Positive = 2 * 1024 * 1024 * 1024
    """Tensor bytes of all calls being received or computed, over all callers."""
    idle_read_timeout_s: Seconds = 30.0
    """How long a caller may pause in the middle of a request body."""
    min_body_bytes_per_s: NonNegative = 4096
    """How fast a body must come on average once `slow_body_grace_s` of waiting for it are over."""
    slow_body_grace_s: Seconds = 15.0
    write_stall_timeout_s: Seconds = 30.0
    """How long a caller may leave an answer unread."""
    linger_s: Seconds = 1.0
    """How long the unread rest of a refused request is read, so that the refusal arrives; then the connection ends."""


class DHTConfig(Section, frozen=True):
    """`[dht]`: the UDP port of the Kademlia node and how it finds the others."""

    host: str = "127.0.0.1"
    port: Port = 0
    announce_host: str | None = None
    initial_peers: tuple[str, ...] = ()
    """`HOST:PORT` of nodes that are already in the swarm; any one that answers is enough."""
    swarm_id: str = "p2pmoe"
    """Nodes of different swarms never read each other's records."""
    ttl_s: Seconds = 60.0
    refresh_s: Seconds = 20.0
    join_timeout_s: Seconds = 5.0
    state_path: str | None = None
    """JSON file that remembers peers that answered, so that a restart needs no initial peer."""
    max_source_bytes_per_s: Seconds = 1e6
    """Request and reply bytes that one address (one subnet, from outside the local network) may cost us."""


class BatchingConfig(Section, frozen=True):
    """`[batching]`: how calls to one expert are merged. Sizes count rows."""

    max_batch_size: Positive = 4096
    min_batch_size: Positive = 1
    max_queue_delay_ms: Milliseconds = 0.0
    """How long the oldest call may wait for `min_batch_size` rows."""
    max_queue_size: Positive = 1024
    """Calls that may wait for one expert and pass; one more is refused with 429."""
    priority: int = 0
    """Pools of higher priority go first."""


class OptimizerConfig(Section, frozen=True):
    """`[optimizer]`: how each backward call trains the expert."""

    name: str = "adam"
    """adam, adamw, sgd, rmsprop, adagrad, adadelta, adamax, nadam or radam."""
    lr: Annotated[float, Meta(ge=0)] = 1e-3
    options: dict[str, Any] = {}
    """More keyword arguments of the torch optimizer, e.g. {betas = [0.9, 0.99]}."""
    clip_grad_norm: Annotated[float, Meta(gt=0)] | None = 1.0
    """Gradients of one step are scaled down to this total norm; leave out with `clip_grad_norm = false`."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises linearly from zero."""
    decay: Literal["none", "linear", "cosine"] = "none"
    total_steps: Positive | None = None
    """Steps after which the decay has reached `min_lr_ratio`; needed by linear and cosine."""
    min_lr_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.0


class ExpertsConfig(Section, frozen=True):
    """`[experts]`: what this node hosts."""

    uids: tuple[str, ...] = ()
    """Patterns such as `ffn.[0:4].[0:4]` or plain uids such as `ffn.3.17`."""
    kind: str = "ffn"
    """ffn, transformer, nop, det_dropout, or a class registered with `register_expert_class`."""
    hidden_dim: Positive = 512
    options: dict[str, Any] = {}
    """More keyword arguments of the expert's class."""
    seed: int | None = None
    """Makes the initial parameters of every uid reproducible."""
    modules: tuple[str, ...] = ()
    """Python modules or files of your own, imported at start; they call `register_expert_class`."""


class LogConfig(Section, frozen=True):
    """`[log]`: structured lines on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class NodeConfig(Section, frozen=True):
    """All settings of a node. The defaults listen on loopback, on ports the system picks, with a fresh identity.

    Raises nothing by itself; `load` and `parse` raise ConfigError.
    """

    identity_path: str | None = None
    """Key file, made on first start with mode 0600. None: a fresh key that ends with the node."""
    devices: tuple[str, ...] = ("cpu",)
    """torch devices; experts are dealt to them in turn."""
    torch_threads: Positive | None = None
    """Threads torch computes with; None leaves torch's default."""
    http: HttpConfig = HttpConfig()
    dht: DHTConfig = DHTConfig()
    experts: ExpertsConfig = ExpertsConfig()
    batching: BatchingConfig = BatchingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> NodeConfig:
        """Read a TOML file; `overrides` maps dotted key paths (`dht.port`) to values that win over the file.

        Raises:
            ConfigError: the file cannot be read or is no TOML, or a key is unknown or of the wrong type.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}; pass an existing file with -c node.toml") from error
        return cls.parse(text, source=str(path), overrides=overrides)

    @classmethod
    def parse(cls, text: str, *, source: str = "node.toml", overrides: Mapping[str, Any] | None = None) -> NodeConfig:
        """The same from a string; `source` is the name that errors give."""
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source}: not valid TOML: {error}") from error
        return cls.from_tree(tree, source=source, overrides=overrides)

    @classmethod
    def from_tree(
        cls, tree: Mapping[str, Any], *, source: str = "settings", overrides: Mapping[str, Any] | None = None
    ) -> NodeConfig:
        """The same from nested mappings."""
        merged = _copy_tree(tree)
        for key_path, value in (overrides or {}).items():
            _set_path(merged, key_path, value, source)
        optimizer = merged.get("optimizer")
        if isinstance(optimizer, dict) and optimizer.get("clip_grad_norm") is False:
            optimizer["clip_grad_norm"] = None  # TOML has no null
        try:
            return msgspec.convert(merged, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{source}: {_readable(error)}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, for printing."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def parse_host_port(text: str, *, what: str = "address") -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT` as a pair. Raises ConfigError for anything else."""
    host, separator, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"{what} {text!r} is ambiguous; write an IPv6 address as [::1]:31337")
    if not separator or not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{what} {text!r} is not HOST:PORT with a port from 1 to 65535, e.g. 127.0.0.1:31337")
    return host, int(port)


def _copy_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy_tree(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _set_path(tree: dict[str, Any], key_path: str, value: Any, source: str) -> None:
    *tables, last = key_path.split(".")
    for table in tables:
        child = tree.setdefault(table, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{source}: {table} must be a table, got {type(child).__name__}")
        tree = child
    tree[last] = value


def _readable(error: msgspec.ValidationError) -> str:
    """msgspec says "Expected `int`, got `str` - at `$.dht.port`"; lead with the key path instead."""
    message, _, path = str(error).rpartition(" - at `$")
    if not message:
        message, path = str(error), ""
    key = path.strip("`.")
    unknown = message.partition("unknown field `")[2].rstrip("`")
    if unknown:
        key = f"{key}.{unknown}" if key else unknown
        return f"{key}: unknown key; see node.toml for every key and its default"
    return f"{key or 'top level'}: {message[0].lower()}{message[1:]}"
