"""Small swarms for tests: experts, peers alice, bob and carol, and the two networks that every behaviour is run on."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import p2pmoe
from p2pmoe.client.directory import StaticDirectory
from p2pmoe.config import HttpConfig, LimitsConfig
from p2pmoe.experts.directory import Provider
from p2pmoe.identity import Identity
from p2pmoe.metrics import NodeMetrics
from p2pmoe.protocol.frames import FrameLimits
from p2pmoe.rpc.base import Doorkeeper
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.rpc.http.server import HttpServer
from p2pmoe.rpc.memory import Link, MemoryNetwork, MemoryTransport
from p2pmoe.server.handlers import ExpertHandlers
from p2pmoe.server.runtime import Runtime
from p2pmoe.types import Endpoint, PeerId

WAIT_S = 10.0
"""No wait of any test is longer."""

ALICE, BOB, CAROL = (Endpoint(name, 1) for name in ("alice", "bob", "carol"))


def make_backend(
    uid: str,
    module: nn.Module | None = None,
    *,
    dim: int = 4,
    lr: float = 0.1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> p2pmoe.ExpertBackend:
    """A backend of `module`, or of a small feed-forward expert [B, dim] -> [B, dim] that `seed` and `uid` decide."""
    module = module or make_ffn(uid, dim, seed, dtype)
    if "args_schema" not in options and "kwargs_schema" not in options:
        options["args_schema"] = (p2pmoe.BatchTensorProto(dim, dtype=dtype),)
    parameters = list(module.parameters()) or [nn.Parameter(torch.zeros(1))]
    return p2pmoe.ExpertBackend(uid, module, optimizer(parameters, lr=lr), **options)


def make_ffn(uid: str, dim: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same parameters for the same uid and seed, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + sum(ord(c) * 31**i for i, c in enumerate(uid)) % 1_000_003)
        return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)).to(dtype)


class Gate(nn.Module):
    """An expert that waits until the test lets it go on; a test can see that it has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.begun = threading.Event()
        self.go = threading.Event()
        self.armed = False
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.armed:
            self.begun.set()
            assert self.go.wait(WAIT_S), "the test never opened the gate"
        return x * self.weight


