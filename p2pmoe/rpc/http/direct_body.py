"""Receives the rest of a large body straight into its tensors, past the HTTP library's parser and buffers.

The library copies every byte three times on its way (the transport's chunk, the parser's, the reader's) and wakes a
task for each chunk. Here the transport itself writes to tensor memory (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import BadRequestError
from p2pmoe.rpc.exchange import ServerExchange
from p2pmoe.rpc.http.grain import Grain
from p2pmoe.rpc.http.pace import check_rate, idle_error
from p2pmoe.rpc.http.scratch import scratch

DIRECT_BYTES: Final = 64 * 1024
"""Less than this is not worth it."""
_STRAIGHT_BYTES: Final = 4096  # a smaller piece of a tensor is received with what follows it, and copied
_LOOKS: Final = 4  # at the pace, within `idle_read_timeout_s`


class DirectBody(asyncio.BufferedProtocol):
    """Stands in a connection's place at its transport until the body ends; `Connection.receive_directly` makes it.

    Args:
        owner: the connection, which hears of everything but data.
        calls: what the bytes are for.
        left: bytes of the body that are still to come; not one more is received.
        limits: the pace that the caller must keep.
        give_back: called once when the last of them has come, whether they were of use or not.
        grain: how finely they may come.
    """

    def __init__(
        self,
        owner: asyncio.Protocol,
        calls: ServerExchange,
        left: int,
        limits: LimitsConfig,
        give_back: Callable[[], None],
        grain: Grain | None = None,
    ) -> None:
        self._owner, self._calls, self._limits, self._give_back = owner, calls, limits, give_back
        self._grain = grain
        self._loop = asyncio.get_running_loop()
        self._left, self._received = left, 0
        self._straight = False  # the memory that was handed out last is a tensor's
        self._began_at = self._heard_at = self._loop.time()
        self._used: asyncio.Future[None] = self._loop.create_future()
        self._timer = self._loop.call_later(limits.idle_read_timeout_s / _LOOKS, self._look)

    def __repr__(self) -> str:
        return f"<DirectBody: {self._received} bytes, {self._left} left>"

    async def read(self) -> None:
        """Until the calls have the whole body, or are broken; what comes after that is dropped.

        Raises BadRequestError when the caller is too slow, see `pace`.
        """
        try:
            await self._used
        finally:
            self._timer.cancel()

    # -- asyncio.BufferedProtocol

    def get_buffer(self, sizehint: int) -> memoryview:
        memory = self._calls.room()
        self._straight = len(memory) >= _STRAIGHT_BYTES and not self._used.done()
        return (memory if self._straight else scratch())[: self._left]

    def buffer_updated(self, nbytes: int) -> None:
        self._left -= nbytes
        self._received += nbytes
        self._heard_at = self._loop.time()
        if self._grain is not None and not self._grain.read(nbytes) and not self._used.done():
            self._used.set_exception(self._grain.refusal())
        if not self._left:
            self._give_back()
        if not self._used.done():
            try:
                self._use(nbytes)
            except Exception as error:  # noqa: BLE001 - the request's failure (500), not the transport's
                self._used.set_exception(error)

    def eof_received(self) -> bool | None:
        return self._owner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._used.cancel()
        self._owner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        self._owner.resume_writing()

    # -- private

    def _use(self, nbytes: int) -> None:
        if self._straight:
            self._calls.filled(nbytes)
        else:
            self._calls.feed(scratch()[:nbytes])
        if not self._left:
            self._calls.feed_eof()
        if self._calls.broken or not self._left:
            self._used.set_result(None)

    def _look(self) -> None:
        now = self._loop.time()
        try:
            if now - self._heard_at >= self._limits.idle_read_timeout_s:
                raise idle_error(self._limits)
            check_rate(self._received, now - self._began_at, self._limits)
        except BadRequestError as error:
            if not self._used.done():
                self._used.set_exception(error)
        else:
            self._timer = self._loop.call_later(self._limits.idle_read_timeout_s / _LOOKS, self._look)
