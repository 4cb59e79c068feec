"""PlainAnswer: what is recognized, and what is left to the library untouched."""

from __future__ import annotations

import io
from http.client import HTTPResponse
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.rpc.http.plain_answer import recognize
from p2pmoe.rpc.http.writing import answer_head

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 5\r\n"
    b"Date: Mon, 23 Nov 2026 22:00:00 GMT\r\n\r\n"
)


class Pieces(io.RawIOBase):
    """Gives one piece at a read, as a socket does."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._pieces:
            return 0
        piece = self._pieces.pop(0)
        count = min(len(piece), len(buffer))
        buffer[:count] = piece[:count]
        if piece[count:]:
            self._pieces.insert(0, piece[count:])
        return count


def stream(*pieces: bytes) -> io.BufferedReader:
    return io.BufferedReader(Pieces(*pieces), 1024)


def test_a_body_is_read_to_its_end_and_not_further() -> None:
    source = stream(HEAD + b"hello" + b"HTTP/1.1")
    answer = recognize(source)
    assert answer is not None
    assert (answer.status, answer.will_close, answer.length) == (200, False, 5)
    assert answer.read1(2) == b"he"
    memory = bytearray(10)
    assert answer.readinto(memory) == 3
    assert bytes(memory[:3]) == b"llo"
    assert (answer.length, answer.read1(10), answer.readinto(memory)) == (0, b"", 0)
    assert source.read1(100) == b"HTTP/1.1", "the next answer is somebody else's"


def test_a_connection_that_ends_early_leaves_its_rest_in_length() -> None:
    answer = recognize(stream(HEAD, b"he"))
    assert answer is not None
    assert answer.read1(10) == b"he"
    assert answer.read1(10) == b""
    assert answer.length == 3


def test_a_body_that_comes_later_is_waited_for() -> None:
    answer = recognize(stream(HEAD, b"hel", b"lo"))
    assert answer is not None
    assert answer.readinto(bytearray(5)) == 5


@pytest.mark.parametrize(
    "head",
    [
        b"",
        HEAD[:40],
        HEAD.replace(b"200 OK", b"201 OK"),
        HEAD.replace(b"1.1", b"1.0"),
        HEAD.replace(b"\r\n", b"\n"),
        HEAD.replace(b"application/octet-stream", b"application/json"),
        HEAD.replace(b"Length: 5", b"Length: -5"),
        HEAD.replace(b"Length: 5", b"Length: 5, 6"),
        HEAD.replace(b"Length: 5", b"Length: " + b"5" * 13),
        HEAD.replace(b"Length: 5", "Length: \u0665".encode()),
        HEAD.replace(b"\r\nDate", b"\r\nContent-Length: 6\r\nDate"),
        HEAD.replace(b"GMT\r\n", b"GMT\r\nConnection: close\r\n"),
        HEAD.replace(b"GMT\r\n", b"GMT\r\nTransfer-Encoding: chunked\r\n"),
        HEAD.replace(b"GMT", b"GMT\x00"),
        b" " + HEAD,
    ],
)
def test_every_other_head_is_the_librarys(head: bytes) -> None:
    source = stream(head + b"hello") if head else stream()
    assert recognize(source) is None
    assert source.peek(1) == (head + b"hello" if head else b""), "nothing was read"


def test_a_head_in_two_pieces_is_the_librarys() -> None:
    source = stream(HEAD[:50], HEAD[50:] + b"hello")
    assert recognize(source) is None
    assert source.read() == HEAD + b"hello"


def test_what_a_node_writes_is_recognized_unless_the_connection_ends_with_it() -> None:
    answer = recognize(stream(bytes(answer_head(5, last=False)) + b"hello"))
    assert answer is not None
    assert answer.read1(10) == b"hello"
    assert recognize(stream(bytes(answer_head(5, last=True)) + b"hello")) is None


def test_it_prints_its_state() -> None:
    assert repr(recognize(stream(HEAD))) == "<PlainAnswer: 5 bytes unread>"


@given(
    st.binary(max_size=300)
    | st.tuples(st.integers(0, len(HEAD)), st.integers(0, 4), st.binary(max_size=6)).map(
        lambda edit: HEAD[: edit[0]] + edit[2] + HEAD[edit[0] + edit[1] :]
    )
)
def test_what_is_recognized_the_library_reads_the_same_way(data: bytes) -> None:
    source = stream(data + b"hello") if data else stream()
    answer = recognize(source)
    if answer is None:
        assert source.peek(1) == (data + b"hello" if data else b"")
        return
    opened = SimpleNamespace(makefile=lambda mode: io.BytesIO(data + b"hello"))
    response = HTTPResponse(opened, method="POST")  # type: ignore[arg-type]
    response.begin()
    assert (response.status, response.length, response.will_close) == (200, answer.length, False)
    assert not response.chunked
    assert response.read1(5) == answer.read1(5)
