"""`p2pmoe node` as a process: the join line, the two signals, and everything that can be wrong at the start."""

import json
import os
import shlex
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_processes import Command, run_command
from swarm_kit import trusting_context

from p2pmoe.config import parse_host_port

pytestmark = pytest.mark.timeout(90)
posix = pytest.mark.skipif(os.name != "posix", reason="another process cannot be sent Ctrl-C here")


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A number that is in use for TCP and UDP."""
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(tcp.getsockname())
        yield tcp.getsockname()[1]


def hold_a_request(endpoint: str) -> socket.socket:
    """A request that the node has begun to read and that never ends: draining has to wait for it."""
    context = trusting_context()
    raw = socket.create_connection(parse_host_port(endpoint.removeprefix("https://")), timeout=10)
    connection = context.wrap_socket(raw)
    connection.sendall(
        b"POST /p2pmoe/v1/exchange HTTP/1.1\r\nHost: node\r\nContent-Length: 8\r\nExpect: 100-continue\r\n\r\n"
    )
    assert connection.recv(1024).startswith(b"HTTP/1.1 100")
    return connection


@posix
def test_the_first_signal_drains_and_the_second_leaves_at_once() -> None:
    with Command("node", "--experts", "ffn.0", "--hidden-dim", "8", "--json", "--log-format", "json") as node:
        description = json.loads(node.stdout.next())
        assert set(description) == {"peer_id", "dht_address", "endpoint", "experts", "waiting", "join"}
        assert description["experts"] == ["ffn.0"]
        line = f"p2pmoe node --initial-peers {description['dht_address']} --experts ffn.1 --hidden-dim 8"
        assert description["join"] == line
        with hold_a_request(description["endpoint"]):
            node.interrupt()
            assert json.loads(node.stderr.wait_for("leaving"))["level"] == "info"
            assert node.process.poll() is None

            node.interrupt()

            assert node.wait(5.0) == 130
        assert node.stdout.text.count("\n") == 1


@posix
def test_a_node_that_is_asked_to_leave_ends_in_good_order() -> None:
    with Command("node") as node:
        line = node.stdout.next()
        assert line.startswith("p2pmoe node --initial-peers 127.0.0.1:")

        node.process.send_signal(signal.SIGTERM)

        assert node.wait(10.0) == 0
        assert node.stdout.text == line
        assert node.stderr.text.count("this node hosts no experts, it only helps others to find each other") == 1
        assert "Traceback" not in node.stderr.text


def test_the_line_that_a_node_prints_starts_another_with_experts_that_nobody_has(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('[experts]\nuids = ["ffn.[0:2].[0:2]"]\nhidden_dim = 8\n[log]\nheartbeat_s = 0.2\n')
    with Command("node", "-c", str(config)) as first:
        words = shlex.split(first.stdout.next())
        assert words[:3] == ["p2pmoe", "node", "--initial-peers"]
        assert words[4:] == ["--experts", "ffn.[2:4].[0:2]", "--hidden-dim", "8"]
        with Command(*words[1:], "--json") as second:
            description = json.loads(second.stdout.next())
            assert description["experts"] == ["ffn.2.0", "ffn.2.1", "ffn.3.0", "ffn.3.1"]
            assert description["waiting"] == []
            third = shlex.split(description["join"])
            assert third[4:] == ["--experts", "ffn.[4:6].[0:2]", "--hidden-dim", "8"]
        said = first.stderr.wait_for("heartbeat: in the last")
        assert " calls=0 updates=0 refused=0 failed=0 callers=0 connections=0 " in said
        assert "ffn.0.[0:2]: 0 updates, ffn.1.[0:2]: 0 updates" in first.stderr.text
        assert "hosts no experts" not in first.stderr.text


def test_a_node_keeps_its_name_and_two_of_one_user_have_two(tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path), "HOME": str(tmp_path)}
    names = []
    for _ in range(2):
        with Command("node", "--json", **environ) as first, Command("node", "--json", **environ) as second:
            running = [json.loads(each.stdout.next())["peer_id"] for each in (first, second)]
            names.append(sorted(running))
            first.stderr.wait_for("identity")
    assert names[0] == names[1]
    assert len(set(names[0])) == 2
    with Command("node", "--temporary-identity", "--json", **environ) as third:
        assert json.loads(third.stdout.next())["peer_id"] not in names[0]


@pytest.mark.parametrize(
    ("arguments", "variables", "code"),
    [
        (["--experts", "ffn.*"], {}, 2),
        ([], {"P2PMOE_EXPERTS_UIDS": "ffn.*"}, 3),
        (["-c", "node.toml"], {}, 3),
    ],
)
def test_a_pattern_that_is_none_is_wrong_usage_or_a_wrong_setting(
    arguments: list[str], variables: dict[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("node.toml").write_text('[experts]\nuids = ["ffn.*"]\n')
    found, out, err = run_command("node", *arguments, **variables)
    assert (found, out) == (code, "")
    assert err.endswith("'ffn.*' names no finite set of experts; write ranges such as ffn.[0:4].[0:4]\n")
    assert err.count("\n") == 1


def test_a_node_leaves_with_its_parent() -> None:
    with Command("node", "--exit-with-parent") as node:
        node.stdout.next()
        assert node.process.stdin is not None

        node.process.stdin.close()

        assert node.process.wait(5.0) == 129


@pytest.mark.parametrize(("flag", "said"), [("--port", "while starting: http"), ("--dht-port", "while starting: dht")])
def test_a_port_in_use(flag: str, said: str, taken_port: int) -> None:
    code, out, err = run_command("node", flag, str(taken_port))

    assert (code, out) == (5, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(taken_port) in err
    assert said in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[dht]\nprot = 1\n", "dht.prot: unknown key; see node.toml for every key and its default"),
        ("[dht]\nport = 'x'\n", "dht.port: expected `int`, got `str`"),
        ("[dht\n", "not valid TOML"),
    ],
)
def test_a_broken_node_toml(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "node.toml"
    path.write_text(text)

    code, out, err = run_command("node", "-c", str(path))

    assert (code, out) == (3, "")
    assert err.startswith(f"error: {path}: {said}")
    assert err.count("\n") == 1


@posix
def test_a_key_file_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "alice.pem"
    assert run_command("id", "new", str(path))[0] == 0
    key = path.read_bytes()
    path.chmod(0o644)

    code, _, err = run_command("node", "--identity", str(path))

    assert code == 4
    assert err == (
        f"error: key file {path} can be read by others (mode 0644); run: chmod 600 {path} (while starting: identity)\n"
    )
    assert path.read_bytes() == key


@pytest.mark.parametrize("command", ["node", "train digits", "lookup ffn.*"])
def test_initial_peers_that_do_not_answer(command: str) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        code, out, err = run_command(*command.split(), "--initial-peers", address, P2PMOE_DHT_JOIN_TIMEOUT_S="0.5")

    assert (code, out) == (6, "")
    assert err.startswith(f"error: no peer of the DHT answers (initial peers: {address})")
    assert err.count("\n") == 1
