"""node.toml: every key typed, wrong ones refused with file, key path and what was expected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe import NodeConfig, Swarm
from p2pmoe.config import AccessConfig, DHTConfig, ExpertsConfig, Section
from p2pmoe.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_defaults_need_no_file_and_stay_on_loopback() -> None:
    config = NodeConfig()
    assert (config.http.host, config.http.port, config.dht.host, config.dht.port) == ("127.0.0.1", 0, "127.0.0.1", 0)
    assert config.identity_path is None
    assert config.experts.uids == ()
    assert NodeConfig.parse("") == config
    assert NodeConfig.from_tree(config.to_dict()) == config


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(
        """
        identity_path = "key.pem"
        devices = ["cpu", "cuda:1"]
        [http]
        port = 8080
        [dht]
        initial_peers = ["127.0.0.1:1", "[::1]:2"]
        [experts]
        uids = ["ffn.[0:4].[0:4]"]
        options = { inner_dim = 7 }
        [optimizer]
        clip_grad_norm = false
        options = { betas = [0.9, 0.99] }
        """
    )
    config = NodeConfig.load(path)
    assert config.devices == ("cpu", "cuda:1")
    assert config.http.port == 8080
    assert config.dht.initial_peers == ("127.0.0.1:1", "[::1]:2")
    assert config.experts.options == {"inner_dim": 7}
    assert config.optimizer.clip_grad_norm is None
    assert config.http.keepalive_timeout_s == NodeConfig().http.keepalive_timeout_s


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("[http]\nport = '80'", "http.port", "int"),
        ("[http]\nport = 70000", "http.port", "65535"),
        ("[http]\nport = -1", "http.port", "0"),
        ("[http]\nport = 1.5", "http.port", "int"),
        ("[http]\nport = true", "http.port", "int"),
        ("[http]\ndrain_timeout_s = 0", "http.drain_timeout_s", "0"),
        ("[htp]\nport = 1", "htp", "unknown key"),
        ("[http]\nprot = 1", "http.prot", "unknown key"),
        ("device = 'cpu'", "device", "unknown key"),
        ("http = 3", "http", "object"),
        ("[experts]\nuids = 'ffn.0'", "experts.uids", "array"),
        ("[experts]\nuids = [1]", "experts.uids", "str"),
        ("[optimizer]\nclip_grad_norm = true", "optimizer.clip_grad_norm", "float"),
        ("[optimizer]\ndecay = 'step'", "optimizer.decay", "step"),
        ("[log]\nlevel = 'loud'", "log.level", "loud"),
        ("[limits]\nmax_rank = 0", "limits.max_rank", "1"),
        ("[batching]\nmax_batch_size = 0", "batching.max_batch_size", "1"),
    ],
)
def test_a_wrong_setting_names_file_key_and_what_was_expected(text: str, key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NodeConfig.parse(text, source="my/node.toml")
    message = str(caught.value)
    assert message.startswith(f"my/node.toml: {key}")
    assert expected in message
    assert "\n" not in message
    assert "$" not in message


def test_what_is_no_toml_names_file_and_line() -> None:
    with pytest.raises(ConfigError, match=r"my\.toml: not valid TOML.*line 2"):
        NodeConfig.parse("a = 1\nb = \nc = 2", source="my.toml")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "node.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        NodeConfig.load(path)
    with pytest.raises(ConfigError):
        NodeConfig.load(tmp_path)


def test_overrides_win_and_leave_the_tree_alone() -> None:
    tree = {"dht": {"port": 1}, "http": {}}
    config = NodeConfig.from_tree(tree, overrides={"dht.port": 2, "http.host": "::", "log.level": "debug"})
    assert (config.dht.port, config.http.host, config.log.level) == (2, "::", "debug")
    assert tree == {"dht": {"port": 1}, "http": {}}


@pytest.mark.parametrize("key", ["dht.port.x", "identity_path.x"])
def test_an_override_through_a_value_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="table"):
        NodeConfig.from_tree({"dht": {"port": 1}, "identity_path": "x"}, overrides={key: 1})


def test_an_override_of_an_unknown_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dht\.prot: unknown key"):
        NodeConfig.from_tree({}, overrides={"dht.prot": 1})


values = st.recursive(
    st.booleans() | st.integers(-5, 70000) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [*NodeConfig.__struct_fields__, "other"]


@given(
    st.dictionaries(st.sampled_from(KEYS), st.dictionaries(st.sampled_from(["host", "port", "lr"]), values) | values)
)
def test_any_tree_is_a_config_or_a_config_error(tree: dict[str, Any]) -> None:
    try:
        config = NodeConfig.from_tree(tree)
    except ConfigError:
        return
    assert NodeConfig.from_tree(config.to_dict()) == config


def test_sections_have_units_and_the_whole_is_immutable() -> None:
    config = NodeConfig()
    with pytest.raises(AttributeError):
        config.http = None  # type: ignore[misc,assignment]
    for section in config.__struct_fields__:
        value = getattr(config, section)
        for name in getattr(value, "__struct_fields__", ()):
            if name.endswith(("timeout", "delay", "bytes_max", "ttl", "refresh")):
                pytest.fail(f"{section}.{name} has no unit")


def test_the_documented_file_lists_every_key_with_its_default() -> None:
    text = (ROOT / "node.toml").read_text(encoding="utf-8")
    assert NodeConfig.parse(text) == NodeConfig()
    for section, value in msgspec.to_builtins(NodeConfig()).items():
        keys = value if isinstance(value, dict) else [section]
        table = text.partition(f"[{section}]")[2] if isinstance(value, dict) else text
        for key in keys:
            assert re.search(rf"(?m)^(#:? ?)?{key} = ", table.partition("\n[")[0]), f"{section}.{key}"


def test_a_node_listens_on_loopback_unless_told_otherwise() -> None:
    config = NodeConfig()
    assert (config.http.host, config.dht.host) == ("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize("value", ['"alice"', '"' + "a" * 31 + '"', '"' + "A" * 32 + '"', '"' + "1" * 32 + '"', "1"])
@pytest.mark.parametrize("key", ["allow", "deny"])
def test_lists_of_peers_take_peer_ids(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"access\.{key}"):
        NodeConfig.parse(f"[access]\n{key} = [{value}]")


def test_a_rate_may_be_infinite_and_never_zero() -> None:
    assert NodeConfig.parse("[limits]\ncaller_calls_per_s = false").limits.caller_calls_per_s == float("inf")
    for value in ("0", "-1.0"):
        with pytest.raises(ConfigError, match="caller_calls_per_s"):
            NodeConfig.parse(f"[limits]\ncaller_calls_per_s = {value}")


@pytest.mark.parametrize("section", ["http", "dht"])
@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"announce_port": 0}, "announce_port"),
        ({"announce_port": 65536}, "announce_port"),
        ({"announce_host": "0.0.0.0"}, "is no address of one machine; write the one that peers reach this machine at"),
        ({"announce_host": "::"}, "is no address of one machine"),
        ({"announce_host": "224.0.0.1"}, "is no address of one machine"),
        ({"announce_host": "255.255.255.255"}, "is no address of one machine"),
        ({"announce_host": "fe80::1%eth0"}, "means something on one link only"),
        ({"announce_host": "203.0.113.7:80"}, "a port goes into announce_port"),
        ({"announce_host": "http://203.0.113.7"}, "neither an IP address nor a name"),
        ({"announce_host": ""}, "neither an IP address nor a name"),
        ({"host": ""}, "host = '' is neither an IP address nor a name"),
        ({"host": "no host"}, "neither an IP address nor a name"),
    ],
)
def test_what_no_peer_could_make_anything_of_is_refused(section: str, table: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        NodeConfig.from_tree({section: table})
    assert section in str(caught.value)


def test_announced_ports_and_alone() -> None:
    config = NodeConfig.parse(
        """
        [http]
        port = 4000
        announce_host = "203.0.113.7"
        announce_port = 40080
        [dht]
        announce_port = 41337
        allow_alone = true
        """
    )
    assert (config.http.announce_port, config.dht.announce_port, config.dht.allow_alone) == (40080, 41337, True)
    assert (NodeConfig().http.announce_port, NodeConfig().dht.announce_port, NodeConfig().dht.allow_alone) == (
        None,
        None,
        False,
    )


def test_one_text_in_the_place_of_several_is_a_list_of_one() -> None:
    """Its letters never are: `Swarm("127.0.0.1:31337")` tried to reach a peer named `1`."""
    assert DHTConfig(initial_peers="127.0.0.1:31337").initial_peers == ("127.0.0.1:31337",)
    assert DHTConfig(initial_peers=["a:1", "b:2"]).initial_peers == ("a:1", "b:2")
    assert ExpertsConfig(uids="ffn.[0:2]", modules="mine.py").uids == ("ffn.[0:2]",)
    assert ExpertsConfig(modules="mine.py").modules == ("mine.py",)
    assert AccessConfig(allow="a" * 32).allow == ("a" * 32,)
    assert NodeConfig(devices="cpu").devices == ("cpu",)
    assert NodeConfig.from_tree({"dht": {"initial_peers": "[::1]:31337"}}).dht.initial_peers == ("[::1]:31337",)
    overrides = {"dht.initial_peers": "127.0.0.1:31337"}
    assert NodeConfig.from_tree({}, overrides=overrides).dht.initial_peers == ("127.0.0.1:31337",)


@pytest.mark.parametrize("peers", [31337, None, [31337], [("127.0.0.1", 31337)], ("127.0.0.1", 31337)])
def test_what_is_no_list_of_texts_is_one_typed_error(peers: Any) -> None:
    with pytest.raises(ConfigError, match="text"):
        Swarm(peers)


def test_every_list_of_texts_takes_one_text() -> None:
    sections = [NodeConfig(), *(each for each in vars_of(NodeConfig()) if isinstance(each, Section))]
    lists = [
        (type(each), key)
        for each in sections
        for key in each.__struct_fields__
        if isinstance(getattr(each, key), tuple)
    ]
    assert len(lists) >= 6
    for section, key in lists:
        assert getattr(section(**{key: "x"}), key) == ("x",), (section, key)


def vars_of(config: NodeConfig) -> list[Any]:
    return [getattr(config, key) for key in config.__struct_fields__]


def test_the_folder_of_checkpoints_is_a_path_like_any_other(tmp_path: Path) -> None:
    text = '[state]\npath = "kept"\n[experts]\nfresh = "never"\n'
    config = NodeConfig.parse(text, folder=tmp_path)
    assert config.state.path == str(tmp_path / "kept")
    assert (config.state.keep, config.state.every_s, config.state.every_updates) == (2, 10.0, 50)
    assert config.experts.fresh == "never"
    assert NodeConfig.from_tree({"state": {"path": "~/kept"}}).state.path == str(Path.home() / "kept")
    assert NodeConfig().state.path is None
    with pytest.raises(ConfigError, match=r"state.keep: expected `int` >= 2"):
        NodeConfig.from_tree({"state": {"keep": 1}})
    with pytest.raises(ConfigError, match=r"experts.fresh: invalid enum value 'maybe'"):
        NodeConfig.from_tree({"experts": {"fresh": "maybe"}})
    with pytest.raises(ConfigError, match=r"identity_path and state.path are the same file"):
        NodeConfig.from_tree({"identity_path": "a", "state": {"path": "a"}})
