"""A folder of checkpoints: whole whatever happens, and quick with a thousand experts."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from operator import attrgetter
from pathlib import Path

import msgspec
import pytest

from p2pmoe.errors import StateError
from p2pmoe.server.checkpoints import (
    MAX_DOCUMENT_BYTES,
    Checkpoint,
    Made,
    TensorFile,
    applied_now,
    decode_checkpoint,
    document_name,
    encode_checkpoint,
    key_of,
    parse_name,
    tensors_name,
    uid_of,
)
from p2pmoe.server.state_folder import INDEX_NAME, StateFolder

BODY = b"the tensors of an expert"


def checkpoint(uid: str, sequence: int, tensors: TensorFile, updates: int = 0, **changes: object) -> Checkpoint:
    made = Made(module="FFN", schema_digest="d", layout={}, optimizer="SGD", trained=[])
    given = {"swarm": "s", "incarnation": "0" * 32, "saved_at": 1e9, "wire_version": 1, "made": made, "state": {}}
    return Checkpoint(uid=uid, sequence=sequence, tensors=tensors, updates=updates, **given | changes)


def write(folder: StateFolder, uid: str, updates: int, body: bytes = BODY) -> None:
    folder.write(uid, [body], lambda sequence, tensors: checkpoint(uid, sequence, tensors, updates))


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path / "state")
    folder.open()
    yield folder
    folder.close()


def reopened(folder: StateFolder) -> StateFolder:
    folder.close()
    folder.open()
    return folder


def names(folder: StateFolder) -> list[str]:
    return sorted(
        each for each in map(attrgetter("name"), folder.path.iterdir()) if each.startswith(("expert-", ".expert-"))
    )


@pytest.mark.parametrize("uid", ["ffn.3.17", "Ffn.3.17", "CON.1", "a-b_C.0.0.0.2147483647", "A" * 64 + ".1"])
def test_a_name_stands_for_one_uid_on_every_file_system(uid: str) -> None:
    name = document_name(uid, 42)
    assert name == name.lower()
    assert len(name) < 255
    assert not name.upper().startswith(("CON.", "NUL.", "AUX."))
    parsed = parse_name(name)
    assert parsed is not None
    assert (uid_of(parsed.key), parsed.sequence, parsed.is_document) == (uid, 42, True)
    assert parse_name(tensors_name(uid, 42)) == (key_of(uid), 42, False)


@pytest.mark.parametrize(
    "name", ["expert-ffn.1@1.json", "expert-../x@000000000001.json", "expert-ffn.1@000000000000.json", "lock"]
)
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert parse_name(name) is None


def test_the_newest_is_found_again_and_the_last_two_stay(folder: StateFolder) -> None:
    for updates in (10, 20, 30):
        write(folder, "ffn.1", updates, b"%d" % updates)
    assert names(folder) == [
        "expert-ffn.1@000000000002.json",
        "expert-ffn.1@000000000002.safetensors",
        "expert-ffn.1@000000000003.json",
        "expert-ffn.1@000000000003.safetensors",
    ]
    found = reopened(folder).newest("ffn.1")
    assert found is not None
    assert found.checkpoint.updates == 30
    assert found.tensors_path.read_bytes() == b"30"
    assert folder.newest("ffn.2") is None


def test_a_node_has_its_folder_alone(folder: StateFolder) -> None:
    second = StateFolder(folder.path)
    with pytest.raises(StateError, match=r"is in use by another node: each needs a folder of its own; set state.path"):
        second.open()
    folder.close()
    second.open()
    second.close()


def damage_nothing(path: Path) -> None:
    """For the control."""


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("keeps_index", [True, False])
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", [flip_a_bit, tear, Path.unlink])
def test_what_is_torn_or_tampered_with_is_passed_over_with_one_warning(
    folder: StateFolder, damage: object, suffix: str, keeps_index: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for updates in (10, 20):
        write(folder, "ffn.1", updates)
    folder.close()
    damage(folder.path / f"expert-ffn.1@000000000002.{suffix}")  # type: ignore[operator]
    if not keeps_index:
        (folder.path / INDEX_NAME).unlink()
    folder.open()
    with caplog.at_level(logging.WARNING):
        found = folder.newest("ffn.1")
    assert found is not None
    assert found.checkpoint.updates == 10
    is_gone = damage is Path.unlink and suffix == "json"  # then nothing says that there ever was one
    assert len(caplog.records) == (0 if is_gone else 1)
    write(folder, "ffn.1", 15)
    assert folder.entries_of("ffn.1")[0].sequence == 3
    assert reopened(folder).newest("ffn.1").checkpoint.updates == 15  # type: ignore[union-attr]
    assert folder.newest("ffn.1").tensors_path.exists()  # type: ignore[union-attr]
    for updates in (16, 17):
        write(folder, "ffn.1", updates)
    assert [entry.updates for entry in folder.entries_of("ffn.1")] == [17, 16]
    assert len(names(folder)) == 4


def test_a_document_put_in_the_place_of_another_is_found_out(folder: StateFolder) -> None:
    write(folder, "ffn.1", 10)
    write(folder, "ffn.2", 20)
    for suffix in ("json", "safetensors"):
        other = folder.path / f"expert-ffn.2@000000000001.{suffix}"
        (folder.path / f"expert-ffn.1@000000000001.{suffix}").write_bytes(other.read_bytes())
    with pytest.raises(StateError, match=r"ffn.1: none of its 1 checkpoints in .* is whole; put back a copy"):
        reopened(folder).newest("ffn.1")
    (folder.path / INDEX_NAME).unlink()
    with pytest.raises(StateError, match="none of its 1"):
        reopened(folder).newest("ffn.1")


def test_an_older_document_under_a_newer_name_is_found_out(folder: StateFolder) -> None:
    write(folder, "ffn.1", 10)
    write(folder, "ffn.1", 20)
    for suffix in ("json", "safetensors"):
        old = folder.path / f"expert-ffn.1@000000000001.{suffix}"
        (folder.path / f"expert-ffn.1@000000000002.{suffix}").write_bytes(old.read_bytes())
    (folder.path / INDEX_NAME).unlink()
    found = reopened(folder).newest("ffn.1")
    assert found is not None
    assert found.checkpoint.sequence == 1


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_broken_index_is_made_anew(folder: StateFolder, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, "ffn.1", 10)
    folder.close()
    for each in folder.path.glob(f"{INDEX_NAME}*"):
        each.unlink()
    (folder.path / INDEX_NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        folder.open()
    assert len(caplog.records) == bool(content)
    assert folder.newest("ffn.1").checkpoint.updates == 10  # type: ignore[union-attr]


def test_what_a_dying_writer_left_is_cleared_and_never_taken_for_a_checkpoint(folder: StateFolder) -> None:
    write(folder, "ffn.1", 10)
    (folder.path / ".expert-ffn.1@000000000002.safetensors.part").write_bytes(b"half")
    (folder.path / "expert-ffn.1@000000000002.safetensors").write_bytes(b"whole, without a document")
    assert reopened(folder).newest("ffn.1").checkpoint.updates == 10  # type: ignore[union-attr]
    assert not [name for name in names(folder) if name.endswith(".part")]
    write(folder, "ffn.1", 20)
    write(folder, "ffn.1", 30)
    assert [name[-17:] for name in names(folder) if name.endswith("json")] == ["000000000003.json", "000000000004.json"]
    assert len(names(folder)) == 4


def test_looking_takes_nothing_and_needs_no_index(folder: StateFolder) -> None:
    write(folder, "ffn.1", 10)
    beside = StateFolder(folder.path)
    beside.look()
    assert [(entry.uid, entry.updates) for entry in beside.entries] == [("ffn.1", 10)]
    assert beside.check(beside.entries[0]) is None
    flip_a_bit(folder.path / "expert-ffn.1@000000000001.safetensors")
    assert "digest differs" in (beside.check(beside.entries[0]) or "")
    with pytest.raises(StateError, match="is no folder of checkpoints"):
        StateFolder(folder.path / "nowhere").look()


def test_a_checkpoint_of_another_folder_is_taken_in(folder: StateFolder, tmp_path: Path) -> None:
    write(folder, "ffn.1", 10)
    write(folder, "ffn.1", 20)
    other = StateFolder(tmp_path / "other")
    other.open()
    try:
        entry = other.adopt(folder.newest("ffn.1"))  # type: ignore[arg-type]
        assert (entry.sequence, entry.updates) == (1, 20)
        assert other.newest("ffn.1").tensors_path.read_bytes() == BODY  # type: ignore[union-attr]
    finally:
        other.close()


def test_a_full_disk_leaves_what_was_there(folder: StateFolder) -> None:
    write(folder, "ffn.1", 10)

    def chunks() -> object:
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        folder.write("ffn.1", chunks(), lambda *_: checkpoint("ffn.1", 1, TensorFile(0, "")))  # type: ignore[arg-type]
    assert len(names(folder)) == 2
    assert folder.newest("ffn.1").checkpoint.updates == 10  # type: ignore[union-attr]


def test_documents_of_other_versions_and_no_documents_are_told_apart() -> None:
    whole = encode_checkpoint(checkpoint("ffn.1", 1, TensorFile(3, "0" * 64)))
    assert decode_checkpoint(whole).uid == "ffn.1"
    newer = msgspec.json.encode({"format": 2, "uid": 7})
    content = b'{"sha256":"%s","checkpoint":%s}' % (hashlib.sha256(newer).hexdigest().encode(), newer)
    with pytest.raises(StateError, match="it has format 2, this version reads format 1; use the version that wrote it"):
        decode_checkpoint(content)
    for broken in (
        b"",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"sha256":"x"}',
        whole.replace(b"ffn.1", b"ffn.2"),
        b"0" * (MAX_DOCUMENT_BYTES + 1),
    ):
        with pytest.raises(StateError):
            decode_checkpoint(broken)


def test_a_clock_put_back_makes_no_call_younger() -> None:
    document = checkpoint("ffn.1", 1, TensorFile(0, "0" * 64), applied=[("a", 5.0)], saved_at=1000.0)
    assert applied_now(document, 1010.0) == [("a", 15.0)]
    assert applied_now(document, 900.0) == [("a", 5.0)]


def test_a_thousand_experts_are_one_folder_that_stays_quick(
    folder: StateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for index in range(1000):
        write(folder, f"ffn.{index}", index)
    folder.close()
    started = time.perf_counter()
    folder.open()
    assert len(folder.uids) == 1000
    assert folder.newest("ffn.999").checkpoint.updates == 999  # type: ignore[union-attr]
    seconds = time.perf_counter() - started
    print(f"{seconds * 1e3:.1f} ms")
    assert seconds < 2.0
