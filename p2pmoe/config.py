"""node.toml: every setting of a node, typed, with its default. Knows nothing of what the settings build.

Each room takes its own section (`HttpConfig`, `DHTConfig`, …), never the whole. Units are in the names.
`node.toml` at the top of the repository is the same list as a commented file.
"""

from __future__ import annotations

import codecs
import datetime as dt
import ipaddress
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from p2pmoe.config_rules import first_conflict, first_conflict_of_limits
from p2pmoe.errors import ConfigError, shown
from p2pmoe.files import beside, expand_home, without_mark
from p2pmoe.types import canonical_host, is_host, is_loopback, parse_ip

MAX_CONFIG_BYTES: Final = 256 * 1024
"""A longer file is no node.toml; it is not read to its end."""
MAX_CONFIG_DEPTH: Final = 16
"""How deep tables and arrays may be nested in each other."""
MAX_KEY_PARTS: Final = 32
PATH_KEY: Final = "_path"
"""How the name of every key ends that is a path, but for one called `path`; `experts.modules` lists some too."""
BROADCAST: Final = ipaddress.ip_network("255.255.255.255/32")
_PART: Final = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+"""
_DEEP_KEY_RE: Final = re.compile(rf"(?<![\w-]){_PART}(?:\.[ \t]*+{_PART}){{{MAX_KEY_PARTS}}}")
_OWN_KEY_RE: Final = re.compile(r"(?:(?:[a-z_]+_)?path|modules): ")

Port = Annotated[int, Meta(ge=0, le=65535)]
AnnouncedPort = Annotated[int, Meta(ge=1, le=65535)]
Positive = Annotated[int, Meta(gt=0)]
NonNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Milliseconds = Annotated[float, Meta(ge=0)]
Fresh = Literal["never", "if_vacant", "always"]
Rate = Annotated[float, Meta(gt=0)]
"""A number a second; no limit is infinity, in TOML `false`."""
PeerIdText = Annotated[str, Meta(pattern="^[a-z2-7]{32}\\Z")]


def is_path_key(key: str) -> bool:
    """Whether a key of this name is a path."""
    return key == "path" or key.endswith(PATH_KEY)


class Section(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One table of node.toml. Immutable; unknown keys are refused.

    A key `path` or one that ends in `_path` is a path, and `~` in it the home folder. One text in the place of several,
    in Python, is a list of one: its letters never are.
    """

    def __post_init__(self) -> None:
        for field, default in zip(self.__struct_fields__, self.__struct_defaults__, strict=True):
            value = getattr(self, field)
            if isinstance(default, tuple) and not isinstance(value, tuple):
                self._put(field, one_or_more(value))
            if is_path_key(field) and value is not None:
                self._put(field, _expanded(field, value))

    def _put(self, field: str, value: Any) -> None:
        """Only while it is made."""
        if value != getattr(self, field):
            msgspec.structs.force_setattr(self, field, value)


class HttpConfig(Section, frozen=True):
    """`[http]`: the port that callers reach. Port 0 lets the system pick one.

    Raises ConfigError for `tls = false` with an address that other machines reach.
    """

    host: str = "127.0.0.1"
    port: Port = 0
    announce_host: str | None = None
    """The address written into DHT records; `host` when it is not set."""
    announce_port: AnnouncedPort | None = None
    """The port written there, where a port mapping (a container, a router) leads from it to `port`."""
    tls: bool = True
    """TLS 1.3 with a certificate of the node's own key. Plain HTTP is allowed on loopback only."""
    drain_timeout_s: Seconds = 10.0
    """How long running calls may take to finish after the first Ctrl-C."""
    keepalive_timeout_s: Seconds = 75.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_announced(self)
        for key, host in (("host", self.host), ("announce_host", self.announce_host)):
            if not self.tls and host is not None and not is_loopback(host):
                raise ConfigError(
                    f"tls = false with {key} = {host!r}: plain HTTP is allowed on loopback only; remove tls = false (a "
                    f"certificate needs no setting up), or listen on 127.0.0.1"
                )


