"""The announcer: declares, refreshes, tries on after a failure, withdraws."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from swarm_kit import ALICE, until

from p2pmoe import faults
from p2pmoe.errors import DelegationError, EncodeError, PeerUnreachableError
from p2pmoe.server import announcer as module
from p2pmoe.server.announcer import Announcer
from p2pmoe.types import Endpoint


class FakeDirectory:
    def __init__(self) -> None:
        self.declared = 0
        self.withdrawn: list[str] = []
        self.broken = False
        self.error: Exception | None = None
        self.last: tuple[Mapping[str, str], Endpoint, float] | None = None

    async def declare(self, schemas: Mapping[str, str], endpoint: Endpoint, ttl_s: float) -> None:
        self.declared += 1
        self.last = (schemas, endpoint, ttl_s)
        if self.error is not None:
            raise self.error
        if self.broken:
            raise PeerUnreachableError("nobody is there")

    async def withdraw(self, uids: Sequence[str]) -> None:
        self.withdrawn += uids
        if self.broken:
            raise PeerUnreachableError("nobody is there")


def make(directory: Any, schemas: dict[str, str] | None = None) -> Announcer:
    schemas = {"ffn.0": "d"} if schemas is None else schemas
    return Announcer(directory, schemas, ALICE, ttl_s=60.0, refresh_s=0.01)


async def test_it_declares_refreshes_and_withdraws() -> None:
    directory = FakeDirectory()
    announcer = make(directory)
    await announcer.start()
    assert directory.last == ({"ffn.0": "d"}, ALICE, 60.0)
    await until(lambda: directory.declared > 3)
    await announcer.close()
    await announcer.close()
    assert directory.withdrawn == ["ffn.0"]
    declared = directory.declared
    await asyncio.sleep(0.03)
    assert directory.declared == declared


async def test_a_failure_is_one_line_and_tried_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    caplog.set_level("INFO")
    directory = FakeDirectory()
    directory.broken = True
    announcer = make(directory)
    await announcer.start()
    await until(lambda: directory.declared > 3)
    directory.broken = False
    await until(lambda: "again" in caplog.text)
    assert caplog.text.count("could not declare") == 1
    directory.broken = True
    await announcer.close()
    assert "their records expire" in caplog.text


async def test_without_experts_there_is_nothing_to_say() -> None:
    directory = FakeDirectory()
    announcer = make(directory, {})
    await announcer.start()
    await announcer.close()
    assert (directory.declared, directory.withdrawn) == (0, [])
    assert "0 experts" in repr(announcer)


async def test_what_nobody_foresaw_is_told_and_tried_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    monkeypatch.setattr(faults, "_told_at", {})
    directory = FakeDirectory()
    announcer = make(directory)
    await announcer.start()
    real, failures = directory.declare, iter([True, True])

    async def declare(*arguments: Any) -> None:
        if next(failures, False):
            raise TypeError("nobody foresaw it")
        await real(*arguments)

    directory.declare = declare
    declared = directory.declared
    await until(lambda: directory.declared > declared + 1)
    await announcer.close()
    assert [each.getMessage() for each in caplog.records if each.exc_info] == [
        "declaring 1 experts failed unexpectedly"
    ]


@pytest.mark.parametrize("error", [EncodeError("too many"), DelegationError("not ours")])
async def test_what_can_never_be_announced_ends_the_start(error: Exception) -> None:
    directory = FakeDirectory()
    directory.error = error
    with pytest.raises(type(error), match=str(error)):
        await make(directory).start()
    assert directory.declared == 1


async def test_a_delegation_that_ends_is_one_error_and_rarely_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    directory = FakeDirectory()
    announcer = make(directory)
    await announcer.start()
    monkeypatch.setattr(module, "_RETRY_FOR_GOOD_S", 0.02)
    directory.error = DelegationError("our delegation ended; ask the owner")
    declared = directory.declared
    await until(lambda: directory.declared >= declared + 3)
    directory.error = None
    await until(lambda: "again" in caplog.text)
    assert caplog.text.count("1 experts are announced no more: our delegation ended; ask the owner") == 1
    await announcer.close()


async def test_tries_come_further_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 2.0)
    pauses: list[float] = []
    directory = FakeDirectory()
    directory.broken = True
    announcer = Announcer(directory, {"ffn.0": "d"}, ALICE, ttl_s=60.0, refresh_s=20.0)  # type: ignore[arg-type]

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 6:
            raise asyncio.CancelledError

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await announcer._refresh(False)
    assert pauses == [2.0, 4.0, 8.0, 16.0, 20.0, 20.0]
