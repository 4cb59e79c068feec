"""The answering side of one exchange, whatever carries it: frames in, results out in completion order.

Synchronous: the transport feeds chunks, asks `take_results()`, and waits for `wake` in between. Knows no sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from p2pmoe.errors import (
    CallError,
    DecodeError,
    EncodeError,
    ExpertFailedError,
    MemoryRefusedError,
    OverloadedError,
    WireVersionError,
    is_out_of_memory,
    out_of_memory,
)
from p2pmoe.faults import attempt, unexpected
from p2pmoe.protocol.frames import (
    Buffer,
    EncodedFrame,
    Frame,
    FrameLimits,
    FrameReader,
    FrameReceived,
    FrameRefused,
    HeaderReceived,
    describe_tensors,
    encode_frame,
)
from p2pmoe.protocol.messages import (
    RequestHeader,
    ResponseHeader,
    error_header,
    request_decoder,
    version_mismatch,
)
from p2pmoe.rpc.base import Flat, Service
from p2pmoe.rpc.prompt import when_done
from p2pmoe.types import LOCAL_CALLER, WIRE_VERSION, Caller

MAX_MALFORMED: Final = 64


class ByteBudget:
    """Tensor bytes that all calls of a node may hold at once."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.held = 0

    def __repr__(self) -> str:
        return f"<ByteBudget: {self.held} of {self._limit} bytes held>"

    def take(self, count: int) -> None:
        """Raises OverloadedError when the calls in flight already hold too much."""
        if self.held and self.held + count > self._limit:
            raise OverloadedError(f"the node's calls in flight hold {self.held} bytes of {self._limit}; try again soon")
        self.held += count

    def give(self, count: int) -> None:
        self.held -= count


def check_wire_version(header: RequestHeader) -> None:
    """Raises WireVersionError when a call asks for another version than ours."""
    version = header.parameters.wire_version
    if version is not None and version != WIRE_VERSION:
        raise WireVersionError(version_mismatch(version))


