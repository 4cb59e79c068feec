"""ServerExchange: the answering side without a network; a fake service answers when the test says so."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from frame_kit import BAD_HEADERS, call_bytes

from p2pmoe import faults
from p2pmoe.errors import BadRequestError, DecodeError, OverloadedError, TooLargeError
from p2pmoe.protocol import frames
from p2pmoe.protocol.frames import EncodedFrame, Frame, FrameLimits, FrameReader, FrameReceived, FrameRefused
from p2pmoe.protocol.messages import RequestHeader, RequestParameters, response_decoder
from p2pmoe.rpc.exchange import ByteBudget, ServerExchange
from p2pmoe.types import WIRE_VERSION, Caller

Flat = tuple[torch.Tensor, ...]
X = torch.ones(1, 2)


class FakeService:
    """Remembers calls; `futures[id]` is answered by the test."""

    def __init__(self) -> None:
        self.admitted: list[str] = []
        self.frames: dict[str, Frame[RequestHeader]] = {}
        self.futures: dict[str, asyncio.Future[Flat]] = {}
        self.flushes = 0
        self.draining = False
        self.codecs: tuple[str, ...] = ("raw",)

    def admit(self, header: RequestHeader, caller: Caller) -> None:
        if header.id.startswith("refuse"):
            raise OverloadedError("not now")
        self.admitted.append(header.id)

    def submit(self, frame: Frame[RequestHeader], caller: Caller) -> asyncio.Future[Flat]:
        if frame.header.id.startswith("full"):
            raise OverloadedError("the queue is full")
        self.frames[frame.header.id] = frame
        future = self.futures[frame.header.id] = asyncio.get_running_loop().create_future()
        return future

    def result_codecs(self, header: RequestHeader) -> tuple[str, ...]:
        return self.codecs

    def count_wire(self, *_: Any) -> None:
        pass

    def flush(self) -> None:
        self.flushes += 1

    def experts(self, after: str, limit: int) -> dict[str, Any]:
        return {}

    def expert(self, uid: str) -> dict[str, Any]:
        return {}

    def serves(self, uid: str) -> bool:
        return True

    async def ready(self) -> bool:
        return True


NO_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000000000000 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


class Play:
    def __init__(self, *, max_calls: int = 8, budget_bytes: int = 1000) -> None:
        self.service = FakeService()
        self.budget = ByteBudget(budget_bytes)
        self.wakes = 0
        limits = FrameLimits(2048, 4096, 4, 4)
        self.exchange = ServerExchange(self.service, limits, self.budget, max_calls=max_calls, wake=self.wake)

    def wake(self) -> None:
        self.wakes += 1

    async def answer(self, *call_ids: str, value: float = 2.0) -> None:
        for call_id in call_ids:
            self.service.futures[call_id].set_result((torch.full((1, 2), value),))
        await asyncio.sleep(0)

    def results(self) -> list[tuple[str, int]]:
        return [(frame.header.id, frame.header.code) for frame in decode(self.exchange.take_results())]


def decode(results: Iterable[EncodedFrame]) -> list[Frame[Any]]:
    reader = FrameReader(response_decoder, FrameLimits())
    frames = []
    for result in results:
        reader.feed(b"".join(result.buffers))
        while (event := reader.next_event()) is not None:
            assert not isinstance(event, FrameRefused), event
            if isinstance(event, FrameReceived):
                frames.append(event.frame)
    reader.feed_eof()
    return frames


def call(call_id: str, *tensors: torch.Tensor, **parameters: Any) -> bytes:
    return call_bytes(*(tensors or (X,)), id=call_id, model_name="ffn.0", parameters=RequestParameters(**parameters))


async def test_results_come_in_completion_order_while_the_request_still_arrives() -> None:
    play = Play()
    data = call("slow") + call("fast")
    play.exchange.feed(data + call("later")[:20])
    await play.answer("fast")
    assert play.results() == [("fast", 200)]
    assert play.results() == [], "each once"
    assert play.exchange.outstanding == 1
    play.exchange.feed(call("later")[20:])
    play.exchange.feed_eof()
    await play.answer("later", "slow")
    assert play.results() == [("later", 200), ("slow", 200)]
    assert play.exchange.outstanding == 0
    assert play.wakes == 3
    assert play.service.flushes == 2
    assert not play.exchange.broken


async def test_a_bad_call_beside_good_ones_is_answered_by_itself() -> None:
    play = Play(max_calls=100)
    for bad in BAD_HEADERS.values():
        play.exchange.feed(bad)
    play.exchange.feed(call("refused by header".replace("refused", "refuse")) + call("full") + call("good"))
    play.exchange.feed_eof()
    await play.answer("good")
    codes = [code for _, code in play.results()]
    assert len(codes) == len(BAD_HEADERS) + 3
    assert set(codes[: len(BAD_HEADERS)]) <= {400, 413}
    assert codes[-3:] == [429, 429, 200]
    assert list(play.service.futures) == ["good"]
    assert not play.exchange.broken
    assert play.budget.held == 0


async def test_a_refused_call_is_never_received() -> None:
    play = Play()
    large = call("refuse", torch.ones(256, 2))
    play.exchange.feed(large[:200])
    assert play.results() == [("refuse", 429)], "before its body has arrived"
    play.exchange.feed(large[200:] + call("good"))
    assert list(play.service.frames) == ["good"]


@pytest.mark.parametrize("version", [0, WIRE_VERSION + 1, -1])
async def test_another_wire_version_is_426_with_both(version: int) -> None:
    play = Play()
    play.exchange.feed(call("old", wire_version=version) + call("same", wire_version=WIRE_VERSION))
    (frame,) = decode(play.exchange.take_results())
    assert (frame.header.id, frame.header.code) == ("old", 426)
    assert str(version) in frame.header.message
    assert f"version {WIRE_VERSION}" in frame.header.message
    assert list(play.service.frames) == ["same"]


async def test_garbage_after_good_calls_breaks_off_and_the_good_ones_are_answered() -> None:
    play = Play()
    play.exchange.feed(call("good") + b"\xff" * 64)
    assert play.exchange.broken
    await play.answer("good")
    assert play.results() == [("", 413), ("good", 200)]


async def test_a_truncated_call_is_named_and_its_bytes_are_given_back() -> None:
    play = Play()
    play.exchange.feed(call("good") + call("cut", torch.ones(8, 2))[:-1])
    assert play.budget.held == 8 + 64
    play.exchange.feed_eof()
    assert play.exchange.broken
    assert play.results() == [("cut", 400)]
    await play.answer("good")
    assert play.results() == [("good", 200)]
    assert play.budget.held == 0


@pytest.mark.parametrize("error", [BadRequestError("too slow"), TooLargeError("too much"), DecodeError("what")])
async def test_breaking_off_names_the_call_being_received(error: Any) -> None:
    play = Play()
    play.exchange.feed(call("half")[:-4])
    play.exchange.break_off(error)
    assert play.results() == [("half", error.code)]
    play.exchange.close()
    assert play.budget.held == 0


async def test_too_many_calls_break_off() -> None:
    play = Play(max_calls=2)
    play.exchange.feed(call("a") + call("b") + call("c") + call("d"))
    assert play.exchange.broken
    await play.answer("a", "b")
    assert sorted(play.results()) == [("", 413), ("a", 200), ("b", 200)]


async def test_refused_and_malformed_calls_count_as_calls() -> None:
    play = Play(max_calls=2)
    play.exchange.feed(call("refuse") + BAD_HEADERS["no json"] + call("c"))
    assert play.exchange.broken
    assert not play.service.frames


async def test_duplicate_ids_are_two_calls() -> None:
    play = Play()
    play.exchange.feed(call("a"))
    first = play.service.futures["a"]
    play.exchange.feed(call("a"))
    first.set_result((X,))
    await play.answer("a")
    assert play.results() == [("a", 200), ("a", 200)]


async def test_bytes_in_flight_are_bounded_over_all_exchanges() -> None:
    play = Play(budget_bytes=100)
    play.exchange.feed(call("a", torch.ones(10, 2)))
    other = ServerExchange(play.service, FrameLimits(), play.budget, max_calls=8, wake=play.wake)
    other.feed(call("b", torch.ones(10, 2)))
    (frame,) = decode(other.take_results())
    assert (frame.header.id, frame.header.code) == ("b", 429)
    await play.answer("a")
    other.feed(call("c", torch.ones(10, 2)))
    assert "c" in play.service.frames
    assert play.budget.held == 80
    assert "80 of 100" in repr(play.budget)


async def test_a_call_larger_than_the_whole_budget_goes_alone() -> None:
    play = Play(budget_bytes=10)
    play.exchange.feed(call("a", torch.ones(10, 2)) + call("b"))
    assert play.results() == [("b", 429)]
    await play.answer("a")
    assert play.results() == [("a", 200)]


async def test_closing_cancels_what_runs_gives_bytes_back_and_wakes_nobody() -> None:
    play = Play()
    play.exchange.feed(call("a") + call("b")[:-3])
    play.exchange.close()
    play.exchange.close()
    await asyncio.sleep(0)
    assert play.service.futures["a"].cancelled()
    assert play.budget.held == 0
    assert play.wakes == 0, "nobody is there to write results to"
    assert play.results() == []


async def test_an_exception_of_the_service_is_500_of_its_call_only() -> None:
    play = Play()
    play.exchange.feed(call("a") + call("b"))
    play.service.futures["a"].set_exception(ZeroDivisionError("x"))
    await play.answer("b")
    assert play.results() == [("a", 500), ("b", 200)]


@pytest.mark.parametrize("error", NO_MEMORY)
async def test_memory_refused_for_a_call_is_503_of_that_call_only(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While its tensors are made, while it waits, while it is computed, while its result is written."""
    large = torch.ones(4, 2)

    class ScarceSink(frames.TensorSink):
        def __init__(self, headers: Any, sizes: Any) -> None:
            if headers and headers[0].shape == (4, 2):
                raise error
            super().__init__(headers, sizes)

    monkeypatch.setattr(frames, "TensorSink", ScarceSink)
    play = Play()
    data = call("a") + call("large", large) + call("b") + call("c")
    for start in range(0, len(data), 7):
        play.exchange.feed(data[start : start + 7])
    play.exchange.feed_eof()
    assert not play.exchange.broken
    assert play.results() == [("large", 503)]
    assert play.budget.held == 3 * X.nbytes
    play.service.futures["a"].set_exception(error)
    await asyncio.sleep(0)
    assert play.results() == [("a", 503)]

    def refuse(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("p2pmoe.rpc.exchange.describe_tensors", refuse)
        await play.answer("b")
    await play.answer("c")
    assert play.results() == [("b", 503), ("c", 200)]
    assert play.budget.held == 0
    assert caplog.records == []


async def test_another_error_of_the_receiver_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(frames, "TensorSink", fail)
    with pytest.raises(RuntimeError, match="something else"):
        Play().exchange.feed(call("a"))


async def test_a_result_that_cannot_be_encoded_is_500_of_its_call_only() -> None:
    play = Play()
    play.exchange.feed(call("a") + call("b"))
    play.service.futures["a"].set_result((torch.ones(1, dtype=torch.complex64),))
    await play.answer("b")
    assert play.results() == [("a", 500), ("b", 200)]
    assert play.wakes == 2


async def test_results_travel_in_the_codecs_of_the_schema() -> None:
    play = Play()
    play.service.codecs = ("bf16",)
    play.exchange.feed(call("a"))
    await play.answer("a", value=1.001)
    (frame,) = decode(play.exchange.take_results())
    assert frame.header.outputs[0].parameters.codec == "bf16"
    assert frame.tensors[0].dtype is torch.float32
    assert frame.tensors[0][0, 0] == 1.0


def test_it_prints_its_state() -> None:
    assert "0 calls, 0 running, 0 results" in repr(Play().exchange)


# ------------------------------------------------------------------------------------- what nobody foresaw


@pytest.mark.parametrize("where", ["admit", "submit", "count_wire", "result_codecs", "future"])
async def test_what_nobody_foresaw_is_an_error_of_its_own_call(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Never a call without an answer, and the neighbours have theirs."""
    monkeypatch.setattr(faults, "_told_at", {})
    play = Play()
    real = getattr(play.service, where, None)

    def fail(*arguments: Any) -> Any:
        if getattr(arguments[0], "header", arguments[0]).id == "b":
            raise AttributeError("nobody foresaw it")
        return real(*arguments)

    if where == "count_wire":
        play.service.count_wire = lambda *_: 1 / 0
    elif where != "future":
        setattr(play.service, where, fail)
    for call_id in "abc":
        play.exchange.feed(call_bytes(X, id=call_id))
    play.exchange.feed_eof()
    if where == "future":
        play.service.futures["b"].set_exception(AttributeError("nobody foresaw it"))
    await play.answer(*[call_id for call_id in "abc" if call_id in play.service.futures and call_id != "b"])
    if "b" in play.service.futures and not play.service.futures["b"].done():
        await play.answer("b")
    frames = {frame.header.id: frame.header for frame in decode(play.exchange.take_results())}
    assert {call_id: header.code for call_id, header in frames.items()} == {
        "a": 200, "b": 200 if where == "count_wire" else 500, "c": 200,
    }  # fmt: skip
    if where != "count_wire":
        assert "AttributeError: nobody foresaw it" in frames["b"].message
    assert not play.exchange.outstanding
    assert play.budget.held == 0
    assert sum(bool(record.exc_info) for record in caplog.records) == 1, "one traceback, however often it happens"
