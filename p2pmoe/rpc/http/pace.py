"""Refuses callers whose requests' bodies come too slowly. Knows nothing of what they mean."""

from __future__ import annotations

import asyncio

from aiohttp import StreamReader

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import BadRequestError


def idle_error(limits: LimitsConfig) -> BadRequestError:
    """What to say when nothing came for `idle_read_timeout_s`."""
    return BadRequestError(f"no data for {limits.idle_read_timeout_s} s in the middle of a body")


def check_rate(received: int, waited_s: float, limits: LimitsConfig) -> None:
    """Raises BadRequestError when `received` bytes are less than `min_body_bytes_per_s` on average.

    The average counts once `slow_body_grace_s` of waiting are over.
    """
    late_s = waited_s - limits.slow_body_grace_s
    if late_s > 0 and received < late_s * limits.min_body_bytes_per_s:
        raise BadRequestError(
            f"{received} bytes in {waited_s:.1f} s are less than the {limits.min_body_bytes_per_s} bytes/s that a body "
            f"must come at; send fewer rows at a time"
        )


class PacedBody:
    """Reads a body. Counts only the time that we wait for the caller, never the time that the caller waits for us."""

    def __init__(self, content: StreamReader, limits: LimitsConfig) -> None:
        self._content, self._limits = content, limits
        self._waited_s = 0.0
        self.received = 0
        """Bytes so far."""

    def __repr__(self) -> str:
        return f"<PacedBody: {self.received} bytes in {self._waited_s:.1f} s>"

    async def read(self) -> bytes:
        """What has arrived, at least one byte; empty at the end. Raises BadRequestError, see above."""
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
            raise idle_error(limits) from None
        self._waited_s += loop.time() - begin
        check_rate(self.received + len(chunk), self._waited_s, limits)
        return chunk
