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
from p2pmoe.errors import ConfigError, IdentityError, UsageError
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
        ("P2PMOE_DHT_INITIAL_PEERS", "10.0.0.1:1, 10.0.0.2:2,", "dht.initial_peers", ["10.0.0.1:1", "10.0.0.2:2"]),
        ("P2PMOE_DHT_INITIAL_PEERS", "a:1 b:2", "dht.initial_peers", ["a:1", "b:2"]),
        ("P2PMOE_DHT_INITIAL_PEERS", "\n a:1\r\n\tb:2\n\n", "dht.initial_peers", ["a:1", "b:2"]),
        ("P2PMOE_DHT_INITIAL_PEERS", '"a:1,b:2"', "dht.initial_peers", ["a:1", "b:2"]),
        ("P2PMOE_DHT_INITIAL_PEERS", "'a:1', \"b:2\" ,", "dht.initial_peers", ["a:1", "b:2"]),
        ("P2PMOE_DHT_INITIAL_PEERS", '["a:1", "b:2",]', "dht.initial_peers", ["a:1", "b:2"]),
        ("P2PMOE_DHT_INITIAL_PEERS", ",", "dht.initial_peers", []),
        ("P2PMOE_DHT_INITIAL_PEERS", "[::1]:2", "dht.initial_peers", ["[::1]:2"]),
        ("P2PMOE_DHT_PORT", ' "31337"\n', "dht.port", 31337),
        ("P2PMOE_DHT_SWARM_ID", "'my swarm'\n", "dht.swarm_id", "my swarm"),
        ("P2PMOE_EXPERTS_MODULES", "/my experts/a.py\n/b.py", "experts.modules", ["/my experts/a.py", "/b.py"]),
    ],
)
def test_variables_are_read_as_their_key_wants_them(name: str, text: str, path: str, value: object) -> None:
    assert from_environment({name: text, "HOME": "/"}) == {path: value}


def test_an_empty_variable_counts_as_unset() -> None:
    assert from_environment({"P2PMOE_DHT_PORT": ""}) == {}
    assert from_environment({"P2PMOE_DHT_INITIAL_PEERS": " \n"}) == {}


def test_what_a_container_system_sets_for_a_service_of_our_name_is_not_ours() -> None:
    environ = {
        "P2PMOE_PORT": "tcp://10.0.0.7:31337",
        "P2PMOE_SERVICE_HOST": "10.0.0.7",
        "P2PMOE_SERVICE_PORT": "31337",
        "P2PMOE_SERVICE_PORT_DHT_UDP": "31337",
        "P2PMOE_PORT_31337_TCP": "tcp://10.0.0.7:31337",
        "P2PMOE_PORT_31337_TCP_PROTO": "tcp",
        "P2PMOE_PORT_31337_TCP_PORT": "31337",
        "P2PMOE_PORT_31337_TCP_ADDR": "10.0.0.7",
        "P2PMOE_PORT_31337_UDP_ADDR": "10.0.0.7",
        "P2PMOE_NODE_1_SERVICE_HOST": "10.0.0.8",
        "P2PMOE_NODE_1_PORT": "udp://10.0.0.8:1",
        "P2PMOE_DHT_PORT": "udp://10.0.0.9:31337",
        "P2PMOE_HTTP_PORT": "tcp://10.0.0.9:80",
        "P2PMOE_DHT_SERVICE_HOST": "10.0.0.9",
    }
    assert from_environment(environ) == {}
    assert from_environment(environ | {"P2PMOE_DHT_HOST": "0.0.0.0"}) == {"dht.host": "0.0.0.0"}
    for key_path in key_paths():
        assert from_environment({variable_of(key_path): ""}) == {}
    with pytest.raises(ConfigError, match="P2PMOE_PORT: no such setting"):
        from_environment({"P2PMOE_PORT": "31337"})


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
    assert split_lists(["a, b", "c"], "--device") == ("a", "b", "c")
    assert split_lists(["a\n b,", " 'c' "], "--device") == ("a", "b", "c")
    assert split_lists(None, "--device") is None


@pytest.mark.parametrize("values", [[""], [","], [" \n"], ["", "''"]])
def test_a_flag_that_names_nothing_is_wrong_usage(values: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^--initial-peers is empty; was a variable of the shell unset\?"):
        split_lists(values, "--initial-peers")


def test_the_home_folder_in_every_path_of_file_variable_and_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    keys = [key for key in key_paths() if key.endswith("_path")]
    assert len(keys) >= 5
    for key in keys:
        section, _, name = key.rpartition(".")
        path = tmp_path / "node.toml"
        path.write_text((f"[{section}]\n" if section else "") + f'{name} = "~/a/b"\n')
        expected = str(tmp_path / "home" / "a" / "b")
        for config in (
            load_node_config(path, {}, {}),
            load_node_config(None, {key: "~/a/b"}, {}),
            load_node_config(None, {}, {variable_of(key): "~/a/b"}),
        ):
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            assert value == expected, key
    assert load_node_config(None, {}, {"P2PMOE_EXPERTS_MODULES": "~/m.py"}).experts.modules == (
        str(tmp_path / "home" / "m.py"),
    )


def test_relative_paths_start_at_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf" / "node.toml"
    path.write_text(
        'identity_path = "id.pem"\n[dht]\nstate_path = "/var/peers.json"\n[access]\nswarm_key_path = "../swarm.key"\n'
        '[experts]\nmodules = ["mine.py", "package.module", "/opt/theirs.py"]\noptions = {some_path = "x"}\n'
    )
    monkeypatch.chdir(tmp_path)

    config = load_node_config(Path("conf/node.toml"), {"dht.delegation_path": "member.txt"}, {})

    assert config.identity_path == str(Path("conf/id.pem"))
    assert config.dht.state_path == "/var/peers.json"
    assert config.access.swarm_key_path == str(Path("conf/../swarm.key"))
    assert config.experts.modules == (str(Path("conf/mine.py")), "package.module", "/opt/theirs.py")
    assert config.experts.options == {"some_path": "x"}
    assert config.dht.delegation_path == "member.txt"
    assert load_node_config(path, {}, {}).identity_path == str(tmp_path / "conf" / "id.pem")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('identity_path = "~nobody-here/x"', "identity_path: '~nobody-here/x': which home folder that is"),
        ('[dht]\nstate_path = "/a\\u0000b"', "dht.state_path: '/a\\x00b' is no path"),
        ('[experts]\nmodules = ["~nobody-here/x.py"]', "experts.modules: '~nobody-here/x.py': which home folder"),
    ],
)
def test_a_path_that_is_none_is_refused_by_its_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "node.toml"
    path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        load_node_config(path, {}, {})
    assert str(caught.value).startswith(f"{path}: {said}")


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(b"\xef\xbb\xbf[dht]\r\nport = 7\r\n")
    assert load_node_config(path, {}, {}).dht.port == 7
    path.write_bytes("[dht]\nport = 7\n".encode("utf-16"))
    with pytest.raises(ConfigError, match="it is UTF-16, TOML is UTF-8; save it as UTF-8"):
        load_node_config(path, {}, {})
    path.write_bytes(b'[dht]\nswarm_id = "sch\xf6n"\n')
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        load_node_config(path, {}, {})
