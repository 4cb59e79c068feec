"""DirectBody: driven as a transport drives it, with a fake exchange that only reads frames."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch
from frame_kit import call_bytes
from swarm_kit import same_bits

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import BadRequestError, DecodeError
from p2pmoe.protocol.frames import Frame, FrameLimits, FrameReader, FrameReceived
from p2pmoe.protocol.messages import RequestHeader, request_decoder
from p2pmoe.rpc.http.direct_body import DirectBody

BODY_LIMITS = FrameLimits(body_bytes=1 << 20)


class Calls:
    """Keeps frames; `broken` at the first error, as a ServerExchange is."""

    def __init__(self) -> None:
        self.reader: FrameReader[RequestHeader] = FrameReader(request_decoder, BODY_LIMITS)
        self.frames: list[Frame[RequestHeader]] = []
        self.ended = self.broken = False
        self.straight_bytes = 0
        self.failure: Exception | None = None

    def room(self) -> memoryview:
        return self.reader.room()

    def filled(self, count: int) -> None:
        self.straight_bytes += count
        self.reader.filled(count)
        self._advance()

    def feed(self, chunk: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self.reader.feed(chunk)
        self._advance()

    def feed_eof(self) -> None:
        self.ended = True

    def _advance(self) -> None:
        try:
            while (event := self.reader.next_event()) is not None:
                if isinstance(event, FrameReceived):
                    self.frames.append(event.frame)
        except DecodeError:
            self.broken = True


class Owner(asyncio.Protocol):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append(("lost", exc))

    def eof_received(self) -> None:
        self.told.append("eof")

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")


class Play:
    def __init__(self, left: int, **limits: Any) -> None:
        self.calls, self.owner, self.given_back = Calls(), Owner(), 0
        self.body = DirectBody(self.owner, self.calls, left, LimitsConfig(**limits), self._give_back)  # type: ignore[arg-type]

    def _give_back(self) -> None:
        self.given_back += 1

    def receive(self, data: bytes, sizes: Any = None) -> int:
        """As a transport: into the memory that it is given, never more of it; how much was taken."""
        taken = 0
        while taken < len(data) and not self.given_back:
            memory = self.body.get_buffer(-1)
            assert memory.nbytes, "asyncio takes an empty buffer for an error"
            count = min(memory.nbytes, len(data) - taken, next(sizes) if sizes else memory.nbytes)
            memory[:count] = data[taken : taken + count]
            self.body.buffer_updated(count)
            taken += count
        return taken


def call(call_id: str, *tensors: torch.Tensor) -> bytes:
    return call_bytes(*tensors, id=call_id, model_name="ffn.0")


@pytest.mark.parametrize("seed", range(20))
async def test_any_cut_gives_the_same_tensors_and_not_one_byte_too_many(seed: int) -> None:
    draw = random.Random(seed)
    tensors = [
        [torch.randn(draw.choice([0, 1, 3, 700, 5000])) for _ in range(draw.randint(0, 4))]
        for _ in range(draw.randint(1, 5))
    ]
    data = b"".join(call(str(index), *each) for index, each in enumerate(tensors))
    play = Play(len(data))
    reading = asyncio.create_task(play.body.read())
    largest = draw.choice([1, 7, 1000, 65536])

    def sizes() -> Any:
        while True:
            yield draw.randint(1, largest)

    assert play.receive(data + b"GET / HTTP/1.1", sizes()) == len(data), "the next request is the owner's"
    await asyncio.wait_for(reading, 1)
    assert (play.given_back, play.calls.ended, play.calls.broken) == (1, True, False)
    assert [frame.header.id for frame in play.calls.frames] == [str(index) for index in range(len(tensors))]
    for frame, sent in zip(play.calls.frames, tensors, strict=True):
        assert len(frame.tensors) == len(sent)
        assert all(map(same_bits, frame.tensors, sent))


async def test_a_large_tensor_is_written_where_it_will_stay() -> None:
    x = torch.randn(100_000)
    data = call("a", x)
    play = Play(len(data))
    play.receive(data[:200])
    play.receive(data[200:])
    assert play.calls.straight_bytes >= len(data) - 4096 - 200
    await play.body.read()


async def test_what_comes_after_a_break_is_dropped_until_the_body_ends() -> None:
    play = Play(300_000)
    play.receive(b"\xff" * 8)
    await play.body.read()
    assert play.calls.broken
    assert play.receive(b"\0" * 400_000) == 300_000 - 8
    assert (play.given_back, play.calls.ended, play.calls.frames) == (1, False, [])


async def test_a_failure_of_the_calls_is_the_readers_and_the_connection_goes_on() -> None:
    play = Play(100_000)
    play.calls.failure = RuntimeError("a mistake of ours")
    play.receive(b"x" * 10)
    with pytest.raises(RuntimeError, match="of ours"):
        await play.body.read()
    assert play.receive(b"x" * 100_000) == 100_000 - 10
    assert play.given_back == 1


async def test_a_reader_who_leaves_leaves_memory_alone() -> None:
    data = call("a", torch.zeros(50_000))
    play = Play(len(data))
    reading = asyncio.create_task(play.body.read())
    await asyncio.sleep(0)
    play.receive(data[:1000])
    room = play.calls.room()
    room[:] = bytes(len(room))
    reading.cancel()
    await asyncio.wait([reading])
    play.receive(b"\xff" * (len(data) - 1000))
    assert not any(room), "nobody writes to a tensor whose call is gone"
    assert play.given_back == 1


async def test_nothing_for_too_long() -> None:
    play = Play(100_000, idle_read_timeout_s=0.1)
    play.receive(b"\x10")
    with pytest.raises(BadRequestError, match=r"no data for 0\.1 s in the middle of a body"):
        await asyncio.wait_for(play.body.read(), 5)


async def test_too_little_at_a_time() -> None:
    data = call("a", torch.zeros(50_000))
    play = Play(len(data), idle_read_timeout_s=0.1, slow_body_grace_s=0.1, min_body_bytes_per_s=100_000)
    reading = asyncio.create_task(play.body.read())
    sent = 0
    async with asyncio.timeout(5):
        while not reading.done():
            sent += play.receive(data[sent : sent + 1])
            await asyncio.sleep(0.01)
    assert not play.calls.broken
    with pytest.raises(BadRequestError, match="bytes/s that a body must come at"):
        await reading


async def test_a_pause_shorter_than_the_limit_is_none() -> None:
    data = call("a", torch.zeros(50_000))
    play = Play(len(data), idle_read_timeout_s=0.5)
    reading = asyncio.create_task(play.body.read())
    play.receive(data[:500])
    await asyncio.sleep(0.3)
    play.receive(data[500:1000])
    await asyncio.sleep(0.3)
    assert not reading.done()
    play.receive(data[1000:])
    await asyncio.wait_for(reading, 1)


async def test_everything_but_data_is_told_to_the_owner() -> None:
    play = Play(100_000)
    play.body.pause_writing()
    play.body.resume_writing()
    play.body.eof_received()
    lost = ConnectionResetError()
    play.body.connection_lost(lost)
    assert play.owner.told == ["pause", "resume", "eof", ("lost", lost)]
    with pytest.raises(asyncio.CancelledError):
        await play.body.read()


async def test_it_prints_its_state() -> None:
    play = Play(100)
    play.receive(b"x")
    assert repr(play.body) == "<DirectBody: 1 bytes, 99 left>"
    play.body.connection_lost(None)
