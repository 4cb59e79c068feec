"""The README's example and the README's three terminals, as they are printed."""

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli_processes import Command, run_command

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PRINTED_PORT = 31337

TRAINING_S = 150.0  # a few seconds on a quiet machine; the default settings are what is tested

pytestmark = pytest.mark.timeout(300)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def free_port() -> int:
    """One that nobody has: another copy of these tests may be running the printed one."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def three_terminals() -> tuple[list[str], list[str], list[str]]:
    section = README.partition("## Three terminals")[2].partition("\n## ")[0]
    port = free_port()
    lines = re.findall(r"^```sh\np2pmoe (.*?)\n```$", section, flags=re.MULTILINE)
    node, train, lookup = (shlex.split(line.replace(str(PRINTED_PORT), str(port))) for line in lines)
    return node, train, lookup


def test_the_example_runs_as_printed() -> None:
    (program,) = blocks("python")
    assert len(program.splitlines()) == 15

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines()]
    assert [int(step) for step, _ in steps] == list(range(10))
    losses = [float(loss) for _, loss in steps]
    assert 0.7 < losses[0] < 1.5
    assert losses[-1] < 0.2, losses  # about 0.07: what the text below the example says


def test_the_two_commands_are_there() -> None:
    root = Path(__file__).parents[2]
    for line in blocks("sh")[0].splitlines():
        assert (root / line.split()[0]).is_file()


def test_the_three_terminals_run_as_printed() -> None:
    node_line, train_line, lookup_line = three_terminals()
    with Command(*node_line) as node:
        join_line = node.stdout.next()
        assert join_line.split()[:3] == ["p2pmoe", "node", "--initial-peers"]
        assert join_line.split()[3] in train_line
        assert join_line.split()[3] in lookup_line

        code, out, err = run_command(*lookup_line)
        assert (code, err) == (0, "")
        for uid in ("ffn.3.0", "ffn.3.1", "ffn.3.2", "ffn.3.3", "FP32[64] → FP32[64]"):
            assert uid in out

        with Command(*train_line, "--json") as train:
            code = train.wait(TRAINING_S)
            out, err = train.stdout.text, train.stderr.text
        assert code == 0, err
        result = json.loads(out.splitlines()[-1])
        assert result["accuracy"] >= 0.93
        assert result["failed_steps"] == 0
        assert len(result["experts"]) == 16
        assert all(each["updates"] > 0 and each["requests"] > 0 for each in result["experts"])

        everything = [lookup_line[0], *lookup_line[2:]]
        code, out, err = run_command(*everything)
        assert (code, err) == (0, "")
        assert "ffn. 4 × 4 16 100% 1" in " ".join(out.split())
        code, out, _ = run_command(*everything, "--json")
        overview = json.loads(out)
        assert (overview["nodes"], overview["experts"], out.count("FP32")) == (1, 16, 2)
        (ffn,) = overview["prefixes"]
        assert (ffn["prefix"], ffn["grid"], ffn["coverage"]) == ("ffn.", [4, 4], 1.0)
        assert ffn["updates"] == sum(each["updates"] for each in result["experts"])

        code, out, _ = run_command(*lookup_line, "--json")
        found = json.loads(out)
        assert code == 0
        assert [each["uid"] for each in found] == [f"ffn.3.{number}" for number in range(4)]
        assert {each["peer_id"] for each in found} == {result["experts"][0]["peer_id"]}
        assert all(each["round_trip_ms"] > 0 and each["age_s"] >= 0 for each in found)

        code, _, err = run_command(*[word.replace("ffn.3", "nobody") for word in lookup_line])
        assert code == 7
        assert err == (
            "error: no live expert matches nobody.*; it may have expired a moment ago: look for all with "
            "`p2pmoe lookup`\n"
        )

        with Command(*lookup_line, "--json", "--watch", "--every", "0.1") as watch:
            assert len(json.loads(watch.stdout.next())) == 4
            assert len(json.loads(watch.stdout.next())) == 4
            watch.interrupt()
            assert watch.wait(10.0) == 130
