"""How finely a caller cuts up what it sends: reads, TLS records, lines of heads and of chunks. No I/O of its own.

Every piece costs the event loop some microseconds, whatever is in it: one connection that sends chunks of one byte
takes a caller's call from 3 to 300 ms, and no limit on bytes notices. Rules:

1. A piece is one read, one TLS record, or one line end in a head or in a chunked body (a chunk has two).
2. A connection begins with 64 pieces. Every `min_piece_bytes` that it sends and every request that it completes earn
   it more, up to 512: who sends in pieces of that size on average is never refused.
3. What it takes beyond that is its source's, `source_pieces_per_s`, eight seconds' worth at once; over it the
   request is refused, or the connection dropped.
4. What comes over TLS is read 16 KiB at a time at first, so that the first look is not too late.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

from p2pmoe.errors import BadRequestError

LINE_END: Final = b"\r\n"
FIRST_PIECES: Final = 64
MAX_PIECES: Final = 512
REQUEST_PIECES: Final = 64
"""What a complete request earns: its head may have that many fields."""
FIRST_READ_BYTES: Final = 16 * 1024
MAX_IDLE_RECORDS: Final = 4096
"""Without a byte of content: empty ones, padding, new keys again and again."""
_HEADER_BYTES: Final = 5  # type, version (2), length (2)
_TAIL_BYTES: Final = 17  # type of content, tag


class Grain:
    """What one connection may still send in small pieces.

    Args:
        min_piece_bytes: how large pieces must be on average.
        borrow: takes pieces from those of the source; False when there are none left.
    """

    __slots__ = ("_borrow", "_content", "_earned", "_pieces", "_records", "meter", "min_piece_bytes")

    def __init__(self, min_piece_bytes: int, borrow: Callable[[float], bool], meter: Meter | None = None) -> None:
        self.min_piece_bytes = min_piece_bytes
        self.meter = meter
        self._borrow = borrow
        self._pieces = float(FIRST_PIECES)
        self._earned = 1.0 / min_piece_bytes
        self._records = self._content = 0

    def __repr__(self) -> str:
        return f"<Grain: {self._pieces:.0f} pieces left>"

    def read(self, nbytes: int) -> bool:
        """A read brought that much; False when it was one too many."""
        meter = self.meter
        if meter is None or not meter.records:
            return self.take(1, nbytes)
        meter.plain += nbytes
        meter.idle = 0
        records, content = meter.records - self._records, meter.content - self._content
        self._records, self._content = meter.records, meter.content
        return self.take(records, content)

    def take(self, pieces: int, nbytes: int = 0) -> bool:
        """Pay for pieces that brought `nbytes` together."""
        left = min(MAX_PIECES, self._pieces + nbytes * self._earned - pieces)
        if left < 0.0 and not self._borrow(-left):
            self._pieces = 0.0
            return False
        self._pieces = max(left, 0.0)
        return True

    def completed(self, requests: int) -> None:
        """Heads are complete."""
        self._pieces = min(MAX_PIECES, self._pieces + requests * REQUEST_PIECES)

    def refusal(self) -> BadRequestError:
        """What to tell a caller that is over it."""
        return BadRequestError(
            f"the request comes in pieces (segments, TLS records, chunks) of less than {self.min_piece_bytes} bytes on "
            f"average; send larger ones"
        )


class Meter:
    """The TLS records of one connection, counted as they come in. Nothing is counted without TLS."""

    __slots__ = ("_header", "_left", "content", "idle", "is_tls", "plain", "records")

    def __init__(self, *, is_tls: bool = False) -> None:
        self.is_tls = is_tls
        self.records = 0
        self.content = 0
        """Bytes in them, without what each record adds."""
        self.plain = 0
        """Bytes that were of use so far."""
        self.idle = 0
        """Records since then."""
        self._left = 0  # of the record that has begun
        self._header = b""

    def __repr__(self) -> str:
        return f"<Meter: {self.records} records, {self.content} bytes>"

    def count(self, data: memoryview) -> None:
        """What was just received."""
        at, size = self._left, len(data)
        while at < size:
            header = self._header + bytes(data[at : at + _HEADER_BYTES - len(self._header)])
            at += len(header) - len(self._header)
            if len(header) < _HEADER_BYTES:
                self._header = header
                break
            self._header = b""
            length = header[3] << 8 | header[4]
            at += length
            self.records += 1
            self.idle += 1
            self.content += max(0, length - _TAIL_BYTES)
        self._left = at - size


class MeteredSocket(socket.socket):
    """A caller's socket that counts. What an event loop reads past `recv_into` is not counted, and nothing breaks."""

    meter: Meter

    @classmethod
    def of(cls, accepted: socket.socket, meter: Meter) -> MeteredSocket:
        """In the place of a socket, which is of no more use."""
        metered = cls(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        metered.setblocking(False)
        metered.meter = meter
        return metered

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        meter = self.meter
        if not meter.is_tls:
            return super().recv_into(buffer, nbytes, flags)
        if meter.idle > MAX_IDLE_RECORDS:
            raise ConnectionAbortedError("a caller sends records without content")
        count = super().recv_into(buffer, min(nbytes or len(buffer), FIRST_READ_BYTES + meter.plain), flags)
        meter.count(memoryview(buffer)[:count])
        return count
