"""Answers single calls without the HTTP library's request and response objects, its tasks and its turns of the loop.

A small call is answered in the two callbacks of the loop that it needs anyway: where its bytes arrive, and where the
device's result does (docs/benchmarks.md). The library's parser still reads every head. Whatever is not plainly such a
call goes the library's way, which also words every refusal of a request as a whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiohttp import HttpVersion11, hdrs
from aiohttp.http import RawRequestMessage
from multidict import CIMultiDictProxy

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import CallError
from p2pmoe.protocol.frames import PREFIX, FrameLimits
from p2pmoe.rpc.base import Service
from p2pmoe.rpc.budget import SharedBudget
from p2pmoe.rpc.exchange import ServerExchange
from p2pmoe.rpc.http.documents import EXCHANGE_PATH, WIRE_VERSION_HEADER
from p2pmoe.rpc.http.sessions import Door
from p2pmoe.rpc.http.writing import answer_head, body_of, joined
from p2pmoe.types import WIRE_VERSION, Caller

_SPECIAL: Final = (hdrs.CONTENT_ENCODING, hdrs.EXPECT, hdrs.UPGRADE)


def is_plain_exchange(message: RawRequestMessage) -> bool:
    """Whether a head asks for an exchange and for nothing besides that the library would have to do."""
    return (
        message.method == hdrs.METH_POST
        and message.path == EXCHANGE_PATH
        and message.version == HttpVersion11
        and not (message.should_close or message.chunked or message.upgrade)
        and _nothing_special(message.headers)
    )


def is_one_call(body: bytes) -> bool:
    """Whether a body is, by its own account, a single frame. Results of several calls leave as they come."""
    return len(body) > PREFIX.size and PREFIX.size + sum(PREFIX.unpack_from(body)) == len(body)


class PromptAnswers:
    """What the answers of one server have in common, and which of them are under way."""

    def __init__(
        self, service: Service, door: Door, budget: SharedBudget, frame_limits: FrameLimits, limits: LimitsConfig
    ) -> None:
        self._service, self._door, self._budget = service, door, budget
        self._frame_limits, self._limits = frame_limits, limits
        self.running: set[PromptAnswer] = set()

    def __repr__(self) -> str:
        return f"<PromptAnswers: {len(self.running)} running>"

    def caller_of(self, headers: CIMultiDictProxy[str], address: str, nbytes: int) -> Caller | None:
        """Who sends a body of `nbytes`; None when the library's way will refuse it."""
        if nbytes > self._limits.max_exchange_bytes:
            return None
        try:
            return self._door.identify(headers.get(hdrs.AUTHORIZATION), address)
        except CallError:
            return None

    def open(self, caller: Caller, wake: Callable[[], None]) -> ServerExchange:
        """An exchange of one call."""
        budget = self._budget.of(caller.key)
        return ServerExchange(self._service, self._frame_limits, budget, max_calls=1, wake=wake, caller=caller)


class PromptAnswer:
    """The answer to one request.

    `on_end` is called once when it was written, maybe by `begin` itself, with whether the connection must end. When the
    answer was cancelled it is not.
    """

    def __init__(
        self, answers: PromptAnswers, caller: Caller, transport: asyncio.Transport, on_end: Callable[[bool], None]
    ) -> None:
        self._answers, self._transport, self._on_end = answers, transport, on_end
        self._calls = answers.open(caller, self._woken)
        self._fed = False
        self._watchers: list[asyncio.Future[None]] = []
        answers.running.add(self)

    def __repr__(self) -> str:
        return f"<PromptAnswer: {self._calls}>"

    def begin(self, body: bytes) -> None:
        """Hand in the call. What can be answered at once is."""
        self._calls.feed(body)
        self._calls.feed_eof()
        self._fed = True
        self._woken()

    def cancel(self) -> None:
        """The caller is gone: what has not reached a device is dropped."""
        if self in self._answers.running:
            self._end()

    def ended(self) -> asyncio.Future[None]:
        """Done when the answer is."""
        future = asyncio.get_running_loop().create_future()
        self._watchers.append(future)
        return future

    # -- private

    def _woken(self) -> None:
        if not self._fed or self._calls.outstanding or self not in self._answers.running:
            return
        frames = self._calls.take_results()
        head = answer_head(sum(frame.nbytes for frame in frames), last=self._calls.broken)
        if not self._transport.is_closing():
            for part in joined(body_of(frames), head):
                self._transport.write(part)
        self._end()
        self._on_end(self._calls.broken)

    def _end(self) -> None:
        self._answers.running.discard(self)
        self._calls.close()
        for future in self._watchers:
            if not future.done():
                future.set_result(None)


def _nothing_special(headers: CIMultiDictProxy[str]) -> bool:
    version = headers.get(WIRE_VERSION_HEADER)
    return (version is None or version == str(WIRE_VERSION)) and not any(name in headers for name in _SPECIAL)
