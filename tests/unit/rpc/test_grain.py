"""Small pieces: who sends in sensible ones is never refused, and what the others may cost is counted."""

from __future__ import annotations

import socket

import pytest

from p2pmoe.rpc.http.grain import (
    FIRST_PIECES,
    FIRST_READ_BYTES,
    MAX_IDLE_RECORDS,
    MAX_PIECES,
    Grain,
    Meter,
    MeteredSocket,
)


class Source:
    """What a source has left."""

    def __init__(self, pieces: float = 0.0) -> None:
        self.pieces = pieces

    def borrow(self, pieces: float) -> bool:
        if pieces > self.pieces:
            return False
        self.pieces -= pieces
        return True


def test_pieces_of_the_wanted_size_go_on_for_ever() -> None:
    grain = Grain(64, Source().borrow)
    assert all(grain.read(64) for _ in range(10_000))
    assert all(grain.take(2, 128) for _ in range(10_000))  # chunks of 124 bytes


def test_single_bytes_end_when_the_connections_pieces_and_its_sources_are_used_up() -> None:
    source = Source(100.0)
    grain = Grain(64, source.borrow)
    count = 0
    while grain.read(1):
        count += 1
    assert FIRST_PIECES + 100 <= count <= FIRST_PIECES + 103
    assert source.pieces < 1.0
    assert not grain.read(1)
    assert "less than 64 bytes on average" in str(grain.refusal())


def test_what_is_saved_up_is_bounded() -> None:
    grain = Grain(64, Source().borrow)
    grain.take(0, 10**9)
    grain.completed(1000)
    count = 0
    while grain.take(1):
        count += 1
    assert count == MAX_PIECES


def test_a_complete_request_earns_what_its_head_took() -> None:
    grain = Grain(64, Source().borrow)
    for _ in range(1000):
        assert grain.read(300)
        assert grain.take(20)
        grain.completed(1)


def record(content: int) -> bytes:
    """A TLS record as it lies on the wire."""
    return b"\x17\x03\x03" + (content + 17).to_bytes(2, "big") + bytes(content + 17)


def test_records_of_one_byte_are_counted_on_the_wire() -> None:
    meter = Meter(is_tls=True)
    grain = Grain(64, Source(1000.0).borrow, meter)
    records = 0
    while records < 10_000:
        meter.count(memoryview(record(1) * 50))
        if not grain.read(50):
            break
        records += 50
    assert FIRST_PIECES + 900 <= records <= FIRST_PIECES + 1050


def test_full_records_cost_nothing_however_late_they_are_opened() -> None:
    meter = Meter(is_tls=True)
    grain = Grain(64, Source().borrow, meter)
    data = memoryview(record(16384) * 16)
    for _ in range(1000):
        meter.count(data)
        assert grain.read(1)  # the rest is opened later
    assert meter.records == 16_000
    assert meter.content == 16_000 * 16384


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 22, 1000])
def test_records_are_counted_wherever_reads_cut_them(size: int) -> None:
    data = b"".join(record(content) for content in (0, 1, 5, 300, 16384, 2))
    meter = Meter(is_tls=True)
    for start in range(0, len(data), size):
        meter.count(memoryview(data[start : start + size]))
    assert (meter.records, meter.content) == (6, 0 + 1 + 5 + 300 + 16384 + 2)


@pytest.fixture
def pair() -> tuple[socket.socket, MeteredSocket, Meter]:
    ours, theirs = socket.socketpair()
    meter = Meter(is_tls=True)
    metered = MeteredSocket.of(ours, meter)
    yield theirs, metered, meter  # type: ignore[misc]
    theirs.close()
    metered.close()


def test_the_first_read_over_tls_is_short_and_the_next_as_long_as_it_was_of_use(
    pair: tuple[socket.socket, MeteredSocket, Meter],
) -> None:
    theirs, ours, meter = pair
    theirs.sendall(record(1000) * 80)
    buffer = bytearray(256 * 1024)
    assert ours.recv_into(buffer) == FIRST_READ_BYTES
    meter.plain += 10_000
    assert 0 < ours.recv_into(buffer, 0) <= FIRST_READ_BYTES + 10_000
    assert ours.recv_into(memoryview(buffer)[:10]) == 10
    assert meter.records > 16
    counted, meter.is_tls = meter.records, False
    assert ours.recv_into(buffer) > 0
    assert meter.records == counted


def test_records_without_content_end_a_connection(pair: tuple[socket.socket, MeteredSocket, Meter]) -> None:
    theirs, ours, meter = pair
    meter.idle = MAX_IDLE_RECORDS
    theirs.sendall(record(0) * 2)
    assert ours.recv_into(bytearray(22)) == 22
    with pytest.raises(ConnectionAbortedError, match="records without content"):
        ours.recv_into(bytearray(1))
    Grain(64, Source(9e9).borrow, meter).read(1)
    assert meter.idle == 0
    assert ours.recv_into(bytearray(1)) == 1
