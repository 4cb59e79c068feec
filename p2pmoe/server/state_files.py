"""Files that appear whole or not at all, and what is in them. Knows names and bytes; nothing of experts."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from p2pmoe.errors import StateError
from p2pmoe.server.checkpoints import MAX_DOCUMENT_BYTES, Checkpoint, TensorFile, decode_checkpoint

CHUNK_BYTES: Final = 1 << 20
UNFINISHED: Final = ".part"


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> TensorFile:
    """Write a file beside it, have it on the disk, give it its name; its size and digest. Raises OSError."""
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    digest = hashlib.sha256()
    nbytes = 0
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                nbytes += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - Path.replace is the same; the pair reads better
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return TensorFile(nbytes, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk, where the system has a way to say so."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems know no such thing
        pass
    finally:
        os.close(descriptor)


def read_chunks(path: Path, limit: int) -> Iterator[bytes]:
    """The file up to `limit` bytes and one chunk. Raises OSError."""
    with path.open("rb") as file:
        while limit > 0 and (chunk := file.read(CHUNK_BYTES)):
            limit -= len(chunk)
            yield chunk


def read_document(path: Path) -> tuple[Checkpoint, str, int]:
    """A document, its digest as a file, and its size. Raises StateError, OSError."""
    with path.open("rb") as file:
        content = file.read(MAX_DOCUMENT_BYTES + 1)
    return decode_checkpoint(content), hashlib.sha256(content).hexdigest(), len(content)


def check_tensors(path: Path, expected: TensorFile) -> None:
    """That a file is the one that a document names. Raises StateError, OSError."""
    size = path.stat().st_size
    if size != expected.nbytes:
        raise StateError(f"{path.name} has {size} bytes instead of {expected.nbytes}")
    digest = hashlib.sha256()
    for chunk in read_chunks(path, expected.nbytes):
        digest.update(chunk)
    if digest.hexdigest() != expected.sha256:
        raise StateError(f"the content of {path.name} is not what was written: the digest differs")
