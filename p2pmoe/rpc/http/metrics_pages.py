"""`/metrics`: made on a thread, one at a time, once a second at most. Knows neither names nor experts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from p2pmoe.errors import BadRequestError, OverloadedError
from p2pmoe.rpc.http.shared import Shared

Exposition = tuple[bytes, str]
"""Text and content type."""
KEEP_S: Final = 1.0
MAX_WAITING: Final = 4


class MetricsPages:
    """What a scrape gets.

    Args:
        render: everything that every scrape gives.
        render_experts: single experts' numbers, by pattern and the uid that they lie behind. Raises BadRequestError.
    """

    def __init__(
        self, render: Callable[[], Exposition], render_experts: Callable[[str, str], Exposition] | None = None
    ) -> None:
        self._render_experts = render_experts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="p2pmoe-metrics")
        self._page = Shared(lambda: self._run(render), KEEP_S)
        self._waiting = 0

    def __repr__(self) -> str:
        return f"<MetricsPages: {self._waiting} waiting>"

    async def get(self, query: Mapping[str, str]) -> Exposition:
        """The page of a query: `experts` is a pattern of uids, `after` the last uid of the page before.

        Raises:
            BadRequestError: no such query.
            OverloadedError: five others wait for experts' numbers.
        """
        if not query:
            return await self._page.get()
        pattern, render = query.get("experts"), self._render_experts
        if pattern is None or render is None or not query.keys() <= {"experts", "after"}:
            raise BadRequestError("single experts' numbers are at /metrics?experts=PATTERN, e.g. ?experts=ffn.3.*")
        if self._waiting > MAX_WAITING:
            error = OverloadedError("others are being given experts' numbers; try again after 1 s")
            error.retry_after_s = 1.0
            raise error
        self._waiting += 1
        try:
            return await self._run(lambda: render(pattern, query.get("after", "")))
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Make no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        await self._page.close()

    async def _run(self, render: Callable[[], Exposition]) -> Exposition:
        return await asyncio.get_running_loop().run_in_executor(self._thread, render)
