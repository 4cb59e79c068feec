r"""Standard streams that take any text, in any encoding, and that nobody need read. Knows nothing of what is said.

An encoding that lacks a character gets the nearest ASCII one (`→` becomes `>`), or its number (`\\u4e2d`). Tables and
boxes need no more than that: rich draws them in ASCII wherever the encoding is no UTF.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import IO, Final

LEGIBLE: Final = "p2pmoe-legible"
"""The error handler of our streams, for `str.encode` and `open`."""
_LOOK_ALIKES: Final = {
    # One character where tables count cells.
    **dict.fromkeys("→▶►❯", ">"),
    **dict.fromkeys("←◀◄", "<"),
    **dict.fromkeys("–—−‐‑─━═╴╸╺", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰┏┓┗┛╔╗╚╝", "+"),
    **dict.fromkeys("×", "x"),
    **dict.fromkeys("•·●", "*"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”„", '"'),
    "\N{NO-BREAK SPACE}": " ",
    "\N{REPLACEMENT CHARACTER}": "?",
    "…": "...",
}


def prepare_streams() -> None:
    """Call first: every standard stream is there, and writing to it never fails for the encoding's sake."""
    _reopen_descriptors()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Closed by whoever started us (`>&-`), or a process without a console.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - lives as long as we
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=LEGIBLE)


def finish_streams() -> bool:
    """Flush what was written; False where nobody takes it, and then nothing complains again at exit."""
    return all(_flush(stream) for stream in (sys.stdout, sys.stderr))


def complain(line: str) -> None:
    """One line on standard error. Never raises: there is nobody left to tell."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        _silence(sys.stderr)


def legible(text: str) -> str:
    r"""One line without control characters, lone surrogates and the like: they become `\x1b`, `\udcff`."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in " ".join(text.split())
    )


def text_of(error: BaseException) -> str:
    """What an exception says; one whose own text cannot be made says so."""
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001 - the exception's class may be anybody's
        return f"(no text: its __str__ raised {type(broken).__name__})"


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_LOOK_ALIKES.get(each) or _number(each) for each in missing), error.end


def _number(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode("ascii")


def _reopen_descriptors() -> None:
    """Of the first three descriptors none is free: the next socket would get it, and the words meant for it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)
                if opened != number:
                    os.close(opened)


def _flush(stream: IO[str]) -> bool:
    try:
        stream.flush()
    except (OSError, ValueError):
        _silence(stream)
        return False
    return True


def _silence(stream: IO[str]) -> None:
    """What is still in its buffer goes nowhere, for the interpreter flushes it once more."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
        stream.flush()


codecs.register_error(LEGIBLE, _replace)
