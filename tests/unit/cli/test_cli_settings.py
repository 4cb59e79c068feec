"""node.toml, P2PMOE_* variables and flags become one configuration."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pmoe.cli.settings import (
    from_environment,
    key_paths,
    load_client_config,
    load_node_config,
    load_swarm_key,
    split_lists,
    variable_of,
)
from p2pmoe.config import DHTConfig, NodeConfig
from p2pmoe.errors import ConfigError, IdentityError
from p2pmoe.identity import SwarmKey

ROOT = Path(__file__).parents[3]
NODE_TOML = (ROOT / "node.toml").read_text(encoding="utf-8")


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and key != "options":
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_node_toml_says_exactly_the_defaults() -> None:
    assert NodeConfig.load(ROOT / "node.toml") == NodeConfig()


def test_node_toml_lists_every_key_once_and_no_other() -> None:
    with_keys_that_have_no_default = re.sub(r"^#: ", "", NODE_TOML, flags=re.MULTILINE)

    assert set(flatten(tomllib.loads(with_keys_that_have_no_default))) == set(key_paths())


def test_values_shown_for_keys_without_default_are_valid() -> None:
    config = NodeConfig.parse(re.sub(r"^#: ", "", NODE_TOML, flags=re.MULTILINE))

    assert config.identity_path == "identity.pem"
    assert config.optimizer.total_steps == 10_000


def test_every_key_has_a_variable_of_its_own() -> None:
    paths = list(key_paths())

    assert len({variable_of(path) for path in paths}) == len(paths)
    assert variable_of("dht.port") == "P2PMOE_DHT_PORT"


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("P2PMOE_DHT_PORT", "31337", "dht.port", 31337),
        ("P2PMOE_DHT_TTL_S", "30", "dht.ttl_s", 30),
        ("P2PMOE_IDENTITY_PATH", "key.pem", "identity_path", "key.pem"),
        ("P2PMOE_IDENTITY_PATH", "123", "identity_path", "123"),
        ("P2PMOE_DHT_SWARM_ID", "a,b", "dht.swarm_id", "a,b"),
        ("P2PMOE_DHT_INITIAL_PEERS", "10.0.0.1:1,10.0.0.2:2", "dht.initial_peers", ["10.0.0.1:1", "10.0.0.2:2"]),
        ("P2PMOE_EXPERTS_UIDS", "ffn.[0:4].[0:4]", "experts.uids", ["ffn.[0:4].[0:4]"]),
        ("P2PMOE_DEVICES", '["cuda:0"]', "devices", ["cuda:0"]),
        ("P2PMOE_EXPERTS_OPTIONS", "{inner_dim = 8}", "experts.options", {"inner_dim": 8}),
        ("P2PMOE_OPTIMIZER_CLIP_GRAD_NORM", "false", "optimizer.clip_grad_norm", False),
    ],
)
def test_variables_are_read_as_their_key_wants_them(name: str, text: str, path: str, value: object) -> None:
    assert from_environment({name: text, "HOME": "/"}) == {path: value}


def test_an_empty_variable_counts_as_unset() -> None:
    assert from_environment({"P2PMOE_DHT_PORT": ""}) == {}


def test_variables_of_the_command_are_no_settings() -> None:
    assert from_environment({"P2PMOE_DEBUG": "1", "P2PMOE_TEST_SEED": "1"}) == {}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("P2PMOE_BOGUS", "1", "P2PMOE_BOGUS: no such setting"),
        ("P2PMOE_DHT_PORT", "abc", "P2PMOE_DHT_PORT: dht.port: expected `int`"),
        ("P2PMOE_DHT_PORT", "99999", "P2PMOE_DHT_PORT: dht.port: expected `int` <= 65535"),
        ("P2PMOE_LOG_LEVEL", "loud", "P2PMOE_LOG_LEVEL: log.level: invalid enum value 'loud'"),
    ],
)
def test_a_wrong_variable_is_named(name: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_environment({name: text})
    assert said in str(caught.value)


def test_variables_override_the_file_and_flags_override_both(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text("[http]\nport = 1\n[dht]\nport = 1\n[experts]\nhidden_dim = 1\n")
    environ = {"P2PMOE_DHT_PORT": "2", "P2PMOE_EXPERTS_HIDDEN_DIM": "2"}

    config = load_node_config(path, {"experts.hidden_dim": 3, "dht.port": None}, environ)

    assert (config.http.port, config.dht.port, config.experts.hidden_dim) == (1, 2, 3)


def test_a_wrong_flag_is_said_to_come_from_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"command line: http\.port: expected `int` <= 65535"):
        load_node_config(None, {"http.port": 70000}, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[dht]\nprot = 1\n", r"node\.toml: dht\.prot: unknown key"),
        ("[dht]\nport = 'x'\n", r"node\.toml: dht\.port: expected `int`, got `str`"),
        ("dht = 3\n", r"node\.toml: dht: expected `object`, got `int`"),
        ("[dht\n", r"node\.toml: not valid TOML"),
    ],
)
def test_a_broken_file_is_refused_with_file_key_and_expectation(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "node.toml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=said):
        load_node_config(path, {}, {})


def test_a_client_takes_from_the_environment_only_where_the_swarm_is() -> None:
    environ = {"P2PMOE_DHT_PORT": "31337", "P2PMOE_DHT_INITIAL_PEERS": "10.0.0.1:1", "P2PMOE_DHT_SWARM_ID": "s"}

    assert load_client_config([], None, environ) == DHTConfig(initial_peers=("10.0.0.1:1",), swarm_id="s")
    assert load_client_config(["10.0.0.2:2"], "t", environ) == DHTConfig(initial_peers=("10.0.0.2:2",), swarm_id="t")


def test_a_client_is_told_of_owner_and_swarm_key(tmp_path: Path) -> None:
    key = SwarmKey.generate()
    key.save(tmp_path / "swarm.key")
    environ = {"P2PMOE_DHT_OWNER": "ab" * 32, "P2PMOE_ACCESS_SWARM_KEY_PATH": str(tmp_path / "swarm.key")}

    assert load_client_config(["10.0.0.1:1"], None, environ).owner == "ab" * 32
    assert load_client_config(["10.0.0.1:1"], None, environ, owner="cd" * 32).owner == "cd" * 32
    assert load_swarm_key(None, environ) == key
    assert load_swarm_key(None, {}) is None
    with pytest.raises(IdentityError, match="does not exist"):
        load_swarm_key(str(tmp_path / "no.key"), environ)


def test_a_client_without_initial_peers_is_told_what_to_do() -> None:
    with pytest.raises(ConfigError, match="--initial-peers HOST:PORT"):
        load_client_config([], None, {})


def test_a_client_refuses_an_initial_peer_that_is_no_address() -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        load_client_config(["10.0.0.1"], None, {})


def test_lists_may_be_repeated_or_comma_separated() -> None:
    assert split_lists(["a, b", "c"]) == ("a", "b", "c")
    assert split_lists(None) is None
