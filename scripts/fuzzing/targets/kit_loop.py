"""An event loop that is stepped by hand."""

from __future__ import annotations

import asyncio
from typing import Any


class StepLoop:
    """An event loop of one's own; whatever fails in a callback comes out of `settle`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._failed)
        self._failures: list[BaseException] = []

    def run(self, coroutine: Any) -> Any:
        result = self.loop.run_until_complete(coroutine)
        self._raise()
        return result

    def settle(self) -> None:
        """Let callbacks run that are due."""
        for _ in range(2):
            self.loop.run_until_complete(asyncio.sleep(0))
        self._raise()

    def _raise(self) -> None:
        failures, self._failures = self._failures, []
        if failures:
            raise failures[0]

    def _failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._failures.append(context.get("exception") or RuntimeError(context["message"]))
