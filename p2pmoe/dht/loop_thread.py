"""An event loop on a thread of its own, and calls into it from any thread or loop. Knows nothing of the DHT."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import Any, TypeVar

from p2pmoe import forks
from p2pmoe.errors import ClosedError, UnexpectedError
from p2pmoe.faults import unexpected

T = TypeVar("T")


class LoopThread:
    """Runs `main(ready)` on a daemon thread until `stop`; everything `submit` started is cancelled then.

    `main` resolves `ready` when calls may come in; what it raises before that is raised by `start`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._stopping: asyncio.Event | None = None
        self._calls: set[Future[Any]] = set()
        self._closed = False
        self._fault: UnexpectedError | None = None
        """Why it ended by itself."""
        self._is_parents = False
        forks.tell(self)

    @property
    def is_parents(self) -> bool:
        """Whether it was started by the process that this one was forked from."""
        return self._is_parents

    @property
    def is_running(self) -> bool:
        return self.loop is not None and not self._closed

    def start(
        self, main: Callable[[Callable[[], None], asyncio.Event], Coroutine[Any, Any, None]], timeout_s: float
    ) -> None:
        """Blocks until `main` called its first argument. `main` returns soon after its second, the event, is set.

        Raises whatever `main` raised before it was ready; TimeoutError when it takes longer than `timeout_s`.
        """
        if self._is_parents:
            raise self._closed_error("")
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(main, ready), name=self.name, daemon=True)
        self._thread.start()
        try:
            ready.result(timeout_s)
        except FutureTimeoutError as error:
            self.stop()
            raise TimeoutError(f"{self.name} did not start within {timeout_s:.0f} s") from error
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the loop and its thread, within `timeout_s`. Calls under way raise ClosedError. Idempotent."""
        with self._lock:
            self._closed = True
            loop, stopping = self.loop, self._stopping
        if loop is not None and stopping is not None:
            try:
                loop.call_soon_threadsafe(stopping.set)
            except RuntimeError:
                pass  # it has ended by itself
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        for call in tuple(self._calls):
            call.cancel()

    def submit(self, make: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run `make()` on the loop. Cancelling the future cancels it. Raises ClosedError before and after."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed or self.loop is None:
                raise self._closed_error("is not running; call start() first, and nothing after close()")
            try:
                self.loop.call_soon_threadsafe(self._begin, make, future)
            except RuntimeError as error:  # it ended a moment ago
                raise self._closed_error("was closed") from error
            self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    async def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """`submit`, awaited from whatever loop the caller is on."""
        if asyncio.get_running_loop() is self.loop:
            return await make()
        future = self.submit(make)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._closed and not (caller is not None and caller.cancelling()):
                raise self._closed_error("was closed during the call") from None
            raise

    def _run(
        self, main: Callable[[Callable[[], None], asyncio.Event], Coroutine[Any, Any, None]], ready: Future[None]
    ) -> None:
        try:
            # The selector loop on every system: it lets the socket be drained, and Windows' other loop does not.
            with asyncio.Runner(loop_factory=forks.new_selector_loop) as runner:
                runner.run(self._main(main, ready))
        except BaseException as error:  # noqa: BLE001 - it is raised again where somebody waits for it
            if not ready.done():
                ready.set_exception(error)
            else:
                self._fault = unexpected(f"the thread {self.name}", error)
        finally:
            self._closed = True
            for call in tuple(self._calls):
                call.cancel()

    async def _main(
        self, main: Callable[[Callable[[], None], asyncio.Event], Coroutine[Any, Any, None]], ready: Future[None]
    ) -> None:
        with self._lock:
            self._stopping = asyncio.Event()
            self.loop = asyncio.get_running_loop()
            if self._closed:
                return
        await main(lambda: ready.set_result(None), self._stopping)

    def became_a_child(self) -> None:
        """See `forks`: the thread stayed in the parent."""
        self._lock = threading.Lock()
        if self._thread is not None:
            self._is_parents = self._closed = True
            self.loop = self._thread = self._stopping = None
            self._calls = set()

    def _closed_error(self, how: str) -> ClosedError:
        if self._is_parents:
            return forks.forked(f"started {self.name}", "make a new one in the worker")
        if self._fault is not None:
            return ClosedError(f"{self.name} has ended by itself, make it anew: {self._fault}")
        return ClosedError(f"{self.name} {how}")

    def _begin(self, make: Callable[[], Coroutine[Any, Any, T]], future: Future[T]) -> None:
        if future.cancelled() or self.loop is None:
            return
        task = self.loop.create_task(_made(make))
        # The loop keeps weak references only; the future's callback keeps this one alive.
        future.add_done_callback(partial(self._cancel_task, task))
        task.add_done_callback(partial(_settle, future))

    def _cancel_task(self, task: asyncio.Task[Any], future: Future[Any]) -> None:
        if future.cancelled() and not task.done() and self.loop is not None:
            try:
                self.loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:
                pass  # the loop is closed, and with it the task


async def _made(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What `make` gives, and what it raises, for whoever waits; nothing that would end the loop."""
    try:
        return await make()
    except (KeyboardInterrupt, SystemExit) as error:
        raise unexpected("a coroutine on an event loop", error) from error


def _settle(future: Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        future.cancel()
        return
    error = task.exception()
    if not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())
