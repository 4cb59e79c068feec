"""A future that tells its listeners at once. Knows nothing of what it stands for.

asyncio calls a future's callbacks in the loop's next round; a result that passes three hands (pool, replay window,
exchange) would take three rounds, each with a system call, on a path that has 0.5 ms in all (docs/benchmarks.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class PromptFuture(asyncio.Future[T]):
    """An `asyncio.Future` with listeners beside its callbacks. Set and cancelled on its loop, like any other."""

    _listeners: list[Callable[[PromptFuture[T]], object]] | None = None

    def listen(self, listener: Callable[[PromptFuture[T]], object]) -> None:
        """Call `listener` with this future the moment it is done. A failure of it is told to the loop."""
        if self.done():
            self._call(listener)
        elif self._listeners is None:
            self._listeners = [listener]
        else:
            self._listeners.append(listener)

    def set_result(self, result: T, /) -> None:
        super().set_result(result)
        self._tell()

    def set_exception(self, exception: type | BaseException, /) -> None:
        super().set_exception(exception)
        self._tell()

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled:
            self._tell()
        return cancelled

    def _tell(self) -> None:
        listeners, self._listeners = self._listeners, None
        for listener in listeners or ():
            self._call(listener)

    def _call(self, listener: Callable[[PromptFuture[T]], object]) -> None:
        try:
            listener(self)
        except Exception as error:  # noqa: BLE001 - one listener must not take the result from the others
            self.get_loop().call_exception_handler(
                {"message": f"a listener failed: {listener!r}", "exception": error, "future": self}
            )


def when_done(future: asyncio.Future[T], callback: Callable[[asyncio.Future[T]], object]) -> None:
    """At once where the future can, else in the loop's next round."""
    if isinstance(future, PromptFuture):
        future.listen(callback)
    else:
        future.add_done_callback(callback)
