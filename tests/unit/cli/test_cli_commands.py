"""The command line up to the point where a node, a trainer or a search would start."""

import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import p2pmoe
from p2pmoe.cli.failures import EXIT_CODES
from p2pmoe.cli.main import main
from p2pmoe.cli.settings import load_client_identity
from p2pmoe.identity import Identity
from p2pmoe.training import tasks

ROOT = Path(__file__).parents[3]
COMMANDS = [
    *("demo", "node", "train", "lookup", "version"),
    *("id new", "id show", "id export", "id import", "id delegate", "id swarm-key new", "id admin-token"),
    *("state list", "state verify", "state export", "state import"),
]


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command owns its process: what it sets for the whole of it is put back here."""
    for name in os.environ:
        if name.startswith("P2PMOE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    root = logging.getLogger()  # its level and ours: see `log_levels` of all tests
    handlers = root.handlers[:]
    on_sigterm, interval_s = signal.getsignal(signal.SIGTERM), sys.getswitchinterval()
    yield
    signal.signal(signal.SIGTERM, on_sigterm)
    sys.setswitchinterval(interval_s)
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers


def test_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for code, meaning in EXIT_CODES.items():
        assert f"{code:>3}  {meaning}" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"Example: p2pmoe {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["id"]])
def test_no_command_shows_the_help_and_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Usage" in captured.out + captured.err
    assert "error:" not in captured.err


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"p2pmoe {p2pmoe.__version__}\n"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("bogus", 2, "No such command 'bogus'"),
        ("node --port x", 2, "--port"),
        ("node --bogus", 2, "--bogus"),
        ("lookup", 3, "no initial peer"),
        ("lookup *.*", 2, "is no pattern of expert uids"),
        ("lookup ..x --initial-peers 127.0.0.1:1", 2, "is no pattern of expert uids"),
        ("lookup ffn", 3, "no initial peer"),
        ("lookup ffn --initial-peers nonsense", 3, "is not HOST:PORT"),
        ("train bogus --initial-peers 127.0.0.1:1", 3, "unknown task 'bogus'; tasks: digits"),
        ("train digits", 3, "no initial peer"),
        ("train digits --initial-peers 127.0.0.1:1 --grid 4by4", 3, "is no grid"),
        ("train digits --initial-peers 127.0.0.1:1 --uid-prefix 9x", 2, "is no pattern"),
        ("train digits --initial-peers 127.0.0.1:1 --steps 0", 2, "--steps"),
        ("demo --grid 0", 3, "is no grid"),
        ("demo --nodes 0", 2, "--nodes"),
        ("node -c missing.toml", 3, "missing.toml: cannot be read"),
        ("node --port 70000", 3, "http.port"),
        ("node --log-level loud", 3, "log.level"),
        ("id show missing.pem", 4, "does not exist"),
    ],
)
def test_wrong_use_is_one_line_and_an_exit_code(
    line: str, code: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(line.split()) == code

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_variable_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PMOE_DHT_PROT", "1")

    assert main(["node"]) == 3
    assert "P2PMOE_DHT_PROT: no such setting" in capsys.readouterr().err


def test_a_task_whose_packages_are_missing_says_how_to_get_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.TASKS, "stars", "package_that_is_not_there:make")

    assert main(["train", "stars", "--initial-peers", "127.0.0.1:1"]) == 3
    assert (
        "the task stars needs package_that_is_not_there, which is not installed; run: pip install 'p2pmoe[tasks]'"
        in (capsys.readouterr().err)
    )


def test_a_key_file_is_made_once_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "alice.pem"

    assert main(["id", "new", str(path)]) == 0
    peer_id = capsys.readouterr().out.strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 or os.name != "posix"
    assert main(["id", "show", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["peer_id"] == peer_id
    assert main(["id", "new", str(path)]) == 4
    assert "exists already" in capsys.readouterr().err


def test_help_and_lookup_do_without_torch() -> None:
    program = (
        "import sys, p2pmoe.cli.main as cli\n"
        "code = cli.main(['lookup', 'ffn', '--initial-peers', 'nonsense'])\n"
        "print(code, 'torch' in sys.modules, 'numpy' in sys.modules)\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)

    assert done.stdout == "3 False False\n"


def test_an_admin_token_is_made_and_never_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "admin.token"
    assert main(["id", "admin-token", str(path)]) == 0
    assert path.read_text().strip() not in capsys.readouterr().out
    assert main(["id", "admin-token", str(path)]) == 4
    assert "never overwritten" in capsys.readouterr().err


def test_train_signs_with_the_key_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "identity.pem"
    made = Identity.generate()
    made.save(path)
    assert (
        load_client_identity(str(path), {}) == made == load_client_identity(None, {"P2PMOE_IDENTITY_PATH": str(path)})
    )
    assert load_client_identity(None, {}) != load_client_identity(None, {})
    missing = ["train", "digits", "--initial-peers", "127.0.0.1:1", "--identity", str(tmp_path / "nobody.pem")]
    assert main(missing) == 4
    assert "does not exist" in capsys.readouterr().err


def test_the_commented_settings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["node", "--print-config"]) == 0
    assert capsys.readouterr().out == (ROOT / "node.toml").read_text(encoding="utf-8")


def test_the_commented_settings_are_in_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "node.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "p2pmoe").mkdir()
    (tmp_path / "p2pmoe" / "__init__.py").write_text('__version__ = "0"\n')
    program = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", program, str(out)], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        assert content.read("p2pmoe/node.toml") == (ROOT / "node.toml").read_bytes()


@pytest.mark.parametrize(
    ("words", "found"),
    [("p2pmoe lo", "lookup"), ("p2pmoe id swarm-", "swarm-key"), ("p2pmoe node --dht-p", "--dht-port")],
)
def test_shells_complete_commands_and_flags(words: str, found: str) -> None:
    environ = os.environ | {
        "_P2PMOE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "p2pmoe"], env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert found in done.stdout.split(), done.stderr


def test_the_script_for_a_shell_is_printed() -> None:
    environ = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "p2pmoe", "--show-completion", "bash"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "_P2PMOE_COMPLETE=complete_bash" in done.stdout
