"""Nodes that lie by script: whatever they are asked, they answer bytes of the test's choice. In memory and over HTTP.

A `Lie` gets the headers of the calls and yields chunks of the response body; it may never end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from frame_kit import raw_frame
from swarm_kit import WAIT_S

from p2pmoe.client.calls import Call
from p2pmoe.protocol.frames import PREFIX, EncodedFrame, Frame, FrameLimits, FrameReader, describe_tensors, encode_frame
from p2pmoe.protocol.messages import RequestHeader, ResponseHeader, request_decoder, response_decoder
from p2pmoe.rpc.base import Transport
from p2pmoe.types import Endpoint

Lie = Callable[[Sequence[RequestHeader]], Iterable[bytes]]


def answer(call: RequestHeader, *tensors: torch.Tensor, **header: Any) -> bytes:
    """A result frame; without tensors it has one like the call's first input, all ones."""
    tensors = tensors or (torch.ones(call.inputs[0].shape),)
    headers, memories = describe_tensors(tensors)
    fields = {"id": call.id, "model_name": call.model_name, "outputs": headers} | header
    return b"".join(encode_frame(ResponseHeader(**fields), memories).buffers)


def shaped(change: Callable[[torch.Tensor], Any]) -> Lie:
    """Every call is answered with something else than ones of its input's shape."""

    def lie(calls: Sequence[RequestHeader]) -> Iterable[bytes]:
        for call in calls:
            changed = change(torch.ones(call.inputs[0].shape))
            yield answer(call, *(changed if isinstance(changed, tuple) else (changed,)))

    return lie


def honest(calls: Sequence[RequestHeader]) -> Iterable[bytes]:
    for call in calls:
        yield answer(call)


def for_each(make: Callable[[RequestHeader], bytes]) -> Lie:
    return lambda calls: (make(call) for call in calls)


EMPTY_ERROR = raw_frame({"id": "", "code": 429, "message": "later"})
BROKEN: dict[str, Lie] = {
    "other shape": shaped(lambda y: y[:, :3]),
    "other rank": shaped(lambda y: y.unsqueeze(1)),
    "other dtype": shaped(lambda y: y.double()),
    "too few rows": shaped(lambda y: y[:-1]),
    "too many rows": shaped(lambda y: torch.cat([y, y])),
    "one tensor too many": shaped(lambda y: (y, y)),
    "no tensor": for_each(lambda call: answer(call, outputs=())[: -4 * 8]),
    "another expert's name": for_each(lambda call: answer(call, model_name="ffn.99")),
    "an error with tensors": for_each(lambda call: answer(call, code=500, message="sorry")),
    "no json": lambda calls: [raw_frame(b"{{{")],
    "json of another kind": lambda calls: [raw_frame([1, 2, 3])],
    "deep json": lambda calls: [raw_frame(b'{"parameters":{"x":' + b"[" * 5000 + b"]" * 5000 + b"}}")],
    "a tensor of no size": for_each(
        lambda call: raw_frame({"id": call.id, "outputs": [{"name": "0", "datatype": "FP32", "shape": [2, 4]}]})
    ),
    "a huge shape": for_each(
        lambda call: raw_frame(
            {
                "id": call.id,
                "outputs": [
                    {
                        "name": "0",
                        "datatype": "FP32",
                        "shape": [2**50, 2**50],
                        "parameters": {"binary_data_size": 2**32 - 1},
                    }
                ],
            },
            body_bytes=2**32 - 1,
        )
    ),
    "a huge header": lambda calls: itertools.chain([PREFIX.pack(2**32 - 1, 0)], itertools.repeat(b" " * 65536)),
    "an oversized body": for_each(
        lambda call: raw_frame(
            {
                "id": call.id,
                "outputs": [
                    {"name": "0", "datatype": "FP32", "shape": [2, 2**28], "parameters": {"binary_data_size": 2**31}}
                ],
            },
            body_bytes=2**31,
        )
    ),
    "no header": lambda calls: [PREFIX.pack(0, 0)],
    "a frame cut short": for_each(lambda call: answer(call)[:-1]),
    "endless tiny frames": lambda calls: itertools.repeat(raw_frame({}) * 1000),
    "endless replies to nobody": lambda calls: itertools.repeat(raw_frame({"id": "x", "code": 500}) * 1000),
    "endless replies to nobody with bodies": lambda calls: (
        answer(calls[0], id=f"nobody-{number}") for number in itertools.count()
    ),
    "endless errors for all": lambda calls: itertools.repeat(EMPTY_ERROR * 1000),
}
"""Without a right answer among them: the call fails with a DecodeError."""

