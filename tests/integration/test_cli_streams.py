"""Commands whose output nobody takes, in terminals of other encodings, and whose terminal goes away."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_processes import Command
from test_cli_node import hold_a_request

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.name != "posix", reason="a POSIX shell redirects the output"),
]
P2PMOE = f"{shlex.quote(sys.executable)} -m p2pmoe"


def shell(line: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """One line of a shell, `$P` being our command; its exit code comes last on standard error."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("P2PMOE_")}
    return subprocess.run(
        ["/bin/sh", "-c", line],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
        env=inherited | {"P": P2PMOE} | environ,
    )


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$P version >&-", 0, ""),
        ("$P --help >&-", 0, ""),
        ("$P version >&- 2>&- <&-", 0, ""),
        ("$P lookup ffn 2>&-", 3, ""),
        ("$P version >/dev/full", 1, "error: [Errno 28] No space left on device\n"),
        ("$P lookup --help >/dev/full", 1, "error: [Errno 28] No space left on device\n"),
        ("$P lookup ffn 2>/dev/full", 3, ""),
        ("$P id import made.pem <&-", 4, "error: standard input is closed; name the exported key's file with --from"),
    ],
)
def test_output_that_nobody_takes(line: str, code: int, said: str, tmp_path: Path) -> None:
    done = shell(f"cd {shlex.quote(str(tmp_path))}; {line}")

    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == (1 if said else 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["version", "--help", "train --help"])
def test_a_reader_that_leaves_ends_the_command_without_a_word(command: str) -> None:
    done = shell(f"{{ $P {command}; echo code $? >&2; }} | true")

    assert done.returncode == 0
    assert done.stderr in ("code 1\n", "code 0\n")  # 0 where it had written all before the reader left


def test_help_in_the_plainest_locale() -> None:
    done = shell("$P node --help", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")

    assert (done.returncode, done.stderr) == (0, "")
    assert "HOST:PORT..." in done.stdout
    assert done.stdout.isascii()


def test_an_argument_in_another_encoding_is_wrong_usage() -> None:
    done = shell("$P lookup ffn --swarm-id \"$(printf '\\377')\"")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(r"error: the argument '\udcff' is no text in this locale's encoding")


def test_a_node_whose_output_nobody_takes_serves_all_the_same() -> None:
    script = (
        "import os, signal, subprocess, sys\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        "node = subprocess.Popen([sys.executable, '-m', 'p2pmoe', 'node'], stdout=writer, stderr=subprocess.PIPE)\n"
        "for line in node.stderr:\n"
        "    if b'nobody takes standard output: Broken pipe; others join with: p2pmoe node' in line:\n"
        "        node.send_signal(signal.SIGTERM)\n"
        "    assert b'Traceback' not in line\n"
        "sys.exit(node.wait(20))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_a_terminal_that_closes_drains_the_node_however_often_it_says_so() -> None:
    with Command("node", "--experts", "ffn.0", "--hidden-dim", "8", "--json") as node:
        endpoint = node.stdout.next().partition('"endpoint": "')[2].partition('"')[0]
        with hold_a_request(endpoint):
            node.process.send_signal(signal.SIGHUP)
            node.stderr.wait_for("leaving")
            node.process.send_signal(signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                node.process.wait(0.5)  # it waits for the request, for at most http.drain_timeout_s
        assert node.wait(20.0) == 0
        assert "Traceback" not in node.stderr.text


def test_nohup_is_heard() -> None:
    script = "import os, signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nos.execv(sys.argv[1], sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", script, sys.executable, "-m", "p2pmoe", "node"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as node:
        assert node.stdout is not None
        assert node.stdout.readline().startswith(b"p2pmoe node")
        node.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            node.wait(0.5)
        node.send_signal(signal.SIGTERM)
        assert node.wait(20.0) == 0
