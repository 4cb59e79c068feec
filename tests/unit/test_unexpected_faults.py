"""Exceptions that nobody foresaw: one typed error, one traceback in the log, and whatever else ran goes on."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from p2pmoe import faults
from p2pmoe.errors import LocalError, PeerUnreachableError, UnexpectedError
from p2pmoe.faults import attempt, own, run_loop, unexpected, watch

WAIT_S = 5.0


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[tuple[str, type[BaseException]]]:
    return [(each.getMessage(), each.exc_info[0]) for each in caplog.records if each.exc_info and each.exc_info[0]]


def test_the_error_names_the_cause_and_the_log_has_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    cause = KeyError("colour")
    fault = unexpected("looking at an answer of ffn.3", cause)
    assert isinstance(fault, UnexpectedError)
    assert isinstance(fault, LocalError)
    assert str(fault) == (
        "looking at an answer of ffn.3 failed unexpectedly: KeyError: 'colour'; the log has its traceback"
    )
    assert fault.__cause__ is cause
    assert tracebacks(caplog) == [("looking at an answer of ffn.3 failed unexpectedly", KeyError)]


def test_nothing_that_an_exception_or_the_log_does_makes_telling_fail(caplog: pytest.LogCaptureFixture) -> None:
    assert "failed unexpectedly: MuteError;" in str(unexpected("this", MuteError()))

    def refuse(record: logging.LogRecord) -> bool:
        raise OSError("the log is full")

    faults.log.addFilter(refuse)
    try:
        assert "ValueError: x" in str(unexpected("that", ValueError("x\ny")))
    finally:
        faults.log.removeFilter(refuse)


def test_a_stranger_does_not_fill_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_told_at", {})
    for _ in range(50):
        unexpected("a datagram", ValueError(), by_a_stranger=True)
        unexpected("another place", ValueError(), by_a_stranger=True)
    assert len(caplog.records) == 2


def test_one_of_several_that_raises_is_told_and_the_others_run(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    for number in range(3):
        attempt("a step", lambda number=number: done.append(number if number != 1 else 1 // 0))
    assert done == [0, 2]
    assert tracebacks(caplog) == [("a step failed unexpectedly", ZeroDivisionError)]


async def test_a_task_that_nobody_awaits_is_told_of_when_it_fails_but_not_when_it_was_foreseen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(error: Exception) -> None:
        raise error

    owned: set[asyncio.Task[None]] = set()
    own(fail(TypeError("x")), owned, "a repair")
    own(fail(PeerUnreachableError("x")), owned, "another repair")
    cancelled = asyncio.get_running_loop().create_task(asyncio.sleep(WAIT_S))
    watch(cancelled, "a third")
    cancelled.cancel()
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*owned, cancelled, return_exceptions=True)
    await asyncio.sleep(0)
    assert not owned
    assert tracebacks(caplog) == [("a repair failed unexpectedly", TypeError)]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_the_thread_of_a_loop_outlives_what_asyncio_lets_through(
    error: BaseException, caplog: pytest.LogCaptureFixture, no_new_threads: None
) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=run_loop, args=(loop,), daemon=True)
    thread.start()

    def fail() -> None:
        raise error

    alive = threading.Event()
    loop.call_soon_threadsafe(fail)
    loop.call_soon_threadsafe(alive.set)
    assert alive.wait(WAIT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    loop.close()
    assert tracebacks(caplog) == [("a callback of an event loop failed unexpectedly", type(error))]
