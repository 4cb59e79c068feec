"""Requests under way, on a clock made of numbers: retransmission, lateness, stalls, and replies that are none."""

from __future__ import annotations

import pytest

from p2pmoe.dht.calls import Call, CallBook, Delay
from p2pmoe.dht.timing import MAX_RTO_S, MIN_RTO_S, RoundTrip
from p2pmoe.protocol.datagrams import Find, Ping, Pong, Stored

ALICE, BOB = ("192.0.2.1", 1), ("192.0.2.2", 2)


def ping(number: int = 0, address=ALICE) -> Call:
    request = Ping(bytes([number]) * 8, b"")
    return Call(request, b"datagram", address, None, lambda reply: None)


def pong(number: int = 0) -> Pong:
    return Pong(bytes([number]) * 8, bytes(20), b"", b"", 0)


def started(book: CallBook, *calls: Call, now: float = 0.0) -> list[Call]:
    for call in calls:
        assert book.add(call)
    return list(book.startable(now))


def test_a_call_is_slow_then_sent_again_then_late_then_failed():
    book = CallBook()
    call = ping()
    started(book, call)
    seen = []
    for _ in range(20):
        at = book.next_due
        if at is None:
            break
        due = book.due(at)
        seen += [(round(at, 3), "again") for _ in due.resend]
        seen += [(round(at, 3), each.delay.name) for each in due.delayed]
        seen += [(round(at, 3), "failed") for _ in due.failed]
    # RTO 0.25 before anything was measured: again after 0.25 and 0.25 + 0.5, given up 1.0 after that.
    assert seen == [(0.125, "SLOW"), (0.25, "again"), (0.3, "LATE"), (0.75, "again"), (1.75, "failed")]
    assert call.transmissions == 3
    assert len(book) == 0


def test_a_reply_ends_it_and_is_measured_once():
    book = CallBook()
    call = ping()
    started(book, call)
    assert book.replied(pong(), ALICE, 0.08) is call
    assert book.replied(pong(), ALICE, 0.09) is None
    assert book.round_trip_s(ALICE) == pytest.approx(0.08)
    assert book.next_due is None
    assert not book.due(10).failed


@pytest.mark.parametrize(
    ("reply", "address"),
    [(pong(1), ALICE), (pong(0), BOB), (Stored(bytes(8), bytes(20), b"", b""), ALICE)],
    ids=["wrong id", "wrong address", "wrong kind"],
)
def test_replies_are_bound_to_id_address_and_kind(reply, address):
    book = CallBook()
    started(book, ping(0))
    assert book.replied(reply, address, 0.01) is None
    assert len(book) == 1


def test_a_reply_after_a_retransmission_is_taken_but_not_measured():
    book = CallBook()
    call = ping()
    started(book, call)
    book.due(0.25)
    book.due(0.25)
    assert call.transmissions == 2
    assert book.replied(pong(), ALICE, 0.26) is call
    assert book.round_trip_s(ALICE) is None


def test_time_starts_when_a_call_is_sent_not_while_it_waits():
    book = CallBook(max_in_flight=2)
    calls = [ping(number) for number in range(3)]
    assert started(book, *calls) == calls[:2]
    book.replied(pong(0), ALICE, 100.0)
    assert list(book.startable(100.0)) == [calls[2]]
    assert calls[2].sent_at == 100.0


def test_a_late_call_gives_its_place_to_one_that_waits():
    book = CallBook(max_in_flight=1)
    first, second = ping(0), ping(1)
    started(book, first, second)
    for at in (0.125, 0.25, 0.3):
        book.due(at)
    assert first.delay is Delay.LATE
    assert list(book.startable(0.3)) == [second]


def test_a_stall_of_ours_makes_nobody_late():
    book = CallBook()
    call = ping()
    started(book, call)
    book.postpone(0.5)
    due = book.due(0.5)
    assert not (due.resend or due.delayed or due.failed)
    assert book.next_due == pytest.approx(0.625)


def test_cancelling_forgets_the_call_and_frees_its_place():
    book = CallBook(max_in_flight=1)
    first, second = ping(0), ping(1)
    started(book, first, second)
    book.cancel(first)
    book.cancel(first)
    assert list(book.startable(0)) == [second]
    assert book.replied(pong(0), ALICE, 0.1) is None
    assert book.cancel_all() == [second]
    assert len(book) == 0


def test_the_queue_is_bounded(monkeypatch):
    monkeypatch.setattr("p2pmoe.dht.calls.MAX_QUEUED", 3)
    book = CallBook(max_in_flight=1)
    assert [book.add(ping(number)) for number in range(4)] == [True, True, True, False]


def test_the_timeout_follows_the_round_trips_within_its_bounds():
    measured = RoundTrip()
    assert measured.rto_s == 0.25
    for _ in range(50):
        measured.sample(0.08)
    assert measured.rto_s == MIN_RTO_S
    assert 0.08 < measured.slow_s < 0.1
    for _ in range(50):
        measured.sample(3.0)
    assert measured.rto_s == measured.slow_s == MAX_RTO_S


def test_kinds_of_requests_have_kinds_of_replies():
    book = CallBook()
    call = Call(Find(bytes(8), b"", b"", bytes(20), 8), b"", ALICE, None, lambda reply: None)
    started(book, call)
    assert book.replied(pong(0), ALICE, 0.1) is None
