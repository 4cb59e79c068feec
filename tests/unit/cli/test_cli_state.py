"""`p2pmoe state` and the folder of a node whose keeper named none."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from p2pmoe.cli.main import main
from p2pmoe.cli.own_state import own_state_path, with_own_state
from p2pmoe.config import NodeConfig
from p2pmoe.server.checkpoints import Checkpoint, Made, TensorFile
from p2pmoe.server.state_folder import StateFolder

MADE = Made(module="FFN", schema_digest="d", layout={}, optimizer="SGD", trained=[])


def fill(path: Path, *experts: tuple[str, int], incarnation: str = "a" * 32) -> Path:
    folder = StateFolder(path)
    folder.open()
    for uid, updates in experts:

        def describe(sequence: int, tensors: TensorFile, uid: str = uid, updates: int = updates) -> Checkpoint:
            return Checkpoint(
                uid=uid,
                sequence=sequence,
                swarm="s",
                incarnation=incarnation,
                updates=updates,
                saved_at=1e9,
                wire_version=1,
                made=MADE,
                state={},
                tensors=tensors,
            )

        folder.write(uid, [b"%d" % updates], describe)
    folder.close()
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    """The document on standard output, or the line on standard error where it fails."""
    capsys.readouterr()
    assert main(["state", *map(str, arguments)]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return json.loads(out) if not code and "--json" in arguments else out if not code else err


def updates(document: Any, key: str = "checkpoints") -> list[tuple[str, int]]:
    return [(each["uid"], each["updates"]) for each in document[key]]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return fill(tmp_path / "state", ("ffn.1", 10), ("ffn.1", 20), ("gpt.0.1", 7))


def test_it_lists_what_is_there(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert updates(run(capsys, "list", state, "--json")) == [("ffn.1", 20), ("ffn.1", 10), ("gpt.0.1", 7)]
    assert updates(run(capsys, "list", state, "--json", "--experts", "gpt.")) == [("gpt.0.1", 7)]
    text = run(capsys, "list", state)
    assert "2001-09-09 01:46:40+00:00" in text
    assert "expert-ffn.1@000000000002.json" in text


def test_it_verifies_and_says_what_is_broken(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "verify", state) == "3 of 3 checkpoints are whole\n"
    (state / "expert-ffn.1@000000000002.safetensors").write_bytes(b"21")
    (state / "expert-gpt.0.1@000000000001.json").write_bytes(b"{}")
    line = run(capsys, "verify", state, code=8)
    assert line == f"error: 2 of 3 checkpoints in {state} are not whole; 1 experts have no whole one left: gpt.0.1\n"
    capsys.readouterr()
    assert main(["state", "verify", str(state), "--json"]) == 8
    document = json.loads(capsys.readouterr().out)
    assert document["whole"] is False
    assert document["lost"] == ["gpt.0.1"]
    problems = {each["file"]: each["problem"] for each in document["checkpoints"]}
    assert problems["expert-ffn.1@000000000001.json"] is None
    assert "digest differs" in problems["expert-ffn.1@000000000002.json"]


def test_an_export_is_a_folder_that_can_be_imported(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    document = run(capsys, "export", state, taken, "--json", "--experts", "ffn.1")
    assert updates(document, "exported") == [("ffn.1", 20)]
    assert run(capsys, "import", tmp_path / "new", "--from", taken) == f"imported 1 experts: {tmp_path / 'new'}\n"
    assert updates(run(capsys, "list", tmp_path / "new", "--json")) == [("ffn.1", 20)]
    assert run(capsys, "verify", tmp_path / "new") == "1 of 1 checkpoints are whole\n"
    assert "exists and is not empty; choose another folder" in run(capsys, "export", state, taken, code=3)


def test_an_import_throws_nothing_away_unless_told_to(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = fill(tmp_path / "older", ("ffn.1", 15), ("new.1", 1))
    line = run(capsys, "import", state, "--from", older, code=8)
    assert "ffn.1 is in " in line
    assert "at 20 updates, and is newer than the one at 15; nothing was imported; pass --replace" in line
    assert updates(run(capsys, "list", state, "--json", "--experts", "ffn.1")) == [("ffn.1", 20), ("ffn.1", 10)]
    other = fill(tmp_path / "other", ("ffn.1", 30), incarnation="b" * 32)
    assert "is another one than the one at 30" in run(capsys, "import", state, "--from", other, code=8)
    run(capsys, "import", state, "--from", other, "--replace")
    assert updates(run(capsys, "list", state, "--json", "--experts", "ffn.1")) == [("ffn.1", 30), ("ffn.1", 20)]
    newer = fill(tmp_path / "newer", ("gpt.0.1", 9))
    run(capsys, "import", state, "--from", newer)
    assert updates(run(capsys, "list", state, "--json", "--experts", "gpt.")) == [("gpt.0.1", 9), ("gpt.0.1", 7)]


def test_a_folder_in_use_can_be_looked_at_and_not_imported_into(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = fill(tmp_path / "other", ("new.1", 30))
    folder = StateFolder(state)
    folder.open()
    try:
        assert len(run(capsys, "list", state, "--json")["checkpoints"]) == 3
        assert "is in use by another node" in run(capsys, "import", state, "--from", other, code=8)
    finally:
        folder.close()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["list", "{state}/nowhere"], 8, "is no folder of checkpoints; name the one that state.path names"),
        (["list", "{state}", "--experts", "nobody."], 7, "there is no checkpoint of nobody. in"),
        (["list", "{state}", "--experts", "?"], 2, "is no pattern of expert uids"),
        (["import", "{state}", "--from", "{state}/nowhere"], 8, "is no folder of checkpoints"),
        (["import", "{state}/lock/x", "--from", "{state}"], 8, "cannot be written: "),
        (["export", "{state}", "{state}/lock"], 3, "cannot be used: "),
    ],
)
def test_what_cannot_be_done_is_one_line(
    state: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = run(capsys, *(each.replace("{state}", str(state)) for each in arguments), code=code)
    assert message in line
    assert line.count("\n") == 1


def settings(**experts: Any) -> NodeConfig:
    return NodeConfig.from_tree({"identity_path": "/keys/me.pem", "experts": {"uids": ["ffn.[0:2]"]} | experts})


def test_a_node_keeps_its_experts_beside_its_key_each_kind_for_itself() -> None:
    path = own_state_path(Path("/keys/me.pem"), settings(hidden_dim=64))
    assert path.parent == Path("/keys/me.state")
    assert path.name.startswith("p2pmoe-ffn-64-")
    assert path == own_state_path(Path("/keys/me.pem"), settings(hidden_dim=64, seed=3, uids=["gpt.1"]))
    others = [settings(), settings(hidden_dim=64, kind="nop"), settings(hidden_dim=64, options={"inner_dim": 4})]
    assert len({path, *(own_state_path(Path("/keys/me.pem"), each) for each in others)}) == 4
    assert with_own_state(NodeConfig()).state.path is None
    named = NodeConfig.from_tree({"identity_path": "/keys/me.pem", "state": {"path": "/state"}})
    assert with_own_state(named).state.path == "/state"


def test_experts_of_another_kind_are_left_alone_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def of(width: int) -> NodeConfig:
        tree = {"identity_path": str(tmp_path / "me.pem"), "experts": {"uids": ["ffn.[0:2]"], "hidden_dim": width}}
        return with_own_state(NodeConfig.from_tree(tree))

    first = of(64).state.path
    assert first is not None
    fill(Path(first), ("ffn.1", 10))
    with caplog.at_level(logging.WARNING):
        assert of(64).state.path == first
        assert not caplog.records
        assert of(32).state.path != first
    assert len(caplog.records) == 1
    assert (
        f"ffn.1 (1 in all) was hosted before as another kind, width or for another swarm: its checkpoints in {first}"
        in caplog.text
    )
