"""An in-memory network: callers and services in one process, over links that fail by script. No sockets, no HTTP.

    network = MemoryNetwork()
    network.register(alice, service)
    swarm = Swarm(directory=StaticDirectory(...), transport=MemoryTransport(network))
    network.fail_at(alice, 3, "lose_answer")  # alice computes the third exchange, its answer never arrives
    network.link(alice).cut()

Rules:
1. Frames are encoded, cut into chunks and decoded as over HTTP: neither side sees the other's memory.
2. Exchanges of a link are counted from 1 in the order in which they begin; a script names them by their number.
3. A failure is a broken connection to the caller, and a caller who left to the service.
4. A service runs on the event loop that calls it: let one `Swarm` at a time use a network.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import msgspec

from p2pmoe.errors import BadRequestError, PeerUnreachableError
from p2pmoe.protocol.frames import EncodedFrame, FrameLimits, FrameReader
from p2pmoe.protocol.messages import ResponseHeader, response_decoder
from p2pmoe.rpc.base import Reply, Service
from p2pmoe.rpc.budget import SharedBudget
from p2pmoe.rpc.exchange import ServerExchange
from p2pmoe.rpc.expert_pages import EXPERTS_PATH, page_of_query
from p2pmoe.types import LOCAL_CALLER, Caller, Endpoint

Failure = Literal["refuse", "break_request", "break_answer", "lose_answer"]
"""What the caller loses: nobody listens; the last call is cut in two, those before it are computed and no result
arrives; one result arrives; everything is computed and no result arrives."""
_WITHHELD = ("break_request", "lose_answer")


@dataclass(slots=True)
class _Host:
    service: Service
    limits: FrameLimits
    budget: SharedBudget
    max_calls: int


class Link:
    """The way to one endpoint. Every attribute may be changed at any time, from any thread.

    delay_s: how long each exchange travels before it arrives; `math.inf` makes the peer silent.
    loss: the probability that an exchange is refused.
    chunk_bytes: the size of the pieces in which bytes arrive.
    exchanges, calls, documents: how many were begun.
    """

    def __init__(self, endpoint: Endpoint, dice: random.Random) -> None:
        self.delay_s = 0.0
        self.loss = 0.0
        self.chunk_bytes = 64 * 1024
        self.exchanges = self.calls = self.documents = 0
        self._endpoint = endpoint
        self._dice = dice
        self._script: dict[int, Failure] = {}
        self._running: set[_Connection] = set()
        self._is_cut = False

    def __repr__(self) -> str:
        state = "cut" if self._is_cut else "up"
        return f"<Link to {self._endpoint}: {state}, {self.exchanges} exchanges, {len(self._running)} running>"

    def cut(self) -> None:
        """Break every running exchange and refuse new ones until `restore`."""
        self._is_cut = True
        for connection in list(self._running):
            connection.break_off()

    def restore(self) -> None:
        """Let new exchanges through again."""
        self._is_cut = False

    def fail_at(self, number: int, failure: Failure = "refuse") -> None:
        """Let the exchange of this number fail; numbers count from 1, see `exchanges`."""
        self._script[number] = failure

    @contextlib.contextmanager
    def _connect(self, calls: int) -> Iterator[_Connection]:
        self.exchanges += bool(calls)
        self.calls += calls
        self.documents += not calls
        failure = self._script.pop(self.exchanges, None) if calls else None
        connection = _Connection(self._endpoint, failure)
        if self._is_cut or failure == "refuse" or self._dice.random() < self.loss:
            raise connection.error()
        self._running.add(connection)
        try:
            yield connection
        finally:
            self._running.discard(connection)


class _Connection:
    """One exchange on a link, from the caller's side. Made on the caller's loop."""

    def __init__(self, endpoint: Endpoint, failure: Failure | None) -> None:
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._broken = asyncio.Event()
        self.wakeup = asyncio.Event()
        self.failure = failure

    def error(self) -> PeerUnreachableError:
        return PeerUnreachableError(f"{self._endpoint} cannot be reached: the link is down")

    def break_off(self) -> None:
        """Called on any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._broken.set)

    async def wait_for(self, awaitable: Awaitable[object]) -> None:
        """Wait, but no longer than the connection holds. Raises PeerUnreachableError."""
        waits = [asyncio.ensure_future(awaitable), asyncio.ensure_future(self._broken.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._broken.is_set():
            raise self.error()


class MemoryNetwork:
    """Services by endpoint. `sleep` waits out the links' delays; `seed` decides which exchanges a lossy link loses."""

    def __init__(self, *, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep, seed: int = 0) -> None:
        self.sleep = sleep
        self._dice = random.Random(seed)  # noqa: S311
        self._hosts: dict[Endpoint, _Host] = {}
        self._links: dict[Endpoint, Link] = {}

    def __repr__(self) -> str:
        return f"<MemoryNetwork: {len(self._hosts)} services>"

    def register(
        self,
        endpoint: Endpoint,
        service: Service,
        *,
        limits: FrameLimits | None = None,
        max_calls: int = 1024,
        max_inflight_bytes: int = 2**31,
    ) -> Link:
        """Let `service` answer at `endpoint`, within the same limits as over HTTP; the link that leads there."""
        self._hosts[endpoint] = _Host(service, limits or FrameLimits(), SharedBudget(max_inflight_bytes), max_calls)
        return self.link(endpoint)

    def unregister(self, endpoint: Endpoint) -> None:
        """The service is gone: running exchanges break, new ones are refused."""
        self._hosts.pop(endpoint, None)
        for connection in list(self.link(endpoint)._running):  # noqa: SLF001
            connection.break_off()

    def link(self, endpoint: Endpoint) -> Link:
        """The link to an endpoint, whether or not somebody listens there."""
        return self._links.setdefault(endpoint, Link(endpoint, self._dice))

    def fail_at(self, endpoint: Endpoint, number: int, failure: Failure = "refuse") -> None:
        """`Link.fail_at` of the link to `endpoint`."""
        self.link(endpoint).fail_at(number, failure)

    @contextlib.asynccontextmanager
    async def connect(self, endpoint: Endpoint, calls: int) -> AsyncGenerator[tuple[_Host, _Connection], None]:
        """For the transport: who answers there, once the bytes have travelled. Raises PeerUnreachableError."""
        link = self.link(endpoint)
        with link._connect(calls) as connection:  # noqa: SLF001
            if link.delay_s:
                await connection.wait_for(self.sleep(link.delay_s))
            host = self._hosts.get(endpoint)
            if host is None:
                raise connection.error()
            yield host, connection


class MemoryTransport:
    """A `Transport` over a `MemoryNetwork`. Services see `caller`: there is no door to pass and no session."""

    def __init__(
        self, network: MemoryNetwork, limits: FrameLimits | None = None, *, caller: Caller = LOCAL_CALLER
    ) -> None:
        self._network = network
        self._caller = caller
        self._limits = limits or FrameLimits()

    def __repr__(self) -> str:
        return f"<MemoryTransport over {self._network}>"

    async def exchange(
        self, endpoint: Endpoint, frames: Sequence[EncodedFrame], inspect: Callable[[ResponseHeader], bool]
    ) -> AsyncGenerator[Reply, None]:
        """See `Transport.exchange`."""
        async with self._network.connect(endpoint, len(frames)) as (host, connection):
            link = self._network.link(endpoint)
            wake = connection.wakeup.set
            calls = ServerExchange(
                host.service,
                host.limits,
                host.budget.of(self._caller.key),
                max_calls=host.max_calls,
                wake=wake,
                caller=self._caller,
            )
            reader: FrameReader[ResponseHeader] = FrameReader(response_decoder, self._limits)
            try:
                _deliver(calls, frames, link.chunk_bytes, whole=connection.failure != "break_request")
                while True:
                    connection.wakeup.clear()
                    complete = not calls.outstanding
                    if complete and connection.failure in _WITHHELD:
                        raise connection.error()
                    for result in calls.take_results() if connection.failure not in _WITHHELD else ():
                        for frame in _read(reader, result, link.chunk_bytes, inspect):
                            yield frame
                        if connection.failure == "break_answer":
                            raise connection.error()
                    if complete:
                        return
                    await connection.wait_for(connection.wakeup.wait())
            finally:
                calls.close()

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        """See `Transport.get_json`; the documents are `/p2pmoe/v1/experts` and those below it."""
        async with self._network.connect(endpoint, 0) as (host, _):
            where = urlsplit(path)
            uid = where.path.removeprefix(EXPERTS_PATH).removeprefix("/")
            if not where.path.startswith(EXPERTS_PATH):
                raise BadRequestError(f"there is no document {path}")
            page = page_of_query(dict(parse_qsl(where.query)))
            document = host.service.expert(uid) if uid else host.service.experts(*page)
            return msgspec.json.decode(msgspec.json.encode(document))

    async def close(self) -> None:
        """See `Transport.close`; there is nothing to close."""


def _deliver(calls: ServerExchange, frames: Sequence[EncodedFrame], chunk_bytes: int, *, whole: bool) -> None:
    data = b"".join(buffer for frame in frames for buffer in frame.buffers)
    if not whole:
        data = data[: len(data) - (frames[-1].nbytes + 1) // 2]
    for chunk in _chunks(data, chunk_bytes):
        calls.feed(chunk)
    if whole:
        calls.feed_eof()


def _chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def _read(
    reader: FrameReader[ResponseHeader], result: EncodedFrame, size: int, inspect: Callable[[ResponseHeader], bool]
) -> Iterator[Reply]:
    for chunk in _chunks(b"".join(result.buffers), size):
        reader.feed(chunk)
        yield from reader.accepted_frames(inspect)
