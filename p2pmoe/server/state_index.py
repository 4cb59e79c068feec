"""The index of a folder of checkpoints: which there are, which of them are known to be bad. SQLite; can be made anew.

The files are the truth and the index is how they are found quickly: it is never asked whether a file is whole.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from p2pmoe.errors import StateError

_VERSION: Final = 1
_BUSY_S: Final = 5.0
_TABLE: Final = """
create table if not exists checkpoints (
    uid text not null, sequence integer not null, incarnation text not null, updates integer not null,
    saved_at real not null, document_sha256 text not null, tensors_sha256 text not null, nbytes integer not null,
    is_bad integer not null default 0, primary key (uid, sequence)
) without rowid
"""
_COLUMNS: Final = "uid, sequence, incarnation, updates, saved_at, document_sha256, tensors_sha256, nbytes, is_bad"


class Entry(NamedTuple):
    """One checkpoint."""

    uid: str
    sequence: int
    incarnation: str
    updates: int
    saved_at: float
    document_sha256: str
    tensors_sha256: str
    nbytes: int
    """Of both files."""
    is_bad: bool = False
    """It was found torn or tampered with."""


class StateIndex:
    """One thread at a time uses it; with `writes = False` beside a node that writes.

    Raises StateError when the file is no index (any more) or cannot be written.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        with self._translated():
            target = path.absolute().as_uri() + ("" if writes else "?mode=ro")
            self._connection = sqlite3.connect(
                target, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            if not writes:
                return
            try:
                self._connection.execute("pragma journal_mode = wal")
                self._connection.execute("pragma synchronous = normal")
                (version,) = self._connection.execute("pragma user_version").fetchone()
                if version not in (0, _VERSION):
                    raise sqlite3.DatabaseError(f"it has version {version}")  # noqa: TRY301 - translated below
                self._connection.execute(_TABLE)
                self._connection.execute(f"pragma user_version = {_VERSION}")
            except BaseException:
                self._connection.close()
                raise

    def __repr__(self) -> str:
        return f"<StateIndex {self.path}>"

    def entries(self) -> list[Entry]:
        """All of them, by uid, the newest of a uid first."""
        with self._translated():
            rows = self._connection.execute(
                f"select {_COLUMNS} from checkpoints order by uid, sequence desc"  # noqa: S608 - our own words
            ).fetchall()
        try:
            return msgspec.convert([(*row[:-1], bool(row[-1])) for row in rows], list[Entry])
        except msgspec.ValidationError as error:  # SQLite keeps a text in a column of numbers
            raise StateError(f"the index {self.path} cannot be used: {error}") from error

    def change(self, added: Iterable[Entry] = (), gone: Iterable[tuple[str, int]] = ()) -> None:
        """Add or replace some, forget others, in one step."""
        with self._translated(), self._transaction():
            self._connection.executemany(
                f"insert or replace into checkpoints ({_COLUMNS}) values (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                added,
            )
            self._connection.executemany("delete from checkpoints where uid = ? and sequence = ?", gone)

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    # -- private

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("begin immediate")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:  # a full disk has ended it already
                self._connection.execute("rollback")
            raise
        self._connection.execute("commit")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StateError(f"the index {self.path} cannot be used: {error}") from error
