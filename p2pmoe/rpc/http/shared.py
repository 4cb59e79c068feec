"""One computation for however many ask at the same time, and its result kept for a moment. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """What `make` gives, made anew at most once in `keep_s`. Belongs to one event loop.

    A caller that leaves does not end the making for the others; an error reaches everybody who waits, and is not kept.
    """

    def __init__(self, make: Callable[[], Awaitable[T]], keep_s: float) -> None:
        self._make, self._keep_s = make, keep_s
        self._task: asyncio.Task[T] | None = None
        self._kept: tuple[float, T] | None = None

    def __repr__(self) -> str:
        return f"<Shared: {'being made' if self._task else 'at rest'}>"

    async def get(self) -> T:
        """Raises what `make` raises."""
        if self._task is None:
            if self._kept is not None and asyncio.get_running_loop().time() < self._kept[0]:
                return self._kept[1]
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(_retrieve)
        return await asyncio.shield(self._task)

    async def close(self) -> None:
        """End what is being made."""
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> T:
        try:
            value = await self._make()
            self._kept = asyncio.get_running_loop().time() + self._keep_s, value
        finally:
            self._task = None
        return value


def _retrieve(task: asyncio.Task[object]) -> None:
    """Everybody who waited may have left before an error came."""
    if not task.cancelled():
        task.exception()
