"""How requests and answers are written by hand: their heads, small buffers joined, large tensor memory as it lies."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from email.utils import formatdate
from functools import lru_cache
from itertools import chain
from typing import Any, Final

from yarl import URL

from p2pmoe.protocol.frames import Buffer, EncodedFrame

JOIN_BYTES: Final = 64 * 1024
"""Below this one joined write beats several system calls."""
_SLICE_BYTES: Final = 512 * 1024  # asyncio copies what the socket does not take of one write; so little of it at a time


def body_of(frames: Sequence[EncodedFrame]) -> Iterable[Buffer]:
    """The buffers of all frames, in order."""
    return chain.from_iterable(frame.buffers for frame in frames)


def joined(
    buffers: Iterable[Buffer], begin: bytearray | None = None, *, slice_bytes: int | None = _SLICE_BYTES
) -> Iterable[Buffer]:
    """What to write, in order: small buffers joined after `begin`, large tensor memory as it lies, in slices."""
    together = begin or bytearray()
    for buffer in buffers:
        if len(buffer) <= JOIN_BYTES:
            together += buffer
            if len(together) < JOIN_BYTES:
                continue
        if together:
            yield bytes(together)
            together = bytearray()
        if len(buffer) > JOIN_BYTES:
            step = slice_bytes or len(buffer)
            for start in range(0, len(buffer), step):
                yield memoryview(buffer)[start : start + step]
    if together:
        yield bytes(together)


def post_head(url: URL, headers: Iterable[tuple[str, str]]) -> bytes:
    """The head of a POST up to what differs from one to the next; header values are ASCII without line ends."""
    lines = [f"POST {url.raw_path_qs} HTTP/1.1", f"Host: {url.raw_authority}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n").encode("ascii")


def with_length(head: bytes, nbytes: int, authorization: str | None) -> bytearray:
    """The whole head of a POST with a body of `nbytes`; `authorization` is printable ASCII."""
    whole = bytearray(b"%bContent-Length: %d\r\n" % (head, nbytes))
    if authorization is not None:
        whole += b"Authorization: %b\r\n" % authorization.encode("ascii")
    return whole + b"\r\n"


def answer_head(nbytes: int, *, last: bool) -> bytearray:
    """The head of an answer with a body of frames; `last` when the connection ends with it. See `plain_answer.py`."""
    return bytearray(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\nDate: %b\r\n%b\r\n"
        % (nbytes, _date(int(time.time())), b"Connection: close\r\n" if last else b"")
    )


@lru_cache(maxsize=1)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode("ascii")


async def write_frames(frames: Sequence[EncodedFrame], write: Callable[..., Awaitable[Any]]) -> None:
    """Small frames in one joined write, large tensor memory as it lies."""
    for part in joined(body_of(frames)):
        await write(part)
