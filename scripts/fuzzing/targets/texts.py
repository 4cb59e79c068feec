"""Texts that people and peers write: uids and patterns, node.toml, environment variables."""

from __future__ import annotations

from typing import Final

from fuzzing.target import KIB, MIB, Target
from p2pmoe.cli.settings import load_node_config, variable_of
from p2pmoe.config import NodeConfig, parse_host_port
from p2pmoe.errors import ConfigError, InvalidUidError
from p2pmoe.experts.uid import MAX_EXPANSION, UidPattern, expand_pattern, parse_prefix, parse_uid


def read_uid(data: bytes) -> str:
    """A uid, a pattern and a prefix: what is taken is written the same again."""
    text = data.decode("utf-8", "surrogateescape")
    taken, refused = [], None
    for read in (_uid, _pattern, _prefix, _expansion):
        try:
            taken.append(read(text))
        except InvalidUidError as error:
            str(error).encode("utf-8", "strict")
            refused = error
    if not taken and refused:
        raise refused
    return " ".join(taken)


def _uid(text: str) -> str:
    uid = parse_uid(text)
    if str(uid) != text or not UidPattern.parse(text).matches(uid):
        raise AssertionError(f"{text!r} is read as {uid}")
    return f"uid {len(uid.coordinates)}"


def _pattern(text: str) -> str:
    pattern = UidPattern.parse(text)
    parse_prefix(pattern.root)
    return f"pattern {len(pattern.segments)} {pattern.open_end} {pattern.matches('ffn.0.1')}"


def _prefix(text: str) -> str:
    return f"prefix {len(parse_prefix(text)[1])}"


def _expansion(text: str) -> str:
    uids = expand_pattern(text)
    if len(uids) > MAX_EXPANSION or len(set(uids)) != len(uids):
        raise AssertionError(f"{text!r} stands for {len(uids)} uids")
    return f"expands {len(uids) > 1}"


def read_toml(data: bytes) -> str:
    """A node.toml: a config that is the same when it is written and read again, or a ConfigError of one line."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "no utf-8"
    try:
        config = NodeConfig.parse(text)
        if NodeConfig.from_tree(config.to_dict()) != config:
            raise AssertionError("another config after a round trip")
        for peer in config.dht.initial_peers:
            parse_host_port(peer)
    except ConfigError as error:
        if "\n" in str(error):
            raise AssertionError(f"an error of several lines: {error}") from error
        raise
    return "config"


def read_variable(data: bytes) -> str:
    """An environment variable: `dht.port=text`."""
    path, _, text = data.replace(b"\0", b"").decode("utf-8", "surrogateescape").partition("=")
    load_node_config(None, {}, {variable_of(path): text})
    return path


def uid_seeds() -> dict[str, bytes]:
    texts = ["ffn.3.17", "ffn.", "ffn.3.", "ffn.3.*", "ffn.[0:4].[0:4]", "a_b-C.0.1.2.3", "ffn", "ffn.*.1"]
    texts += ["ffn.2147483647", "ffn.[0:256].[0:256]"]
    return {f"text-{index}": text.encode() for index, text in enumerate(texts)}


def toml_seeds() -> dict[str, bytes]:
    return {
        "empty": b"",
        "sections": b'devices = ["cpu"]\n[http]\nport = 80\n'
        b'[dht]\ninitial_peers = ["127.0.0.1:1", "[::1]:2"]\nttl_s = 60.5\n',
        "options": b"[optimizer]\nclip_grad_norm = false\noptions = { betas = [0.9, 0.99] }\n[experts]\nseed = 3\n",
        "limits": b"[limits]\nmax_rank = 16\n[batching]\npriority = -1\n[log]\nlevel = 'debug'\n",
    }


def variable_seeds() -> dict[str, bytes]:
    texts = ["dht.port=1", "dht.initial_peers=a:1,b:2", 'devices=["cpu"]', "experts.options={a = 1}", "dht.ttl_s=30.5"]
    return {text.partition("=")[0].replace(".", "-"): text.encode() for text in texts}


TARGETS: Final = (
    # 65,536 uids of a pattern are what the grammar allows; each takes some 100 bytes and as much while it is made.
    Target("uids", read_uid, (InvalidUidError,), 16 * MIB, uid_seeds, mutate="text", max_input_bytes=KIB),
    Target("node_toml", read_toml, (ConfigError,), 2 * MIB, toml_seeds, mutate="text", max_input_bytes=16 * KIB),
    Target("environment", read_variable, (ConfigError,), 2 * MIB, variable_seeds, mutate="text"),
)  # fmt: skip
