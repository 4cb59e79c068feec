"""A folder of checkpoints: the newest few of each expert, whole whatever happens. Knows files; no torch, no threads.

    lock               held by the one node that writes here
    index.sqlite       which checkpoints there are (`state_index.py`); made anew from the files when it is broken
    expert-…@….*       the checkpoints (`checkpoints.py`)

A checkpoint is there once its document has its name: the tensors' file has its own before. Older ones go only after
the names are on the disk, so that at every moment the newest or the one before it is whole. What is torn or tampered
with is passed over with a warning, kept until newer ones have pushed it out, and never written over.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import msgspec

from p2pmoe.errors import StateError
from p2pmoe.file_lock import lock_file
from p2pmoe.seldom import Seldom
from p2pmoe.server.checkpoints import (
    Checkpoint,
    TensorFile,
    document_name,
    encode_checkpoint,
    key_of,
    parse_name,
    tensors_name,
    uid_of,
)
from p2pmoe.server.state_files import (
    UNFINISHED,
    check_tensors,
    read_chunks,
    read_document,
    sync_folder,
    write_whole,
)
from p2pmoe.server.state_index import Entry, StateIndex

logger = logging.getLogger(__name__)

INDEX_NAME: Final = "index.sqlite"
LOCK_NAME: Final = "lock"
Describe = Callable[[int, TensorFile], Checkpoint]
"""The document of a checkpoint, given its sequence and its tensors' file."""


class Found(NamedTuple):
    """A checkpoint that is whole."""

    checkpoint: Checkpoint
    tensors_path: Path


