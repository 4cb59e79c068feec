"""One connection of a thread that blocks: requests out, answers in, everything before a deadline. Knows no frames."""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import time
from collections.abc import Iterable
from http.client import BadStatusLine, HTTPResponse
from typing import Any, Final, cast

from p2pmoe.protocol.frames import Buffer
from p2pmoe.rpc.deadline import Deadline
from p2pmoe.rpc.http.plain_answer import PlainAnswer, recognize

Answer = HTTPResponse | PlainAnswer

BUFFER_BYTES: Final = 64 * 1024
"""What is read at once."""
_TIMEOUT_AGE_S: Final = 0.05  # after which it is set anew
_QUIET_S: Final = 0.5  # a connection that was used just now is not looked at before it is used again


class Link:
    """A connection, and the deadline of the exchange that uses it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline = Deadline(0.0)
        self.used_at = 0.0
        self.ended = False
        """The other side sends no more."""

    def __repr__(self) -> str:
        return f"<Link {self.sock!r}>"

    def send(self, data: Any) -> None:
        """All of it."""
        view, sock = memoryview(data), self.sock
        while view:
            sock.settimeout(self.deadline.left_s())
            view = view[sock.send(view) :]

    def ask(self, parts: Iterable[Buffer], deadline: Deadline) -> Answer:
        """Send a request; the answer, its head read. Raises OSError, TimeoutError, HTTPException."""
        self.deadline, self.ended = deadline, False
        with contextlib.suppress(ConnectionError):  # a refusal may have come before the end of the request
            for part in parts:
                self.send(part)
        stream: io.BufferedReader = io.BufferedReader(_Receiver(self), BUFFER_BYTES)
        if (plain := recognize(stream)) is not None:
            return plain
        response = HTTPResponse(cast("socket.socket", _Opened(stream)), method="POST")
        response.begin()
        # The library takes the end of the connection for that of the head, and a bad length for none.
        unframed = response.length is None and not response.chunked
        if self.ended or (unframed and "Content-Length" in response.headers):
            raise BadStatusLine("the answer's head is malformed")
        return response

    def is_usable(self) -> bool:
        """Whether an idle connection is open, and nothing came that nobody asked for."""
        if time.monotonic() - self.used_at < _QUIET_S:
            return True
        try:
            self.sock.settimeout(0.0)
            socket.socket.recv(self.sock, 1, socket.MSG_PEEK)  # below TLS
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def shut_down(self) -> None:
        """Wake the thread that uses it."""
        try:
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # below TLS
        except OSError:  # the other side was quicker
            pass


class _Opened:
    """What `http.client` takes for a socket, to read an answer from a stream that was begun already."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return self._stream


class _Receiver(io.RawIOBase):
    """The receiving end of a link, with its deadline."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        sock = self._link.sock
        sock.settimeout(self._link.deadline.left_s())
        if isinstance(sock, ssl.SSLSocket) and len(buffer) > BUFFER_BYTES:  # a tensor's memory; it will all come
            count = _read_records(sock, memoryview(buffer))
        else:
            count = sock.recv_into(buffer, len(buffer))  # over TLS the size is dear to find out
        if not count:
            self._link.ended = True
        return count


def _read_records(sock: ssl.SSLSocket, view: memoryview) -> int:
    """Read one TLS record after the other, as long as the timeout that was set is about what is left."""
    read: Any = sock.read  # its type does not know that it fills a memoryview too
    count, size, until = 0, len(view), time.monotonic() + _TIMEOUT_AGE_S
    while count < size and (received := read(size - count, view[count:])):
        count += received
        if time.monotonic() > until:
            break
    return count
