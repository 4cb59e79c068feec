"""Reads a request's body at the caller's pace, and refuses one that is too slow. Knows nothing of what it means."""

from __future__ import annotations

import asyncio

from aiohttp import StreamReader

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import BadRequestError


class PacedBody:
    """Counts only the time that we wait for the caller, never the time that the caller waits for us."""

    def __init__(self, content: StreamReader, limits: LimitsConfig) -> None:
        self._content, self._limits = content, limits
        self._waited_s = 0.0
        self.received = 0
        """Bytes so far."""

    def __repr__(self) -> str:
        return f"<PacedBody: {self.received} bytes in {self._waited_s:.1f} s>"

    async def read(self) -> bytes:
        """What has arrived, at least one byte; empty at the end.

        Raises:
            BadRequestError: nothing came for `idle_read_timeout_s`, or less than `min_body_bytes_per_s` on average
                once `slow_body_grace_s` of waiting are over.
        """
        content = self._content
        if content.is_eof():  # a body that has arrived whole needs no timer
            chunk = await content.readany()
        else:
            chunk = await self._wait()
        self.received += len(chunk)
        return chunk

    async def _wait(self) -> bytes:
        limits, loop = self._limits, asyncio.get_running_loop()
        begin = loop.time()
        try:
            async with asyncio.timeout(limits.idle_read_timeout_s):
                chunk = await self._content.readany()
        except TimeoutError:
            raise BadRequestError(f"no data for {limits.idle_read_timeout_s} s in the middle of a body") from None
        self._waited_s += loop.time() - begin
        late_s = self._waited_s - limits.slow_body_grace_s
        if late_s > 0 and self.received + len(chunk) < late_s * limits.min_body_bytes_per_s:
            raise BadRequestError(
                f"{self.received + len(chunk)} bytes in {self._waited_s:.1f} s are less than the "
                f"{limits.min_body_bytes_per_s} bytes/s that a body must come at; send fewer rows at a time"
            )
        return chunk