class StateFolder:
    """One folder. A single thread at a time uses it.

    Args:
        path: made when it is opened for writing.
        keep: how many whole checkpoints of an expert stay, 2 at least.
    """

    def __init__(self, path: Path, *, keep: int = 2) -> None:
        self.path = path
        self._keep = max(2, keep)
        self._seldom = Seldom()
        self._lock: IO[bytes] | None = None
        self._index: StateIndex | None = None
        self._entries: dict[str, list[Entry]] = {}
        self._numbers: dict[str, set[int]] = {}
        """By key: the sequences that any file has."""

    def __repr__(self) -> str:
        return f"<StateFolder {self.path}: {len(self._entries)} experts>"

    @property
    def entries(self) -> list[Entry]:
        """What is there, by uid, the newest of a uid first; bad ones too."""
        return [entry for uid in sorted(self._entries) for entry in self._entries[uid]]

    @property
    def uids(self) -> list[str]:
        return sorted(self._entries)

    def entries_of(self, uid: str) -> list[Entry]:
        """Those of one expert, the newest first; bad ones too."""
        return list(self._entries.get(uid, ()))

    def open(self) -> None:
        """Take the folder for writing; only `close` gives it to others.

        Raises:
            StateError: another node has it.
            OSError: it cannot be made or written to.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            lock = undo.enter_context((self.path / LOCK_NAME).open("ab"))
            if not lock_file(lock):
                raise StateError(
                    f"{self.path} is in use by another node: each needs a folder of its own; set state.path, or end "
                    f"the other one"
                )
            for path in self.path.glob(f".expert-*{UNFINISHED}"):
                path.unlink(missing_ok=True)
            self._index, known = self._open_index()
            undo.callback(self._index.close)
            self._gather(known)
            self._store_index(known)
            undo.pop_all()
            self._lock = lock

    def look(self) -> None:
        """See what is there without taking it: a node may be writing. Raises StateError when there is no folder."""
        if not self.path.is_dir():
            raise StateError(f"{self.path} is no folder of checkpoints; name the one that state.path names")
        known: list[Entry] = []
        if (self.path / INDEX_NAME).exists():
            with contextlib.suppress(StateError):
                index = StateIndex(self.path / INDEX_NAME, writes=False)
                with contextlib.closing(index):
                    known = index.entries()
        self._gather(known)

    def close(self) -> None:
        """Let others have it. Safe to call twice."""
        if self._index is not None:
            self._index.close()
            self._index = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def became_a_child(self) -> tuple[Any, ...]:
        """In a forked child: what must not be used, nor finalized, there; the folder is the parent's."""
        left, self._index, self._lock = (self._index, self._lock), None, None
        return left

    def newest(self, uid: str) -> Found | None:
        """The newest whole checkpoint; those before it that are not whole get a warning. None: there is none at all.

        Raises StateError when there are some and none is whole.
        """
        entries = self._entries.get(uid, [])
        for entry in entries:
            try:
                return self._load(entry)
            except (StateError, OSError) as error:
                logger.warning(
                    "%s: the checkpoint at %d updates (%s) cannot be used, the one before it is: %s",
                    uid,
                    entry.updates,
                    document_name(uid, entry.sequence),
                    error,
                )
                if isinstance(error, StateError):
                    self._mark_bad(entry)
        if entries:
            raise StateError(
                f"{uid}: none of its {len(entries)} checkpoints in {self.path} is whole; put back a copy of them, move "
                f"the expert-{key_of(uid)}@* files away, or set experts.fresh = 'always'"
            )
        return None

    def check(self, entry: Entry) -> str | None:
        """What is wrong with a checkpoint; None when it is whole."""
        try:
            self._load(entry)
        except (StateError, OSError) as error:
            return str(error)
        return None

    def write(self, uid: str, chunks: Iterable[bytes | memoryview], describe: Describe) -> Entry:
        """Add a checkpoint, then let the oldest go.

        Args:
            uid: whose.
            chunks: of the tensors' file.
            describe: the document.

        Raises:
            OSError: the disk is full, read-only, or broken. What was there before still is.
            StateError: it cannot be kept as it is.
        """
        assert self._lock is not None
        numbers = self._numbers.setdefault(key_of(uid), set())
        sequence = max([0, *numbers]) + 1
        tensors = write_whole(self.path / tensors_name(uid, sequence), chunks)
        numbers.add(sequence)
        checkpoint = describe(sequence, tensors)
        document = write_whole(self.path / document_name(uid, sequence), [encode_checkpoint(checkpoint)])
        sync_folder(self.path)
        entry = _entry_of(checkpoint, document.sha256, document.nbytes)
        entries = [entry, *self._entries.get(uid, [])]
        self._entries[uid], gone = self._part(entries)
        self._change_index([entry], gone)
        self._remove_old(uid)
        return entry

    def adopt(self, found: Found) -> Entry:
        """Copy a checkpoint of another folder as the newest one here. Raises OSError, StateError."""
        checkpoint = found.checkpoint

        def describe(sequence: int, tensors: TensorFile) -> Checkpoint:
            if tensors != checkpoint.tensors:
                raise StateError(f"{found.tensors_path} changed while it was read")
            return msgspec.structs.replace(checkpoint, sequence=sequence)

        return self.write(checkpoint.uid, read_chunks(found.tensors_path, checkpoint.tensors.nbytes), describe)

    # -- private

    def _open_index(self) -> tuple[StateIndex, list[Entry]]:
        path = self.path / INDEX_NAME
        try:
            return _read_index(path)
        except StateError as error:
            logger.warning("%s; it is made anew from the checkpoints", error)
            for each in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))):
                each.unlink(missing_ok=True)
            return _read_index(path)

    def _gather(self, known: Iterable[Entry]) -> None:
        """`_entries` and `_numbers` from the folder's files and what the index says of them."""
        by_name = {document_name(entry.uid, entry.sequence): entry for entry in known}
        self._numbers, self._entries = {}, {}
        for path in self.path.iterdir():
            name = parse_name(path.name)
            if name is None:
                continue
            self._numbers.setdefault(name.key, set()).add(name.sequence)
            if name.is_document:
                entry = by_name.get(path.name) or _read_entry(path, uid_of(name.key), name.sequence)
                self._entries.setdefault(entry.uid, []).append(entry)
        for entries in self._entries.values():
            entries.sort(key=lambda entry: -entry.sequence)

    def _store_index(self, known: Iterable[Entry]) -> None:
        """Let the index say what is there."""
        before, after = set(known), set(self.entries)
        places = {(entry.uid, entry.sequence) for entry in after}
        gone = [place for each in before - after if (place := (each.uid, each.sequence)) not in places]
        if after - before or gone:
            self._change_index(after - before, gone)

    def _change_index(self, added: Iterable[Entry], gone: Iterable[tuple[str, int]]) -> None:
        """A checkpoint is whole without the index: then the next start reads its document."""
        if self._index is None:
            return
        try:
            self._index.change(added, gone)
        except StateError as error:
            if (note := self._seldom.note()) is not None:
                logger.warning("%s; the checkpoints are not hurt%s", error, note)

    def _load(self, entry: Entry) -> Found:
        """Raises StateError, OSError."""
        if entry.is_bad:
            raise StateError("it was not whole before")
        checkpoint, sha256, _ = read_document(self.path / document_name(entry.uid, entry.sequence))
        if sha256 != entry.document_sha256:
            raise StateError("the document is not what was written: the digest in the index differs")
        if (checkpoint.uid, checkpoint.sequence) != (entry.uid, entry.sequence):
            raise StateError(f"the document is of {checkpoint.uid} and has number {checkpoint.sequence}")
        path = self.path / tensors_name(entry.uid, entry.sequence)
        try:
            check_tensors(path, checkpoint.tensors)
        except FileNotFoundError as error:
            raise StateError(f"{path.name} is missing") from error
        return Found(checkpoint, path)

    def _mark_bad(self, entry: Entry) -> None:
        bad = entry._replace(is_bad=True)
        self._entries[entry.uid] = [bad if each is entry else each for each in self._entries[entry.uid]]
        self._change_index([bad], [])

    def _part(self, entries: list[Entry]) -> tuple[list[Entry], list[tuple[str, int]]]:
        """Those that stay, newest first, and the others; bad ones stay while they are newer than one that does."""
        whole = [entry.sequence for entry in entries if not entry.is_bad]
        oldest = whole[: self._keep][-1]
        kept = [entry for entry in entries if entry.sequence >= oldest]
        return kept, [(entry.uid, entry.sequence) for entry in entries if entry.sequence < oldest]

    def _remove_old(self, uid: str) -> None:
        """Files older than what stays, those of no checkpoint too; one that cannot go is tried again the next time."""
        numbers = self._numbers[key_of(uid)]
        oldest = self._entries[uid][-1].sequence
        for sequence in [each for each in numbers if each < oldest]:
            with contextlib.suppress(OSError):
                (self.path / document_name(uid, sequence)).unlink(missing_ok=True)
                (self.path / tensors_name(uid, sequence)).unlink(missing_ok=True)
                numbers.discard(sequence)


def _read_index(path: Path) -> tuple[StateIndex, list[Entry]]:
    """Raises StateError."""
    index = StateIndex(path)
    try:
        return index, index.entries()
    except StateError:
        index.close()
        raise


def _entry_of(checkpoint: Checkpoint, sha256: str, nbytes: int) -> Entry:
    return Entry(
        checkpoint.uid,
        checkpoint.sequence,
        checkpoint.incarnation,
        checkpoint.updates,
        checkpoint.saved_at,
        sha256,
        checkpoint.tensors.sha256,
        nbytes + checkpoint.tensors.nbytes,
    )


def _read_entry(path: Path, uid: str, sequence: int) -> Entry:
    """Of a document that the index does not know; a bad one where it cannot be read: it is state all the same."""
    try:
        checkpoint, sha256, nbytes = read_document(path)
        if (checkpoint.uid, checkpoint.sequence) == (uid, sequence):
            return _entry_of(checkpoint, sha256, nbytes)
    except (StateError, OSError) as error:
        logger.debug("%s: %s", path, error)
    return Entry(uid, sequence, "", 0, _modified_at(path), "", "", 0, is_bad=True)


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()
