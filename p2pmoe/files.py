"""How users write paths and what their editors put into text files. Knows nothing of what is in them.

The one rule of relative paths: what a node.toml names lies beside that node.toml; what a variable, a flag or Python
code names lies in the working directory. `~` is the home folder everywhere.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import BinaryIO, Final

from p2pmoe.errors import ConfigError

_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
for _, _encoding in _MARKS:
    codecs.lookup(_encoding)  # its module is imported now, not by what stands in somebody's file


def expand_home(path: str) -> str:
    """`~/node.toml` as a path. Raises ConfigError where nobody knows whose home that is, or no path can be so."""
    if "\0" in path:
        raise ConfigError(f"{path!r} is no path: it has a NUL character")
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)  # noqa: PTH111 - Path normalizes, and "" would be the working directory
    if expanded.startswith("~"):
        raise ConfigError(
            f"{path!r}: which home folder that is is not known here; write the whole path, or ./{path} for a file "
            f"of that name"
        )
    return expanded


def beside(folder: Path, path: str) -> str:
    """A path that a file of `folder` names: relative ones start there."""
    if not path or path.startswith("~") or Path(path).is_absolute():
        return path
    return str(folder / path)


def open_at_once(path: Path) -> BinaryIO:
    """A file to read. Where it is a pipe that nobody writes to, it is empty: `open` would wait for ever."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    return open(path, "rb", opener=opener)


def without_mark(content: bytes) -> bytes:
    """The UTF-8 text of a small file: editors begin it with a byte order mark, PowerShell writes it as UTF-16."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            text = content[len(mark) :]
            return text if encoding == "utf-8" else text.decode(encoding, errors="replace").encode()
    return content
