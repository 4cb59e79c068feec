"""`p2pmoe demo` as a process: what it shows, what it keeps, and that it leaves nothing behind, however it ends."""

import json
import os
import signal
from pathlib import Path

import pytest
from cli_processes import Command, all_gone, wait_until

pytestmark = pytest.mark.timeout(120)
posix = pytest.mark.skipif(os.name != "posix", reason="another process cannot be sent Ctrl-C here")


def test_a_short_demo_ends_with_a_document_and_without_its_processes(tmp_path: Path) -> None:
    arguments = ["demo", "--nodes", "2", "--grid", "2x3", "--steps", "30", "--seed", "1", "--run-dir", str(tmp_path)]
    with Command(*arguments, "--json", P2PMOE_HTTP_PORT="1") as demo:
        demo.stderr.wait_for("step=")
        children = demo.children()
        assert len(children) == 3
        assert demo.wait() == 0, demo.stderr.text
        assert all_gone(children)

        result = json.loads(demo.stdout.text.splitlines()[-1])
        assert demo.stdout.text.count("\n") == 1
        assert result["steps"] == 30
        assert result["accuracy"] > 0.5
        assert result["samples_per_s"] > 0
        assert result["seconds"] > 0
        assert [each["uid"] for each in result["experts"]] == [f"ffn.{i}.{j}" for i in range(2) for j in range(3)]
        assert len({each["peer_id"] for each in result["experts"]}) == 2
        assert all(each["updates"] > 0 and each["requests"] > each["updates"] for each in result["experts"])
        assert "node-2" in demo.stderr.text

    kept = {path.name for path in tmp_path.iterdir()}
    assert {"loss.png", "result.json", "bootstrap.log", "node-1.log", "node-2.log"} <= kept
    assert "Traceback" not in "".join(path.read_text() for path in tmp_path.glob("*.log"))


@posix
def test_training_goes_on_without_a_killed_node_until_ctrl_c(tmp_path: Path) -> None:
    with Command("demo", "--nodes", "2", "--steps", "100000", "--run-dir", str(tmp_path)) as demo:
        assert "experts_alive=16" in demo.stdout.wait_for("step=")
        children = demo.children()
        assert len(children) == 3

        (volunteer,) = (each for each in children if str(tmp_path / "node-1.toml") in each.cmdline())
        volunteer.kill()
        line = demo.stdout.wait_for("experts_alive=8")
        assert int(line.split("/")[0].removeprefix("step=")) > 1

        demo.interrupt()

        assert demo.wait() == 130
        assert all_gone(children)
        assert "Traceback" not in demo.stderr.text


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_nodes_that_start_do_not_outlive_the_demo(number: int, code: int, tmp_path: Path) -> None:
    with Command("demo", "--run-dir", str(tmp_path)) as demo:
        wait_until(lambda: bool(demo.children()))
        children = demo.children()

        demo.process.send_signal(number)

        assert demo.wait() == code
        wait_until(lambda: all_gone(children), timeout_s=10.0)


def test_a_node_that_cannot_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import sys\nif 'node' in sys.argv[-6:] or 'node' in sys.orig_argv: raise SystemExit('no luck today')\n"
    )
    with Command("demo", "--run-dir", str(tmp_path / "run"), PYTHONPATH=str(tmp_path / "broken")) as demo:
        assert demo.wait() == 1
        line = demo.stderr.text
    assert line.startswith("error: bootstrap could not start, exit code 1; the end of ")
    assert "no luck today" in line
    assert line.count("\n") == 1
