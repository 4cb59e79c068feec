"""One greedy client with 64 connections against an honest one with a single connection, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Sequence

import pytest
import torch
from door_kit import ALICE, BOB, Guarded, call, client, guard
from swarm_kit import WAIT_S, make_backend, until
from torch import nn

from p2pmoe.errors import OverloadedError
from p2pmoe.identity import Identity
from p2pmoe.rpc.http.client import HttpTransport

BATCH_S = 0.01
ROWS = 16  # of a call, and of a batch
HONEST, GREEDY = 1.0, 2.0
CONNECTIONS = 64


class Slow(nn.Module):
    """Takes `BATCH_S` for a batch, and notes whose it was."""

    def __init__(self, served: list[float]) -> None:
        super().__init__()
        self.served = served
        self.armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.armed:
            time.sleep(BATCH_S)
            self.served.append(float(x[0, 0]))
        return x


@contextlib.asynccontextmanager
async def greedy_client(transport: HttpTransport, node: Guarded, uids: Sequence[str]) -> AsyncIterator[None]:
    """Asks for more on every connection, all the time."""

    async def ask(uid: str) -> None:
        while True:
            await call(transport, node.endpoint, ROWS, uid=uid, value=GREEDY)

    tasks = [asyncio.create_task(ask(uids[index % len(uids)])) for index in range(CONNECTIONS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.mark.parametrize(
    ("greedy_uids", "keys", "expected"),
    [
        (["ffn.0"], (ALICE, BOB), "half"),
        ([f"ffn.{index}" for index in range(1, 9)], (ALICE, BOB), "half"),
        (["ffn.0"], (ALICE, None), "half"),
        (["ffn.0"], (None, None), "what is left"),  # one address, so one caller: shows what fairness is worth
    ],
    ids=["one expert", "many experts", "greedy is anonymous", "both are one caller"],
)
async def test_the_honest_client_gets_its_half(
    greedy_uids: list[str],
    keys: tuple[Identity | None, Identity | None],
    expected: str,
) -> None:
    served: list[float] = []
    experts = [Slow(served) for _ in range(9)]
    backends = [make_backend(f"ffn.{index}", expert, max_batch_size=ROWS) for index, expert in enumerate(experts)]
    waits: list[float] = []
    with guard(backends=backends) as node:
        for expert in experts:
            expert.armed = True
        async with client(keys[0]) as honest, client(keys[1]) as greedy, greedy_client(greedy, node, greedy_uids):
            await until(lambda: len(served) > 8)
            deadline = time.monotonic() + WAIT_S / 2
            while len(waits) < 30 and time.monotonic() < deadline:
                started = time.monotonic()
                await call(honest, node.endpoint, ROWS, value=HONEST)
                waits.append(time.monotonic() - started)
    window = served[served.index(HONEST) : len(served) - served[::-1].index(HONEST)]
    share, p50 = window.count(HONEST) / len(window), statistics.median(waits)
    print(f"share {share:.2f}, p50 {p50 * 1e3:.0f} ms of batches of {BATCH_S * 1e3:.0f} ms, {len(waits)} calls")
    if expected == "half":
        assert 0.35 <= share <= 0.6
        assert p50 <= 5 * BATCH_S
    else:
        assert share < 0.1
        assert p50 > 20 * BATCH_S


async def test_a_greedy_client_cannot_fill_the_queue() -> None:
    served: list[float] = []
    expert = Slow(served)
    with guard(backends=[make_backend("ffn.0", expert, max_batch_size=ROWS, max_queue_size=8)]) as node:
        expert.armed = True
        async with client(ALICE) as honest, client(BOB) as greedy, greedy_client(greedy, node, ["ffn.0"]):
            await until(lambda: len(served) > 4)
            results = [(await call(honest, node.endpoint, ROWS, value=HONEST))[0] for _ in range(10)]
            assert not any(isinstance(each, Exception) for each in results)
            refused = await call(greedy, node.endpoint, ROWS, 16, value=GREEDY)
            assert any(isinstance(each, OverloadedError) for each in refused)
