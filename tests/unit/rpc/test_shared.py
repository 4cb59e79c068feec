"""One computation for however many ask."""

from __future__ import annotations

import asyncio

import pytest

from p2pmoe.rpc.http.shared import Shared


async def test_all_who_ask_meanwhile_get_one_result() -> None:
    made, go = 0, asyncio.Event()

    async def make() -> int:
        nonlocal made
        made += 1
        await go.wait()
        return made

    shared = Shared(make, keep_s=60.0)
    asking = [asyncio.create_task(shared.get()) for _ in range(50)]
    await asyncio.sleep(0)
    asking[0].cancel()  # who leaves does not end it for the others
    go.set()
    async with asyncio.timeout(2):
        assert await asyncio.gather(*asking[1:]) == [1] * 49
        assert await shared.get() == 1  # kept
    assert made == 1


async def test_what_is_too_old_is_made_anew() -> None:
    made = 0

    async def make() -> int:
        nonlocal made
        made += 1
        return made

    shared = Shared(make, keep_s=0.0)
    assert [await shared.get(), await shared.get()] == [1, 2]


async def test_an_error_reaches_everybody_and_is_not_kept() -> None:
    fails = True

    async def make() -> str:
        await asyncio.sleep(0)
        if fails:
            raise ValueError("no")
        return "yes"

    shared = Shared(make, keep_s=60.0)
    outcomes = await asyncio.gather(shared.get(), shared.get(), return_exceptions=True)
    assert [str(each) for each in outcomes] == ["no", "no"]
    fails = False
    assert await shared.get() == "yes"


async def test_closing_ends_what_is_being_made() -> None:
    shared = Shared(lambda: asyncio.sleep(60.0), keep_s=1.0)
    asking = asyncio.create_task(shared.get())
    await asyncio.sleep(0)
    await shared.close()
    with pytest.raises(asyncio.CancelledError):
        await asking