def _check_announced(section: HttpConfig | DHTConfig) -> None:
    """Raises ConfigError for what no peer could make anything of, though it would look fine until one tries."""
    if not is_host(section.host):
        raise ConfigError(f"host = {shown(section.host)!r} is neither an IP address nor a name; write e.g. 127.0.0.1")
    if section.announce_host is None:
        return
    what = f"announce_host = {shown(section.announce_host)!r}"
    if not is_host(section.announce_host):
        raise ConfigError(
            f"{what} is neither an IP address nor a name; write e.g. 203.0.113.7, a port goes into announce_port"
        )
    ip = parse_ip(section.announce_host)
    if ip is not None and (ip.is_unspecified or ip.is_multicast or ip in BROADCAST):
        raise ConfigError(f"{what} is no address of one machine; write the one that peers reach this machine at")
    if ip is not None and ip.version == 6 and ip.is_link_local:
        raise ConfigError(f"{what} means something on one link only; write an address that all peers reach")


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
    max_elements: Positive = 2**28
    """Numbers in one tensor."""
    max_connections: Positive = 512
    """Over it, and over the next three, a connection is closed before the TLS handshake costs anything."""
    max_source_connections: Positive = 128
    """Of one IPv4 address or IPv6 /64."""
    max_handshakes_per_s: Seconds = 100.0
    """New connections a second, of all callers; after a pause `max_connections` may come at once."""
    max_source_handshakes_per_s: Seconds = 20.0
    """The same of one source, after a pause `max_source_connections` at once."""
    handshake_timeout_s: Seconds = 5.0
    min_piece_bytes: Positive = 64
    """How large the pieces of a request (segments, TLS records, HTTP chunks) must be on average."""
    source_pieces_per_s: Rate = 256.0
    """Smaller ones that one source may send beyond that, eight seconds' worth at once."""
    source_documents_per_s: Rate = 100.0
    """Documents and refusals that one source is answered, ten seconds' worth at once. Calls and health do not count."""
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
    caller_calls_per_s: Rate = 20_000.0
    """Calls of one caller: a peer id, or an address without one (of IPv6 its /64)."""
    caller_bytes_per_s: Rate = 4e9
    """Tensor bytes that one caller sends."""
    caller_updates_per_s: Rate = 10_000.0
    """Backward calls of one caller."""
    caller_burst_s: Seconds = 2.0
    """How many seconds' worth of the three rates above a caller may use at once."""
    caller_max_calls: Positive = 2048
    """Calls of one caller that wait or compute, over all experts."""
    max_callers: Positive = 16_384
    """Callers whose use is remembered; beyond it the one that was silent longest is forgotten."""


class AccessConfig(Section, frozen=True):
    """`[access]`: who may call. Documents and health stay open to everybody."""

    mode: Literal["open", "identified"] = "open"
    """open: callers without an identity are served too; identified: every caller proves a key of its own.
    `allow` and `swarm_key_path` ask for identities by themselves."""
    allow: tuple[PeerIdText, ...] = ()
    """Peer ids; with any in the list only these may call."""
    deny: tuple[PeerIdText, ...] = ()
    """Peer ids that may not call, also when `allow` names them."""
    swarm_key_path: str | None = None
    """The secret that the members of a private swarm share (mode 0600): only its holders may join and call."""
    session_lifetime_s: Seconds = 600.0
    """How long a caller is known before it proves its key again."""
    sessions_per_s: Rate = 5.0
    """Session handshakes of one address, ten seconds' worth at once."""
    max_peers_per_address: Positive = 32
    """Peer ids of one address that have limits and fair shares of their own; all further ones have one together."""


class AdminConfig(Section, frozen=True):
    """`[admin]`: what shows more than public status (`/metrics`) answers on loopback, or elsewhere with a token."""

    token_path: str | None = None
    """A file (mode 0600) with a token of at least 32 characters; without it nobody is answered elsewhere."""


