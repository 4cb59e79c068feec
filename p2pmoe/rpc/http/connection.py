"""One caller's connection: aiohttp's protocol with deadlines of our own, and the watch that enforces them.

aiohttp bounds the pause between two requests, but neither the time nor the whole size of a request's head, nor how long
a caller may leave an answer unread. Both times are kept here as plain numbers that one timer for all looks at.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import islice
from typing import Any, cast

from aiohttp import StreamReader, hdrs, web, web_protocol
from aiohttp.http import HttpRequestParser, RawRequestMessage

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import BadRequestError, TooLargeError
from p2pmoe.faults import attempt
from p2pmoe.rpc.exchange import ServerExchange
from p2pmoe.rpc.http.admission import Ticket
from p2pmoe.rpc.http.direct_body import DirectBody
from p2pmoe.rpc.http.grain import LINE_END, Grain
from p2pmoe.rpc.http.prompt_answer import PromptAnswer, PromptAnswers, is_one_call, is_plain_exchange
from p2pmoe.rpc.http.responses import error_response
from p2pmoe.rpc.resolver import host_of
from p2pmoe.types import Caller

logger = logging.getLogger(__name__)

_SLICE_BYTES = 16 * 1024

# What prompt answers know of the library's protocol; with another version of it everything goes the long way.
_KNOWN_NAMES = {"_waiter", "_messages", "_paused", "_close", "_keepalive_timeout", "_next_keepalive_close_time"}
_KNOWN_LIBRARY = hasattr(HttpRequestParser, "message_consumed") and _KNOWN_NAMES.issubset(
    name for each in web.RequestHandler.__mro__ for name in getattr(each, "__slots__", ())
)


class Connection(web.RequestHandler):
    """Counts what arrives before a request's head is complete, and remembers since when something is awaited.

    Two kinds of requests do not go the library's whole way: single calls that have arrived whole are answered by a
    `PromptAnswer`, the rest of a large body is received by a `DirectBody`.
    """

    __slots__ = (
        "_address",
        "_answer",
        "_answers",
        "_body",
        "_chunked",
        "_closing_since",
        "_grain",
        "_head_bytes",
        "_limits",
        "_link",
        "_looking",
        "_refused",
        "_ticket",
        "_watch",
        "head_since",
        "stalled_since",
    )

    def __init__(
        self,
        server: web.Server,
        watch: ConnectionWatch,
        ticket: Ticket,
        answers: PromptAnswers | None = None,
        **options: Any,
    ) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._watch, self._ticket, self._limits = watch, ticket, watch.limits
        self._answers = answers if _KNOWN_LIBRARY else None
        self._answer: PromptAnswer | None = None
        self._looking = False
        self._grain = Grain(self._limits.min_piece_bytes, ticket.borrow, ticket.meter)
        self._body: StreamReader | None = None
        self._chunked = False
        self._refused = False
        self._address = ""
        self._head_bytes = 0
        self.head_since: float | None = None
        """On the loop's clock: when the connection opened, or the first byte of a further request came."""
        self.stalled_since: float | None = None
        """When the caller stopped taking what we write."""
        self._closing_since: float | None = None
        self._link: asyncio.Transport | None = None

    def overdue(self, now: float) -> str | None:
        """Why the connection must end, if it must."""
        limits = self._limits
        if self._link is not None and self._link.is_closing():
            self._closing_since = self._closing_since or now
        for since in (self.stalled_since, self._closing_since):
            if since is not None and now - since > limits.write_stall_timeout_s:
                return f"the caller took nothing of an answer for {limits.write_stall_timeout_s} s"
        if self.head_since is not None and now - self.head_since > limits.http_head_timeout_s:
            return f"no complete request within {limits.http_head_timeout_s} s"
        return None

    def drop(self) -> None:
        """End the connection without waiting for the caller."""
        self.force_close()
        if self._link is not None:
            self._link.abort()

    def receive_directly(self, request: web.Request, calls: ServerExchange, left: int) -> DirectBody | None:
        """Receive the last `left` bytes of a request's body past the parser; None when that cannot be.

        Everything before them must have been read.
        """
        content, transport = request.content, self.transport
        unread = content.total_bytes != (request.content_length or 0) - left
        if transport is None or unread or self._reading_paused or hdrs.UPGRADE in request.headers:
            return None
        try:
            parser = self._another_parser()
        except (AttributeError, TypeError):  # another version of the library: the long way works with all
            return None

        def give_back() -> None:
            transport.set_protocol(self)
            self._parser = parser
            content.feed_eof()

        body = DirectBody(self, calls, left, self._limits, give_back, self._grain)
        transport.set_protocol(body)
        return body

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.head_since = asyncio.get_running_loop().time()
        self._link = cast("asyncio.Transport", transport)  # the base class forgets its own when it begins to close
        if peer := transport.get_extra_info("peername"):
            self._address = host_of(peer)
        self._watch.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._watch.discard(self)
        if self._answer is not None:
            self._answer.cancel()
        self._ticket.give_back()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if data and not (self._refused or self._grain.read(len(data))):
            self._refuse()
        if (
            self._refused or self._looking
        ):  # the library asks for what its parser holds back whenever a body is read; that is nothing
            return
        waiter, requests = self._waiter, self._request_count
        waits = waiter is not None and not waiter.done()
        if waits:
            self._waiter = None  # so that the library wakes nobody: we look at the request first
        try:
            self._feed(data)
        finally:
            if waits:
                self._waiter = waiter
        if self._request_count != requests:
            self.head_since, self._head_bytes = None, 0
            if waits and self._answer is None:
                self._next_request()
        elif waits and self._answer is None:  # no request is being answered, and none is complete
            self._count_head(len(data))

    def pause_writing(self) -> None:
        self.stalled_since = asyncio.get_running_loop().time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.stalled_since = None
        super().resume_writing()

    # -- aiohttp

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP is a stranger's doing: answered in our form, and no traceback in the log."""
        if status != 400 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        logger.debug("no HTTP request from %s: %s", request.remote, message)
        reason = " ".join((message or "malformed").split())
        return error_response(BadRequestError(f"not a valid HTTP request: {reason[:256]}"))

    def log_exception(self, *args: Any, **options: Any) -> None:
        """Reading on after an answer ends with our refusal where that came meanwhile: no news."""
        if not (self._refused and isinstance(options.get("exc_info"), BadRequestError)):
            super().log_exception(*args, **options)

    def _process_keepalive(self) -> None:
        if self._answer is None:
            super()._process_keepalive()
        else:
            self._keepalive_handle = self._loop.call_later(self._keepalive_timeout, self._process_keepalive)

    # -- private

    def _feed(self, data: bytes) -> None:
        """Let the parser have it, and count line ends where each costs something."""
        for start in range(0, len(data), _SLICE_BYTES) or (0,):
            part = data if len(data) <= _SLICE_BYTES else data[start : start + _SLICE_BYTES]
            is_in_body = self._body is not None and not self._body.is_eof()
            if is_in_body and self._chunked and not self._grain.take(part.count(LINE_END)):
                self._refuse()
            if self._refused:
                return
            requests = self._request_count
            super().data_received(part)
            if completed := self._request_count - requests:
                self._grain.completed(completed)
                latest = [message for message, _ in islice(reversed(self._messages), completed)]
                self._chunked = any(isinstance(each, RawRequestMessage) and each.chunked for each in latest)
                self._body = self._messages[-1][1] if self._messages else None
            if (self._chunked if completed else not is_in_body) and not self._grain.take(part.count(LINE_END)):
                self._refuse()

    def _refuse(self) -> None:
        """Read no more of what comes in too small pieces; who waits for its body is told why."""
        self._refused = True
        self._watch.dropped += 1
        error = self._grain.refusal()
        logger.debug("connection refused: %s", error)
        if self._body is None or self._body.is_eof():
            self.drop()
            return
        self._body.set_exception(error)
        self._body.feed_eof()
        self.close()  # when it has been answered

    def _next_request(self) -> None:
        """Answer the request that is complete, or let the library's task do it."""
        answers = self._answers
        if answers is not None and len(self._messages) == 1 and not self._paused and not self._reading_paused:
            self._looking = True
            try:
                call = self._take_call(answers)
            finally:
                self._looking = False
            if call is not None:
                caller, body = call
                assert self._link is not None
                self._answer = PromptAnswer(answers, caller, self._link, self._end_answer)
                self._answer.begin(body)
        waiter = self._waiter
        if self._messages and waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _take_call(self, answers: PromptAnswers) -> tuple[Caller, bytes] | None:
        """The only request that is complete, if it is a single call; else it stays where it is."""
        message, payload = self._messages[0]
        if not isinstance(message, RawRequestMessage) or not payload.is_eof() or not is_plain_exchange(message):
            return None
        body = payload.read_nowait()
        caller = answers.caller_of(message.headers, self._address, len(body)) if is_one_call(body) else None
        if caller is None:
            again = StreamReader(self, self._read_bufsize, loop=self._loop)
            again.feed_data(body)
            again.feed_eof()
            self._messages[0] = message, again
            return None
        self._messages.clear()
        cast("Any", self._parser).message_consumed()  # its type is that of another parser
        return caller, body

    def _end_answer(self, last: bool) -> None:
        self._answer = None
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if last or self._close:
            self.force_close()
        elif self._messages:
            self._next_request()

    def _another_parser(self) -> HttpRequestParser:
        """For the next request: the one in use waits for a body of which it will see nothing more."""
        return HttpRequestParser(
            self,
            self._loop,
            self._read_bufsize,
            max_line_size=self.max_line_size,
            max_field_size=self.max_field_size,
            max_headers=self.max_headers,
            payload_exception=web_protocol.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=self._max_msg_queue_size,
        )

    def _count_head(self, count: int) -> None:
        if self.head_since is None:
            self.head_since = asyncio.get_running_loop().time()
        self._head_bytes += count
        if self._head_bytes > self._limits.max_http_head_bytes:
            refusal = TooLargeError(f"a request's head is over the limit of {self._limits.max_http_head_bytes} bytes")
            logger.debug("connection closed: %s", refusal)
            self.drop()


class ConnectionWatch:
    """Drops connections whose deadline has passed. Belongs to one event loop."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits = limits
        self.dropped = 0
        self._connections: set[Connection] = set()
        self._period_s = min(1.0, limits.http_head_timeout_s / 4, limits.write_stall_timeout_s / 4)
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<ConnectionWatch: {len(self._connections)} connections, {self.dropped} dropped>"

    def start(self) -> None:
        """Look again and again, until `stop`."""
        self._timer = asyncio.get_running_loop().call_later(self._period_s, self._look)

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def add(self, connection: Connection) -> None:
        """A connection is open."""
        self._connections.add(connection)

    def discard(self, connection: Connection) -> None:
        """It is closed."""
        self._connections.discard(connection)

    def sweep(self, now: float) -> None:
        """Drop what is overdue; `now` on the loop's clock."""
        for connection in list(self._connections):
            reason = connection.overdue(now)
            if reason is not None:
                self.dropped += 1
                logger.debug("connection dropped: %s", reason)
                connection.drop()

    def _look(self) -> None:
        attempt("looking for overdue connections", self.sweep, asyncio.get_running_loop().time(), by_a_stranger=True)
        self.start()
