"""`p2pmoe id`: moving a key, delegating, the key of a private swarm."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import time
from pathlib import Path

import pytest

from p2pmoe.cli.main import main
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.protocol.delegations import parse_delegation


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("P2PMOE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def alice(tmp_path: Path) -> Identity:
    identity = Identity.generate()
    identity.save("alice.pem")
    return identity


@pytest.fixture
def owner(tmp_path: Path) -> Identity:
    identity = Identity.generate()
    identity.save("owner.pem")
    return identity


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_key_is_moved(alice: Identity, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["id", "export", "alice.pem"]) == 0
    exported = capsys.readouterr()
    assert exported.out.startswith("-----BEGIN PRIVATE KEY-----")
    assert exported.err.startswith("warning: this is the PRIVATE key of peer " + alice.peer_id)

    feed(monkeypatch, exported.out.encode())
    assert main(["id", "import", "moved.pem", "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["peer_id"] == alice.peer_id
    assert "PRIVATE" not in shown
    assert Identity.load("moved.pem") == alice
    assert stat.S_IMODE(Path("moved.pem").stat().st_mode) == 0o600 or os.name != "posix"


def test_a_key_is_not_shown_on_a_terminal_unless_that_is_meant(
    alice: Identity, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["id", "export", "alice.pem"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "on the screen" in captured.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["id", "export", "alice.pem", "--yes"]) == 0
    assert "BEGIN PRIVATE KEY" in capsys.readouterr().out


def test_an_import_overwrites_nothing(
    alice: Identity, owner: Identity, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, owner.export_pem())
    assert main(["id", "import", "alice.pem"]) == 4
    assert "never overwritten" in capsys.readouterr().err
    assert Identity.load("alice.pem") == alice


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n", bytes(100_000)])
def test_what_is_no_key_is_not_imported(
    content: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, content)
    assert main(["id", "import", "new.pem"]) == 4
    assert "key file on standard input" in capsys.readouterr().err
    assert not Path("new.pem").exists()


@pytest.mark.skipif(os.name != "posix", reason="there are no mode bits here")
@pytest.mark.parametrize("arguments", [["export", "alice.pem"], ["import", "new.pem", "--from", "alice.pem"]])
def test_a_key_file_that_others_can_read_is_refused(
    arguments: list[str], alice: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("alice.pem").chmod(0o640)
    assert main(["id", *arguments]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "can be read by others" in captured.err
    assert not Path("new.pem").exists()


def test_a_key_is_imported_from_a_file(alice: Identity) -> None:
    assert main(["id", "import", "new.pem", "--from", "alice.pem"]) == 0
    assert Identity.load("new.pem") == alice


@pytest.mark.parametrize("how", ["hexadecimal", "a file with it", "a key file"])
def test_the_owner_delegates(how: str, owner: Identity, alice: Identity, capsys: pytest.CaptureFixture[str]) -> None:
    Path("alice.pub").write_text(alice.public_key.hex() + "\n")
    member = {"hexadecimal": alice.public_key.hex(), "a file with it": "alice.pub", "a key file": "alice.pem"}[how]
    line = ["id", "delegate", "owner.pem", member, "--scope", "ffn.3.", "--days", "2", "--swarm-id", "mine"]

    assert main(line) == 0
    given = parse_delegation(capsys.readouterr().out)

    given.check_signature(owner.public_key, "mine", alice.public_key)
    assert given.scope == "ffn.3."
    assert 2 * 86_400 - 60 < given.expires_at - time.time() <= 2 * 86_400
    assert main([*line, "--json", "--out", "alice.txt"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["owner"] == owner.public_key.hex()
    assert document["peer_id"] == alice.peer_id
    assert Path("alice.txt").read_text() == document["delegation"]


def test_a_delegation_is_renewed_in_its_place_and_nothing_else_is_overwritten(
    owner: Identity, alice: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["id", "delegate", "owner.pem", alice.public_key.hex(), "--out"]
    assert main([*line, "alice.txt", "--days", "1"]) == 0
    captured = capsys.readouterr()
    assert alice.peer_id in captured.out
    assert f"dht.owner = {owner.public_key.hex()}" in captured.err
    assert main([*line, "alice.txt", "--days", "30"]) == 0
    assert parse_delegation(Path("alice.txt").read_text()).expires_at > time.time() + 29 * 86_400
    assert main([*line, "alice.pem"]) == 3
    assert "is no delegation" in capsys.readouterr().err
    assert Identity.load("alice.pem") == alice
    assert sorted(each.name for each in Path().iterdir()) == ["alice.pem", "alice.txt", "owner.pem"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["ab" * 31], 3, "neither a public key"),
        (["nobody.pub"], 3, "neither a public key"),
        (["ab" * 32, "--scope", "ffn"], 2, "is no prefix"),
        (["ab" * 32, "--days", "0"], 2, "--days"),
        (["ab" * 32, "--out", "no/such/folder"], 3, "cannot be written"),
    ],
)
def test_what_cannot_be_delegated(
    arguments: list[str], code: int, said: str, owner: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["id", "delegate", "owner.pem", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_the_key_of_a_private_swarm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["id", "swarm-key", "new", "swarm.key"]) == 0
    shown = capsys.readouterr().out
    key = SwarmKey.load("swarm.key")
    assert Path("swarm.key").read_text().strip() not in shown
    assert main(["id", "swarm-key", "new", "swarm.key"]) == 4
    assert "never overwritten" in capsys.readouterr().err
    assert SwarmKey.load("swarm.key") == key
