"""Exceptions that nobody foresaw, where no caller would see them: told once with a traceback, and made one typed error.

A callback, a task that nobody awaits and a thread's target have nobody above them. What they raise must fail the call
that it belongs to and reach the log; it must not vanish, end a loop, or take the answers of others along.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from p2pmoe.errors import P2PMoEError, UnexpectedError, describe

log = logging.getLogger(__name__)

QUIET_S: Final = 10.0
"""A place whose exceptions a stranger may cause tells of one in so many seconds."""
_MAX_PLACES: Final = 1024
_told_at: dict[str, float] = {}


def unexpected(where: str, error: BaseException, *, by_a_stranger: bool = False) -> UnexpectedError:
    """Tell the log of an exception that nobody foresaw; the error for whoever waits. Never raises.

    Args:
        where: what was being done, as the beginning of a sentence: "looking at an answer of ffn.3".
        error: the exception; it becomes the `__cause__`.
        by_a_stranger: one line in `QUIET_S` at most for this place: the log is not a stranger's to fill.
    """
    fault = UnexpectedError(f"{where} failed unexpectedly: {describe(error)}; the log has its traceback")
    fault.__cause__ = error
    if not by_a_stranger or _is_due(where):
        try:
            log.error("%s failed unexpectedly", where, exc_info=error)
        except BaseException:  # noqa: BLE001, S110 - a handler of the user's, a `__str__`; there is nobody left to tell
            pass
    return fault


def attempt(where: str, function: Callable[..., object], *args: Any, by_a_stranger: bool = False) -> None:
    """Call one of several functions that have nothing to do with each other: what it raises is told, no more."""
    try:
        function(*args)
    except Exception as error:  # noqa: BLE001 - that is what this is for
        unexpected(where, error, by_a_stranger=by_a_stranger)


def watch(task: asyncio.Task[Any], where: str, *, by_a_stranger: bool = False) -> None:
    """Tell the log when a task that nobody awaits fails; an error of ours is its own business."""
    task.add_done_callback(partial(_look, where, by_a_stranger))


def own(
    coroutine: Coroutine[Any, Any, None], owned: set[asyncio.Task[None]], where: str, *, by_a_stranger: bool = False
) -> asyncio.Task[None]:
    """Run a coroutine in the background, as a task that is in `owned` until it ends. On the running loop."""
    task = asyncio.get_running_loop().create_task(coroutine)
    owned.add(task)
    task.add_done_callback(owned.discard)
    watch(task, where, by_a_stranger=by_a_stranger)
    return task


def run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run until `loop.stop()`, whatever callbacks raise: asyncio lets SystemExit and KeyboardInterrupt through.

    For a thread that exists for its loop, where nobody else can go on.
    """
    while True:
        try:
            loop.run_forever()
            return
        except BaseException as error:  # noqa: BLE001 - whoever waits for this loop waits for ever
            unexpected("a callback of an event loop", error)


def _look(where: str, by_a_stranger: bool, task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, P2PMoEError):
        unexpected(where, error, by_a_stranger=by_a_stranger)


def _is_due(where: str) -> bool:
    now = time.monotonic()
    if now - _told_at.get(where, float("-inf")) < QUIET_S:
        return False
    if len(_told_at) >= _MAX_PLACES:
        _told_at.clear()
    _told_at[where] = now
    return True