class Failing(nn.Module):
    """An expert that fails when any row starts with a negative number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if (x[:, 0] < 0).any():
            raise RuntimeError("this expert dislikes negative numbers\nsecond line")
        return y


@dataclass
class Peer:
    """One node without a DHT: its experts, its device, its service."""

    name: str
    backends: dict[str, p2pmoe.ExpertBackend]
    runtime: Runtime
    handlers: ExpertHandlers
    endpoint: Endpoint
    link: Link | None = None
    """Only in memory."""
    stop: Callable[[], None] = field(default=lambda: None)

    @property
    def peer_id(self) -> PeerId:
        return PeerId(self.name)


@dataclass
class World:
    """Peers, the directory that knows them, and a swarm to call them through."""

    peers: dict[str, Peer]
    swarm: p2pmoe.Swarm
    directory: StaticDirectory
    network: MemoryNetwork

    def __getattr__(self, name: str) -> Peer:
        try:
            return self.peers[name]
        except KeyError:
            raise AttributeError(name) from None

    def backend(self, uid: str) -> p2pmoe.ExpertBackend:
        return next(peer.backends[uid] for peer in self.peers.values() if uid in peer.backends)

    def mixture(self, **options: Any) -> p2pmoe.RemoteMixtureOfExperts:
        torch.manual_seed(7)
        options = {"in_features": 4, "grid_size": (2, 2), "uid_prefix": "ffn", "k_best": 2} | options
        return p2pmoe.RemoteMixtureOfExperts(self.swarm, **options)


@contextlib.contextmanager
def open_world(
    hosts: Mapping[str, Iterable[p2pmoe.ExpertBackend]],
    *,
    carrier: str = "memory",
    limits: LimitsConfig | None = None,
    network: MemoryNetwork | None = None,
    **swarm_options: Any,
) -> Iterator[World]:
    """Peers by name with their experts, reachable in memory, over plain "http" or over "https".

    Options are those of `Swarm`.
    """
    network = network or MemoryNetwork()
    with contextlib.ExitStack() as stack:
        peers = {}
        for name, backends in hosts.items():
            peer = _make_peer(name, list(backends), stack)
            if carrier in ("http", "https"):
                identity = Identity.generate() if carrier == "https" else None
                served = serve_http(peer.handlers, limits, identity=identity)
                peer.endpoint, peer.stop = stack.enter_context(served)
            else:
                peer.link = network.register(peer.endpoint, peer.handlers, limits=FrameLimits())
                peer.stop = lambda endpoint=peer.endpoint: network.unregister(endpoint)
            peers[name] = peer
        directory = StaticDirectory(_providers(peers.values()))
        transport = MemoryTransport(network) if carrier == "memory" else HttpTransport()
        swarm = p2pmoe.Swarm(**{"directory": directory, "transport": transport, "timeout_s": WAIT_S} | swarm_options)
        stack.enter_context(swarm)
        yield World(peers, swarm, directory, network)


def _make_peer(name: str, backends: list[p2pmoe.ExpertBackend], stack: contextlib.ExitStack) -> Peer:
    metrics = NodeMetrics()
    handlers: list[ExpertHandlers] = []
    runtime = Runtime(
        [pool for backend in backends for pool in backend.get_pools()],
        on_batch=lambda *batch: handlers[0].observe_batch(*batch),  # noqa: PLW0108 - it is made later
    )
    handlers.append(ExpertHandlers(backends, [runtime], metrics=metrics, peer_id=name))
    runtime.start()
    stack.callback(runtime.close)
    return Peer(name, {each.name: each for each in backends}, runtime, handlers[0], Endpoint(name, 1))


def _providers(peers: Iterable[Peer]) -> dict[str, list[Provider]]:
    providers: dict[str, list[Provider]] = {}
    for peer in peers:
        for uid, backend in peer.backends.items():
            provider = Provider(peer.peer_id, peer.endpoint, backend.schema_digest, float("inf"), 1)
            providers.setdefault(uid, []).append(provider)
    return providers


@contextlib.contextmanager
def serve_http(
    service: Any,
    limits: LimitsConfig | None = None,
    config: HttpConfig | None = None,
    doorkeeper: Doorkeeper | None = None,
    *,
    identity: Identity | None = None,
) -> Iterator[tuple[Endpoint, Callable[[], None]]]:
    """An HTTP server in a loop thread of its own; its endpoint and how to stop it early. With an identity over TLS."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-http")
    thread.start()
    server = HttpServer(
        service,
        config or HttpConfig(tls=identity is not None),
        limits or LimitsConfig(),
        identity=identity,
        server_name="test",
        render_metrics=NodeMetrics().render,
        doorkeeper=doorkeeper,
    )

    def run(coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(WAIT_S)

    try:
        run(server.start())
        try:
            scheme, public_key = ("https", identity.public_key) if identity else ("http", None)
            yield Endpoint("127.0.0.1", server.port, scheme, public_key), lambda: run(server.close())
        finally:
            run(server.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


def grid_backends(rows: Iterable[int] = range(2), columns: int = 2, **options: Any) -> list[p2pmoe.ExpertBackend]:
    """Experts ffn.{row}.{column}."""
    return [make_backend(f"ffn.{row}.{column}", **options) for row in rows for column in range(columns)]


def run_threads(functions: Iterable[Callable[[], Any]], timeout_s: float = WAIT_S * 2) -> list[Any]:
    """Results of functions that run at the same time, begun together; the first error is raised."""
    functions = list(functions)
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(functions))

    def run(index: int, function: Callable[[], Any]) -> None:
        try:
            barrier.wait(WAIT_S)
            results[index] = function()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive(), "a thread did not come back"
    if errors:
        raise errors[0]
    return results


def threads_woken_by(prepare: str, look: str) -> str:
    """What a fresh process prints: how many threads of torch's team `look` woke, and that a large sum does wake some.

    `prepare` is run before, with torch imported and its team asleep.
    """
    program = (
        "import os, torch\n"
        "torch.set_num_threads(1)\n"  # else making the tensors wakes the team already
        f"large = torch.ones(1 << 21)\n{prepare}\n"
        "torch.set_num_threads(4)\n"
        "threads = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = threads()\n"
        f"{look}\n"
        "after = threads()\n"
        "large.sum()\n"
        "print(after - before, threads() > after)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def trusting_context() -> ssl.SSLContext:
    """TLS of a client that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until the condition holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the state belongs to another thread
            await asyncio.sleep(0.001)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes: -0.0 is not 0.0."""
    first, second = first.detach().contiguous(), second.detach().contiguous()
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
