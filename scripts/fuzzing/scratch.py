"""The input being run, in a file that outlives the process that runs it."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 4 * 1024 * 1024
_HEAD: Final = struct.Struct("<QQ")


class LastInput:
    """Shared memory: a count of inputs, and the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _HEAD.size + MAX_BYTES)

    @classmethod
    def create(cls, path: Path) -> LastInput:
        with path.open("wb") as file:
            file.truncate(_HEAD.size + MAX_BYTES)
        return cls(path)

    def __repr__(self) -> str:
        return f"<LastInput: number {self.count}>"

    def note(self, data: bytes) -> None:
        """Write an input down before it is run."""
        data = data[:MAX_BYTES]
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        self._memory[: _HEAD.size] = _HEAD.pack(self.count + 1, len(data))

    def read(self) -> bytes:
        _, size = _HEAD.unpack_from(self._memory)
        return self._memory[_HEAD.size : _HEAD.size + size]

    @property
    def count(self) -> int:
        return int(_HEAD.unpack_from(self._memory)[0])

    def close(self) -> None:
        self._memory.close()
