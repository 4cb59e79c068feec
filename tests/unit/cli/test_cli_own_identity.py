"""Where a node keeps its key when nobody says where, and that no two running nodes have the same."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from p2pmoe.cli import own_identity
from p2pmoe.cli.own_identity import data_folder, own_identity_path
from p2pmoe.identity import Identity


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "xdg"))
    return tmp_path


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "xdg/p2pmoe"),
        ("linux", {"XDG_DATA_HOME": ""}, ".local/share/p2pmoe"),
        ("linux", {"XDG_DATA_HOME": "relative/place"}, ".local/share/p2pmoe"),
        ("darwin", {}, "Library/Application Support/p2pmoe"),
        ("win32", {}, "xdg/p2pmoe"),
        ("win32", {"LOCALAPPDATA": ""}, "AppData/Local/p2pmoe"),
    ],
)
def test_the_folder_is_where_the_system_wants_it(
    platform: str, variables: dict[str, str], expected: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert data_folder() == home / expected


def test_the_key_is_the_same_at_the_next_start_and_another_beside_a_running_node(home: Path) -> None:
    with own_identity_path() as first, own_identity_path() as second:
        assert first == data_folder() / "identity.pem"
        assert second == data_folder() / "identity-2.pem"
        assert first is not None
        assert second is not None
        alice, bob = Identity.load_or_create(first), Identity.load_or_create(second)
        assert alice != bob
    with own_identity_path() as again:
        assert again == first
        assert Identity.load_or_create(again) == alice
    assert data_folder().stat().st_mode & 0o077 == 0 or sys.platform == "win32"


def test_a_node_that_was_killed_leaves_its_key_to_the_next() -> None:
    program = (
        "import os\nfrom p2pmoe.cli.own_identity import own_identity_path\n"
        "with own_identity_path() as path:\n    print(path, flush=True)\n    os.read(0, 1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip().endswith(b"identity.pem")
        with own_identity_path() as path:
            assert path is not None
            assert path.name == "identity-2.pem"
        other.kill()
        other.wait(10)
    with own_identity_path() as path:
        assert path is not None
        assert path.name == "identity.pem"


@pytest.mark.parametrize("why", ["no folder", "too many"])
def test_where_nothing_can_be_kept_a_warning_says_so(
    why: str, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if why == "no folder":
        (home / "xdg").write_text("a file")
    else:
        monkeypatch.setattr(own_identity, "_lock", lambda _: False)
    with caplog.at_level(logging.WARNING), own_identity_path() as path:
        assert path is None
    (record,) = caplog.records
    assert record.getMessage().startswith("no key can be kept (")
    assert record.getMessage().endswith("): this node has another name at each start; set identity_path")
