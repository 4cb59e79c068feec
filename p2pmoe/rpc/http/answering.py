"""Drives one `ServerExchange` over one HTTP request: its calls in, results out as they come."""

from __future__ import annotations

import asyncio

from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import BadRequestError, TooLargeError
from p2pmoe.protocol.frames import EncodedFrame, FrameLimits
from p2pmoe.rpc.base import Service
from p2pmoe.rpc.exchange import ByteBudget, ServerExchange
from p2pmoe.rpc.http.connection import Connection
from p2pmoe.rpc.http.direct_body import DIRECT_BYTES, DirectBody
from p2pmoe.rpc.http.pace import PacedBody
from p2pmoe.rpc.http.writing import JOIN_BYTES, body_of, write_frames
from p2pmoe.types import Caller

ANSWER_BEGUN = web.RequestKey("p2pmoe.answer_begun", bool)
"""The key of a request whose answer has begun to leave: no other can follow."""
_GATHER_S = 0.002
_FRAMES_HEADERS: CIMultiDict[str] = CIMultiDict({hdrs.CONTENT_TYPE: "application/octet-stream"})


class AnsweredExchange:
    """Drives one ServerExchange over one HTTP request."""

    def __init__(
        self,
        request: web.Request,
        caller: Caller,
        service: Service,
        frame_limits: FrameLimits,
        budget: ByteBudget,
        limits: LimitsConfig,
    ) -> None:
        self._request = request
        self._limits = limits
        self._wakeup = asyncio.Event()
        self._calls = ServerExchange(
            service, frame_limits, budget, max_calls=limits.max_calls_per_exchange, wake=self._wake, caller=caller
        )
        self._response: web.StreamResponse | None = None
        self._all_read = False
        self._gathering = False
        self._writer: asyncio.Task[None] | None = None

    @property
    def calls(self) -> int:
        """How many have come so far."""
        return self._calls.calls

    async def run(self) -> web.StreamResponse:
        try:
            await self._read_calls()
            self._all_read = True
            self._wakeup.set()
            # A result that came while the request was still arriving has started a writer task; else write here.
            await (self._writer or self._write_results())
        finally:
            self._calls.close()
            if self._writer is not None and not self._writer.done():
                self._writer.cancel()
                await asyncio.wait([self._writer])
        assert self._response is not None
        return self._response

    def _wake(self) -> None:
        if self._gathering and not self._complete:
            return
        self._wakeup.set()
        if not self._all_read and self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write_results())

    async def _read_calls(self) -> None:
        content, limits = self._request.content, self._limits
        body, begun = PacedBody(content, limits), False
        try:
            while not self._calls.broken:
                chunk = await body.read()
                _check_size(body.received, limits)
                if chunk:
                    self._calls.feed(chunk)
                if content.at_eof():
                    self._calls.feed_eof()
                    return
                if not begun and (rest := self._rest(body.received)) is not None:
                    await rest.read()
                    return
                begun = True
        except (BadRequestError, TooLargeError) as error:
            self._calls.break_off(error)

    def _rest(self, received: int) -> DirectBody | None:
        """The rest of a large body, if the connection can receive it by itself from here on."""
        left = (self._request.content_length or 0) - received
        if left < DIRECT_BYTES or self._calls.broken:
            return None
        connection = self._request.protocol
        assert isinstance(connection, Connection)
        return connection.receive_directly(self._request, self._calls, left)

    @property
    def _complete(self) -> bool:
        return self._all_read and not self._calls.outstanding

    async def _write_results(self) -> None:
        while True:
            if 0 < self._calls.result_bytes <= JOIN_BYTES and not self._complete:
                await self._gather()
            frames = self._calls.take_results()
            complete = self._complete
            if complete and self._response is None and sum(frame.nbytes for frame in frames) <= JOIN_BYTES:
                self._response = self._small_response(frames)
                return
            if frames or complete:
                response = self._response or await self._start_response(frames, complete)
                await write_frames(frames, response.write)
            if complete:
                break
            if not frames:
                await self._wakeup.wait()
                self._wakeup.clear()
        await response.write_eof()

    async def _gather(self) -> None:
        """Wait a moment for more small results: each write wakes both ends' loops, on cores that could be computing."""
        self._gathering = True
        self._wakeup.clear()
        timer = asyncio.get_running_loop().call_later(_GATHER_S, self._wakeup.set)
        try:
            await self._wakeup.wait()
        finally:
            timer.cancel()
            self._gathering = False

    def _small_response(self, frames: list[EncodedFrame]) -> web.Response:
        """All results at once, as one body: headers and body leave in one write."""
        body = b"".join(body_of(frames))
        response = web.Response(body=body, headers=_FRAMES_HEADERS)
        if self._calls.broken:
            response.force_close()
        return response

    async def _start_response(self, frames: list[EncodedFrame], complete: bool) -> web.StreamResponse:
        response = self._response = web.StreamResponse(headers=_FRAMES_HEADERS)
        self._request[ANSWER_BEGUN] = True
        if self._calls.broken:
            response.force_close()  # the rest of the request is unread
        if complete:
            response.content_length = sum(frame.nbytes for frame in frames)
        elif self._request.version == HttpVersion11:
            response.enable_chunked_encoding()
        else:
            response.force_close()  # an older caller knows the end of the answer by that of the connection
        await response.prepare(self._request)
        return response


def _check_size(received: int, limits: LimitsConfig) -> None:
    if received > limits.max_exchange_bytes:
        raise TooLargeError(f"the exchange is over the limit of {limits.max_exchange_bytes} bytes; split it")
