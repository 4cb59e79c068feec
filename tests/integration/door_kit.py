"""A node behind a door, on loopback, and clients that come to it; for tests of who may call and how much."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from swarm_kit import WAIT_S, make_backend, open_world, serve_http

import p2pmoe
from p2pmoe.client.calls import CallGroup, make_call
from p2pmoe.client.exchange import Dispatcher
from p2pmoe.config import AccessConfig, HttpConfig, LimitsConfig
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.server.access import Access
from p2pmoe.server.quota import CallerQuota
from p2pmoe.types import Endpoint

NODE, ALICE, BOB = (Identity.from_seed(name.ljust(32, b"\0")) for name in (b"node", b"alice", b"bob"))
SWARM = SwarmKey(bytes(32))
X = torch.ones(1, 4)
ADMIN_TOKEN = b"a-token-that-only-the-admin-knows"


class Clock:
    """Seconds pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Guarded:
    """One expert behind a door, on loopback."""

    def __init__(self, endpoint: Endpoint, handlers: Any, access: Access, clock: Clock) -> None:
        self.endpoint = replace(endpoint, public_key=NODE.public_key)
        self.handlers, self.access, self.clock = handlers, access, clock


@contextlib.contextmanager
def guard(
    *,
    swarm_key: SwarmKey | None = None,
    limits: dict[str, Any] | None = None,
    host: str = "127.0.0.1",
    backends: Sequence[p2pmoe.ExpertBackend] = (),
    **config: Any,
) -> Iterator[Guarded]:
    clock = Clock()
    access = Access(AccessConfig(**config), NODE.public_key, clock=clock, swarm_key=swarm_key, admin_token=ADMIN_TOKEN)
    with open_world({"alice": backends or [make_backend("ffn.0")]}) as world:
        handlers = world.alice.handlers
        handlers._quota = CallerQuota(LimitsConfig(**limits or {}), clock=clock)
        with serve_http(handlers, config=HttpConfig(host=host), doorkeeper=access) as (endpoint, _):
            yield Guarded(endpoint, handlers, access, clock)


@contextlib.asynccontextmanager
async def client(identity: Identity | None = None, swarm_key: SwarmKey | None = None) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(identity=identity, swarm_key=swarm_key)
    try:
        yield transport
    finally:
        await transport.close()


async def call(
    transport: HttpTransport,
    endpoint: Endpoint,
    rows: int = 1,
    count: int = 1,
    *,
    uid: str = "ffn.0",
    value: float = 1.0,
) -> list[Any]:
    """The results of calls sent in one exchange; a refusal of the exchange is each one's result."""
    dispatcher = Dispatcher(transport, asyncio.get_running_loop())
    proto = p2pmoe.BatchTensorProto(4)
    calls = [
        make_call(endpoint, uid, "forward", [torch.full((rows, 4), value)], [proto], (proto,), timeout_s=WAIT_S)
        for _ in range(count)
    ]
    group = CallGroup(calls)
    dispatcher.submit(group)
    await group.wait_async(WAIT_S)
    results = group.results(WAIT_S)
    await dispatcher.close()
    return results


async def call_once(transport: HttpTransport, endpoint: Endpoint, rows: int = 1) -> torch.Tensor:
    result = (await call(transport, endpoint, rows))[0]
    if isinstance(result, Exception):
        raise result
    return result[0]  # type: ignore[no-any-return]
