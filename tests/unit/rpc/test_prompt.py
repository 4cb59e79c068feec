"""A future whose listeners are told at once, beside being an asyncio future like any other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from p2pmoe.rpc.prompt import PromptFuture, when_done


async def test_listeners_hear_before_the_setter_goes_on() -> None:
    future: PromptFuture[int] = PromptFuture()
    heard: list[Any] = []
    future.listen(lambda done: heard.append(("first", done.result())))
    future.listen(lambda done: heard.append(("second", done.result())))
    future.set_result(3)
    assert heard == [("first", 3), ("second", 3)]
    future.listen(lambda done: heard.append(("late", done.result())))
    assert heard[-1] == ("late", 3)
    assert await future == 3


async def test_failure_and_cancellation_are_heard_too() -> None:
    failed: PromptFuture[int] = PromptFuture()
    cancelled: PromptFuture[int] = PromptFuture()
    heard: list[Any] = []
    failed.listen(lambda done: heard.append(str(done.exception())))
    cancelled.listen(lambda done: heard.append(done.cancelled()))
    failed.set_exception(ValueError("why"))
    assert cancelled.cancel()
    assert not cancelled.cancel()
    assert heard == ["why", True]
    with pytest.raises(asyncio.CancelledError):
        await cancelled


async def test_a_listener_that_fails_takes_nothing_from_the_others() -> None:
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))
    future: PromptFuture[int] = PromptFuture()
    heard: list[int] = []
    future.listen(lambda done: 1 / 0)
    future.listen(lambda done: heard.append(done.result()))
    future.set_result(1)
    assert heard == [1]
    assert isinstance(told[0], ZeroDivisionError)


async def test_any_future_can_be_waited_for() -> None:
    plain: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    heard: list[int] = []
    when_done(plain, lambda done: heard.append(done.result()))
    plain.set_result(2)
    await asyncio.sleep(0)
    assert heard == [2]