NOISY: dict[str, Lie] = {
    "a second answer": for_each(lambda call: answer(call) * 2),
    "a second answer of another shape": for_each(lambda call: answer(call) + answer(call, torch.ones(1, 1))),
    "an answer to nobody first": for_each(lambda call: answer(call, id="nobody") + answer(call)),
    "endless second answers": for_each(lambda call: answer(call) * 2000),
    "noise after the answers": lambda calls: itertools.chain(honest(calls), [b"\xff" * 64]),
}
"""The right answer comes, and more: the call succeeds, the node is to blame all the same."""


class LyingTransport:
    """A `Transport` in memory in which some endpoints lie; the others are those of `honest`.

    Like the real ones it reads chunk by chunk and leaves what is not read where it is: `read` counts its bytes.
    """

    def __init__(self, honest: Transport, lies: Mapping[Endpoint, Lie], limits: FrameLimits | None = None) -> None:
        self.lies = dict(lies)
        self.read: dict[Endpoint, int] = dict.fromkeys(lies, 0)
        self.asked: list[tuple[Endpoint, Call | RequestHeader]] = []
        self._honest = honest
        self._limits = limits or FrameLimits()

    async def exchange(
        self, endpoint: Endpoint, frames: Sequence[EncodedFrame], inspect: Callable[[ResponseHeader], bool]
    ) -> AsyncGenerator[Frame[ResponseHeader], None]:
        calls = headers_of(b"".join(buffer for frame in frames for buffer in frame.buffers))
        self.asked += [(endpoint, call) for call in calls]
        lie = self.lies.get(endpoint)
        if lie is None:
            async with contextlib.aclosing(self._honest.exchange(endpoint, frames, inspect)) as replies:
                async for reply in replies:
                    yield reply
            return
        reader: FrameReader[ResponseHeader] = FrameReader(response_decoder, self._limits)
        for chunk in lie(calls):
            self.read[endpoint] += len(chunk)
            reader.feed(chunk)
            for reply in reader.accepted_frames(inspect):
                yield reply
            await asyncio.sleep(0)
        reader.feed_eof()

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        return await self._honest.get_json(endpoint, path)

    async def close(self) -> None:
        await self._honest.close()


def headers_of(body: bytes) -> list[RequestHeader]:
    reader: FrameReader[RequestHeader] = FrameReader(request_decoder, FrameLimits())
    reader.feed(body)
    return [frame.header for frame in reader.accepted_frames(lambda _: True)]


@contextlib.contextmanager
def serve_lie(lie: Lie, documents: Mapping[str, bytes] | None = None) -> Iterator[Endpoint]:
    """The same over HTTP: a raw server on a loop thread of its own. `documents` answers GETs by path."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-liar")
    thread.start()
    tasks: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
                body = await reader.readexactly(int(length or b"0"))
                if head.startswith(b"GET"):
                    document = (documents or {}).get(head.split()[1].decode(), b"null")
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(document) + document)
                    continue
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                for chunk in lie(headers_of(body)):
                    writer.write(b"%x\r\n" % len(chunk) + chunk + b"\r\n")
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
                await writer.drain()
        writer.close()

    async def stop(server: asyncio.Server) -> None:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=WAIT_S)

    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(handle, "127.0.0.1", 0), loop).result(WAIT_S)
    try:
        yield Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        asyncio.run_coroutine_threadsafe(stop(server), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()
