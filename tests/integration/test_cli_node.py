"""`p2pmoe node` as a process: the join line, the two signals, and everything that can be wrong at the start."""

import json
import os
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
        assert set(description) == {"peer_id", "dht_address", "endpoint", "experts", "join"}
        assert description["experts"] == ["ffn.0"]
        assert description["join"] == f"p2pmoe node --initial-peers {description['dht_address']}"
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
        assert "Traceback" not in node.stderr.text


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