class DHTConfig(Section, frozen=True):
    """`[dht]`: the UDP port of the Kademlia node and how it finds the others."""

    host: str = "127.0.0.1"
    port: Port = 0
    announce_host: str | None = None
    """The address in the join line. Peers go by the one that our datagrams come from."""
    announce_port: AnnouncedPort | None = None
    """The port at which peers reach us, where a port mapping (a container, a router) leads from it to `port`."""
    initial_peers: tuple[str, ...] = ()
    """`HOST:PORT` of nodes that are already in the swarm; any one that answers is enough. Our own may be among them:
    one file can serve all nodes."""
    allow_alone: bool = False
    """Start also when none of them answers, and look for them in the background."""
    swarm_id: str = "p2pmoe"
    """Nodes of different swarms never read each other's records."""
    owner: str | None = None
    """Public key (64 hexadecimal digits) of the swarm's owner. The swarm is closed then: only records with a
    delegation of the owner are stored and believed."""
    delegation_path: str | None = None
    """File with the delegation that the owner gave this node; `p2pmoe id delegate` makes it. No secret."""
    ttl_s: Seconds = 60.0
    refresh_s: Seconds = 20.0
    join_timeout_s: Seconds = 5.0
    state_path: str | None = None
    """JSON file that remembers peers that answered, so that a restart needs no initial peer."""
    max_source_bytes_per_s: Seconds = 1e6
    """Request and reply bytes that one address (one subnet, from outside the local network) may cost us."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_announced(self)


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
    """adam, adamw, sgd, rmsprop, adagrad, adadelta, adamax, nadam or radam; sparse_adam for embeddings with sparse=True
    alone; none for experts that are not trained, those without parameters among them."""
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


class GateConfig(Section, frozen=True):
    """`[gate]`: which calls may not reach an expert."""

    enabled: bool = True
    """Refuse calls that hold NaN or infinity, fail those whose results do, and let their neighbours go on.
    Without it the optimizers' parameters still stay finite, but one bad call fails its whole batch."""
    outlier_factor: Annotated[float, Meta(gt=1)] | None = 1000.0
    """Scale gradients down whose root mean square over the rows is more than this times the expert's running median;
    refuse those over its square times their own caller's. Leave out with `outlier_factor = false`."""
    warmup_calls: Positive = 64
    """Backward calls of one expert before anything counts as an outlier, and of one caller before any is refused."""


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
    fresh: Fresh = "if_vacant"
    """When an expert begins with new parameters: if_vacant, when no checkpoint of it is kept here; never: then the node
    does not start; always: whatever is kept here, which the log says is thrown away."""
    modules: tuple[str, ...] = ()
    """Python modules or files (`*.py`) of your own, imported at start; they call `register_expert_class`."""
    twins: Literal["wait", "serve"] = "wait"
    """What happens to a uid that another node serves already: wait until it does not any more, or serve it as well, as
    replicas with the same parameters do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._put("modules", tuple(_expanded("modules", each) for each in self.modules))


class StateConfig(Section, frozen=True):
    """`[state]`: checkpoints of the experts, from which a restarted node goes on."""

    path: str | None = None
    """A folder of this node alone, made at its first start. None: nothing is kept; `p2pmoe node` keeps it beside its
    key."""
    keep: Annotated[int, Meta(ge=2)] = 2
    """Checkpoints of each expert that stay."""
    every_s: Seconds = 10.0
    """A checkpoint is written at most so long after an update that is in none."""
    every_updates: Positive = 50
    """And after so many updates."""


class LogConfig(Section, frozen=True):
    """`[log]`: structured lines on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"
    heartbeat_s: Seconds | None = 60.0
    """How often a line says what the node has done; leave out with `heartbeat_s = false`."""