class ServerExchange:
    """One exchange being answered."""

    def __init__(
        self,
        service: Service,
        limits: FrameLimits,
        budget: ByteBudget,
        *,
        max_calls: int,
        wake: Callable[[], None],
        caller: Caller = LOCAL_CALLER,
    ) -> None:
        self._service = service
        self._age_of = getattr(service, "age_of", _no_age)
        self._caller = caller
        self._budget = budget
        self._max_calls = max_calls
        self._wake = wake
        self._reader: FrameReader[RequestHeader] = FrameReader(request_decoder, limits)
        self._results: list[EncodedFrame] = []
        self._running: dict[asyncio.Future[Flat], int] = {}
        self.calls = 0
        """Frames that have come so far, those refused among them."""
        self._malformed = 0
        self._reserved = 0  # bytes of the body being received
        self._receiving: RequestHeader | None = None
        self._closed = False
        self.broken = False
        """The stream cannot be read further; the connection must not be reused."""

    def __repr__(self) -> str:
        return f"<ServerExchange: {self.calls} calls, {len(self._running)} running, {len(self._results)} results>"

    @property
    def outstanding(self) -> int:
        """Calls without a result yet."""
        return len(self._running)

    @property
    def result_bytes(self) -> int:
        """Size of the results that wait to be taken."""
        return sum(frame.nbytes for frame in self._results)

    def feed(self, chunk: Buffer) -> None:
        """Use up one received chunk; after a break nothing is read any more."""
        if not self.broken:
            self._reader.feed(chunk)
            self._advance()

    def room(self) -> memoryview:
        """Where the next bytes belong when they are those of a tensor, else nothing; see `FrameReader.room`."""
        return self._reader.room()

    def filled(self, count: int) -> None:
        """`count` bytes, more than none, were received into the `room`."""
        self._reader.filled(count)
        if not self._reader.room():
            self._advance()

    def feed_eof(self) -> None:
        """The request ended."""
        if self.broken:
            return
        try:
            self._reader.feed_eof()
        except DecodeError as error:
            self.break_off(error)

    def break_off(self, error: DecodeError | CallError) -> None:
        """Read no further; the call being received, if any, is answered with `error`, the others go on."""
        self.broken = True
        header, self._receiving = self._receiving or RequestHeader(), None
        self._results.append(encode_frame(error_header(header.id, header.model_name, error)))
        self._budget.give(self._reserved)
        self._reserved = 0

    def take_results(self) -> list[EncodedFrame]:
        """Results that are ready, each once."""
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        """Drop everything that has not reached a device, and wake nobody any more; safe to call twice."""
        self._closed = True
        self._budget.give(self._reserved)
        self._reserved = 0
        for future in list(self._running):
            future.cancel()

    # -- private

    def _advance(self) -> None:
        try:
            while (event := self._next_event()) is not None:
                self._handle(event)
        except DecodeError as error:
            self.break_off(error)
        self._service.flush()
        if self._results:  # refusals need not wait for the rest of the request
            self._wake()

    def _next_event(self) -> HeaderReceived[RequestHeader] | FrameReceived[RequestHeader] | FrameRefused | None:
        while True:
            try:
                return self._reader.next_event()
            except MemoryRefusedError as error:
                header, self._receiving = self._receiving or RequestHeader(), None
                self._budget.give(self._reserved)
                self._reserved = 0
                self._fail(header, _call_error("receiving a call", error))

    def _handle(self, event: HeaderReceived[RequestHeader] | FrameReceived[RequestHeader] | FrameRefused) -> None:
        if isinstance(event, FrameReceived):
            self._receiving = None
            self._submit(event.frame)
        elif isinstance(event, HeaderReceived):
            self._admit(event)
        else:
            self._count_call()
            self._malformed += 1
            if self._malformed > MAX_MALFORMED:  # eight bytes each, and nobody's quota counts them
                raise DecodeError(f"more than {MAX_MALFORMED} malformed calls in one exchange")
            self._results.append(encode_frame(error_header(event.call_id, "", event.error)))

    def _count_call(self) -> None:
        self.calls += 1
        if self.calls > self._max_calls:
            raise DecodeError(f"more than {self._max_calls} calls in one exchange; split it", code=413)

    def _admit(self, event: HeaderReceived[RequestHeader]) -> None:
        self._count_call()
        try:
            check_wire_version(event.header)
            self._service.admit(event.header, self._caller)
            self._budget.take(event.body_bytes)
        except Exception as error:  # noqa: BLE001 - this call's failure, not its neighbours'
            self._reader.skip()
            self._fail(event.header, _call_error("looking at a call", error))
            return
        self._reserved = event.body_bytes
        self._receiving = event.header

    def _submit(self, frame: Frame[RequestHeader]) -> None:
        held, self._reserved = self._reserved, 0
        try:
            future = self._service.submit(frame, self._caller)
        except Exception as error:  # noqa: BLE001
            self._budget.give(held)
            self._fail(frame.header, _call_error("queueing a call", error))
            return
        attempt("counting a call", self._service.count_wire, "in", frame.header.inputs, by_a_stranger=True)
        self._running[future] = held
        when_done(future, partial(self._finish, frame.header))

    def _finish(self, header: RequestHeader, future: asyncio.Future[Flat]) -> None:
        self._budget.give(self._running.pop(future))
        if not future.cancelled():
            error = future.exception()
            if error is None:
                self._succeed(header, future.result())
            else:
                self._fail(header, _call_error("computing a call", error))
        if not self._closed:
            self._wake()

    def _succeed(self, header: RequestHeader, tensors: Flat) -> None:
        try:
            self._results.append(self._encode(header, tensors))
        except EncodeError as error:  # the expert gave something else than its schema says
            self._fail(header, ExpertFailedError(f"the result cannot be sent: {error}"))
        except Exception as error:  # noqa: BLE001 - nobody else would tell the caller
            self._fail(header, _call_error("sending a result", error))

    def _fail(self, header: RequestHeader, error: CallError) -> None:
        self._results.append(encode_frame(error_header(header.id, header.model_name, error)))

    def _encode(self, header: RequestHeader, tensors: Flat) -> EncodedFrame:
        headers, memories = describe_tensors(tensors, self._service.result_codecs(header))
        attempt("counting a call", self._service.count_wire, "out", headers, by_a_stranger=True)
        uid = header.model_name
        age = self._age_of(uid)
        return encode_frame(ResponseHeader(id=header.id, model_name=uid, outputs=headers, parameters=age), memories)


def _no_age(_: str) -> dict[str, Any]:
    return {}


def _call_error(what: str, error: BaseException) -> CallError:
    """What a caller is told; what nobody foresaw is told to the log too."""
    if isinstance(error, CallError):
        return error
    if is_out_of_memory(error):
        return out_of_memory(error)
    return ExpertFailedError(f"the node failed: {unexpected(what, error, by_a_stranger=True)}")