class NodeConfig(Section, frozen=True):
    """All settings of a node. The defaults listen on loopback, on ports the system picks, with a fresh identity.

    Raises ConfigError for settings that cannot work together (`config_rules`).
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
    gate: GateConfig = GateConfig()
    limits: LimitsConfig = LimitsConfig()
    access: AccessConfig = AccessConfig()
    admin: AdminConfig = AdminConfig()
    state: StateConfig = StateConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        conflict = first_conflict(self.to_dict())
        if conflict is not None:
            raise ConfigError(conflict)

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> NodeConfig:
        """Read a TOML file; `overrides` maps dotted key paths (`dht.port`) to values that win over the file.

        Relative paths in the file start in its folder.

        Raises:
            ConfigError: the file cannot be read or is no TOML, or a key is unknown or of the wrong type.
        """
        try:
            with Path(expand_home(str(path))).open("rb") as file:
                content = file.read(MAX_CONFIG_BYTES + 1)
            if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ConfigError(f"{path}: it is UTF-16, TOML is UTF-8; save it as UTF-8")
            if len(content) > MAX_CONFIG_BYTES:
                raise ConfigError(f"{path}: longer than {MAX_CONFIG_BYTES} bytes; it is no node.toml")
            text = without_mark(content).decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: {error}; save it as UTF-8") from error
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error}; pass an existing file with -c node.toml") from error
        return cls.parse(text, source=str(path), overrides=overrides, folder=Path(expand_home(str(path))).parent)

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        source: str = "node.toml",
        overrides: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> NodeConfig:
        """The same from a string; `source` is the name that errors give, `folder` where relative paths start."""
        try:
            tree = parse_toml(text)
        except ValueError as error:
            raise ConfigError(f"{source}: not valid TOML: {error}") from error
        return cls.from_tree(tree, source=source, overrides=overrides, folder=folder)

    @classmethod
    def from_tree(
        cls,
        tree: Mapping[str, Any],
        *,
        source: str = "settings",
        overrides: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> NodeConfig:
        """The same from nested mappings. Relative paths in `overrides` start in the working directory."""
        merged = _copy_tree(tree, source)
        if folder is not None:
            _put_beside(folder, merged)
        for key_path, value in (overrides or {}).items():
            _set_path(merged, key_path, _copy_value(value, source, 1), source)
        dht = merged.get("dht")
        if isinstance(dht, dict) and isinstance(peer := dht.get("initial_peers"), str):
            dht["initial_peers"] = [peer]
        _put_none(merged)
        try:
            config = msgspec.convert(merged, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{source}: {shown(_readable(error))}") from error
        written = {table: value for table, value in merged.items() if isinstance(value, dict)}
        conflict = first_conflict_of_limits(config.to_dict(), written)
        if conflict is not None:
            raise ConfigError(f"{source}: {conflict}")
        return config

    @classmethod
    def check_value(cls, key_path: str, value: Any, *, source: str) -> None:
        """Whether a key takes this value, whatever the others are. Raises ConfigError, also for an unknown key."""
        section: Any = cls
        for name in key_path.split("."):
            fields = field_types(section) if _is_section(section) else {}
            if name not in fields:
                raise ConfigError(
                    f"{source}: {key_path}: unknown key; see node.toml for every key and its default "
                    f"(p2pmoe node --print-config)"
                )
            section = fields[name]
        tree: dict[str, Any] = {}
        _set_path(tree, key_path, _copy_value(value, source, 1), source)
        _put_none(tree)
        for name in key_path.split("."):
            tree = tree[name]
        try:
            msgspec.convert(tree, section)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{source}: {shown(_readable(error, key_path))}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, for printing."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def parse_toml(text: str) -> dict[str, Any]:
    """TOML of a sensible depth as nested values. Raises ValueError for anything else."""
    if _DEEP_KEY_RE.search(text):  # tomllib takes time and memory by the square of a key's parts
        raise ValueError(f"a key of more than {MAX_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)  # raises a plain ValueError for a number of thousands of digits
    except RecursionError as error:
        raise ValueError("arrays or tables are nested too deep") from error


_FALSE_MEANS: Final[tuple[tuple[str, str, float | None], ...]] = (  # TOML has no null, and infinities are refused
    ("optimizer", "clip_grad_norm", None),
    ("gate", "outlier_factor", None),
    ("limits", "caller_calls_per_s", math.inf),
    ("limits", "caller_bytes_per_s", math.inf),
    ("limits", "caller_updates_per_s", math.inf),
    ("access", "sessions_per_s", math.inf),
    ("log", "heartbeat_s", None),
)


def one_or_more(texts: str | Iterable[str]) -> tuple[str, ...]:
    """A text alone as a list of one: whoever passes one peer or uid does not mean its letters. Raises ConfigError."""
    try:
        several = (texts,) if isinstance(texts, str) else tuple(texts)
    except TypeError as error:
        raise ConfigError(f"{texts!r} is neither a text nor a list of texts such as ['127.0.0.1:31337']") from error
    for each in several:
        if not isinstance(each, str):
            raise ConfigError(f"{each!r} is no text; write e.g. '127.0.0.1:31337', in quotes")
    return several


def parse_host_port(text: str, *, what: str = "address") -> tuple[str, int]:
    """`HOST:PORT` or `[IPv6]:PORT` as a pair, the host in its one spelling. Raises ConfigError for anything else."""
    host, separator, port = text.strip().rpartition(":")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        if "://" in text:
            raise ConfigError(f"{what} {shown(text)!r} is a URL; write HOST:PORT alone, e.g. 127.0.0.1:31337")
        raise ConfigError(f"{what} {shown(text)!r} is ambiguous; write an IPv6 address as [::1]:31337")
    digits = port.lstrip("0")
    is_number = port.isascii() and port.isdigit() and 1 <= len(digits) <= 5
    if not separator or not host or not is_number or int(digits) > 65535:
        raise ConfigError(f"{what} {shown(text)!r} is not HOST:PORT with a port from 1 to 65535, e.g. 127.0.0.1:31337")
    if not is_host(host):
        raise ConfigError(
            f"{what} {shown(text)!r}: {shown(host)!r} is neither an IP address nor a name; write it like "
            f"127.0.0.1:31337, [::1]:31337 or node.example.org:31337"
        )
    return canonical_host(host), int(digits)


def _expanded(key: str, path: str) -> str:
    try:
        return expand_home(path)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _put_beside(folder: Path, tree: dict[str, Any]) -> None:
    """Relative paths of a file start in its folder; a module without .py is a dotted name, not a path."""
    for key, value in tree.items():
        if isinstance(value, dict) and key != "options":  # those are the class's own affair
            _put_beside(folder, value)
        elif is_path_key(key) and isinstance(value, str):
            tree[key] = beside(folder, value)
        elif key == "modules" and isinstance(value, list):
            tree[key] = [
                beside(folder, each) if isinstance(each, str) and each.endswith(".py") else each for each in value
            ]


def _copy_tree(tree: Mapping[str, Any], source: str) -> dict[str, Any]:
    return {key: _copy_value(value, source, 1) for key, value in tree.items()}


def _copy_value(value: Any, source: str, depth: int) -> Any:
    if depth > MAX_CONFIG_DEPTH:
        raise ConfigError(f"{source}: nested deeper than {MAX_CONFIG_DEPTH} tables and arrays; flatten it")
    if isinstance(value, Mapping):
        return {key: _copy_value(each, source, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_copy_value(each, source, depth + 1) for each in value]
    if isinstance(value, dt.date | dt.time):
        raise ConfigError(f"{source}: {value} is no setting; a date or a time is written in quotes")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # bytes of an argument or a variable that are no UTF-8
            raise ConfigError(f"{source}: {value!a} is no valid Unicode; write it in UTF-8") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{source}: {value} is no setting; write a finite number")
    return value


def _put_none(tree: dict[str, Any]) -> None:
    for section, key, value in _FALSE_MEANS:
        table = tree.get(section)
        if isinstance(table, dict) and table.get(key) is False:
            table[key] = value


def field_types(section: type[msgspec.Struct]) -> Mapping[str, Any]:
    """The types of a section's keys, in the order of the file."""
    return _FIELD_TYPES[section]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _set_path(tree: dict[str, Any], key_path: str, value: Any, source: str) -> None:
    *tables, last = key_path.split(".")
    for table in tables:
        child = tree.setdefault(table, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{source}: {table} must be a table, got {type(child).__name__}")
        tree = child
    tree[last] = value


def _readable(error: msgspec.ValidationError, key_path: str = "") -> str:
    """msgspec says "Expected `int`, got `str` - at `$.dht.port`"; lead with the key path instead."""
    message, _, path = str(error).rpartition(" - at `$")
    if not message:
        message, path = str(error), ""
    key = key_path + path.strip("`") if key_path else path.strip("`.")
    unknown = message.partition("unknown field `")[2].rstrip("`")
    if unknown:
        key = f"{key}.{unknown}" if key else unknown
        return f"{key}: unknown key; see node.toml for every key and its default (p2pmoe node --print-config)"
    if _OWN_KEY_RE.match(message):  # our own words name the key already
        return f"{key}.{message}" if key else message
    if not key and " " in message and not message.startswith(("Expected", "Object")):  # settings that conflict
        return message
    return f"{key or 'top level'}: {message[0].lower()}{message[1:]}"


def _all_field_types(section: type[msgspec.Struct]) -> dict[type[msgspec.Struct], dict[str, Any]]:
    own = {field.name: field.type for field in msgspec.structs.fields(section)}
    found = {section: own}
    for kind in own.values():
        if _is_section(kind):
            found |= _all_field_types(kind)
    return found


_FIELD_TYPES: Final = _all_field_types(NodeConfig)
"""Read once, when this module is: annotations are compiled for it, and nothing is while settings are read."""
