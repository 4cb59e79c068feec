"""The composition root: a configuration becomes a running node. Nothing else builds parts across rooms.

Start, stage by stage: identity, experts, devices, HTTP, DHT, announcing. What fails in a stage is raised as its own
error, and everything that was started before is closed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from p2pmoe import __version__, forks
from p2pmoe.config import HttpConfig, NodeConfig
from p2pmoe.dht.addresses import is_wildcard, reached_at
from p2pmoe.dht.node import DHTNode
from p2pmoe.dht.observations import reachable_host
from p2pmoe.errors import ClosedError, ConfigError
from p2pmoe.experts.declarations import check_announceable
from p2pmoe.experts.directory import ExpertDirectory
from p2pmoe.experts.uid import first_repeated
from p2pmoe.faults import own, run_loop
from p2pmoe.identity import Identity, SwarmKey, load_admin_token
from p2pmoe.metrics import NodeMetrics
from p2pmoe.protocol.modes import as_in_a_new_thread
from p2pmoe.rpc.http.documents import HttpDocuments
from p2pmoe.rpc.http.server import HttpServer
from p2pmoe.server.access import Access
from p2pmoe.server.announcer import Announcer
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.descriptors import fit_connections
from p2pmoe.server.exposition import render_experts
from p2pmoe.server.handlers import ExpertHandlers
from p2pmoe.server.heartbeat import Heartbeat, describe_experts
from p2pmoe.server.hosting import check_limits, make_backends
from p2pmoe.server.keeping import Keeping
from p2pmoe.server.quota import CallerQuota
from p2pmoe.server.runtime import Runtime
from p2pmoe.server.screening import guard_experts
from p2pmoe.server.twin_watch import ASK_TIMEOUT_S, TwinWatch
from p2pmoe.types import Endpoint, PeerId, canonical_host, is_loopback

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Node:
    """A volunteer's node: experts, their devices, an HTTP service, a DHT node.

    Args:
        config: all settings; the defaults listen on loopback, on ports the system picks, with a fresh identity.
        backends: experts made in Python, besides those of `config.experts`.
        server_name: what `GET /v2` calls this software's version.

    Raises (from `start`):
        ConfigError, InvalidUidError: a setting is wrong.
        IdentityError: the key file, the swarm key or the delegation cannot be used.
        StateError: a checkpoint belongs to another expert than is to be hosted, none of an expert's is whole, or
            another node uses the folder.
        AddressInUseError: a port is taken.
        BootstrapError: none of `dht.initial_peers` answered.
    """

    def __init__(
        self,
        config: NodeConfig | None = None,
        backends: ExpertBackend | Sequence[ExpertBackend] = (),
        *,
        server_name: str = __version__,
    ) -> None:
        self.config = config or NodeConfig()
        backends = [backends] if isinstance(backends, ExpertBackend) else list(backends)
        self.backends: list[ExpertBackend] = list(backends)
        self.metrics = NodeMetrics()
        self._given = backends
        self._server_name = server_name
        self._drain_timeout_s = self.config.http.drain_timeout_s
        self._parts = contextlib.AsyncExitStack()
        self._identity: Identity | None = None
        self._swarm_key: SwarmKey | None = None
        self._doorkeeper: Access | None = None
        self._dht: DHTNode | None = None
        self._endpoint: Endpoint | None = None
        self._http: HttpServer | None = None
        self._quota = CallerQuota(self.config.limits, clock=time.monotonic)
        self.directory: ExpertDirectory | None = None
        self.announcer: Announcer | None = None
        self.handlers: ExpertHandlers | None = None
        self._keeping: Keeping | None = None
        self._close_by = 0.0
        self._begun = self._is_parents = False
        forks.tell(self)
        self.stage = "settings"
        """What `start` is doing, or was doing when it failed."""

    def __repr__(self) -> str:
        where = self._endpoint or "not started"
        return f"<Node {where}: {len(self.backends)} experts>"

    # -- what it is

    @property
    def peer_id(self) -> PeerId:
        """The name made from the node's public key. Raises ClosedError before `start`."""
        return _started(self._identity).peer_id

    @property
    def dht_address(self) -> str:
        """`HOST:PORT` for another node's or trainer's `initial_peers`."""
        return _started(self._dht).dht_address

    @property
    def endpoint(self) -> Endpoint:
        """Where calls are answered, as peers see it where our own address means nothing to them."""
        return self._as_seen(_started(self._endpoint))

    @property
    def dht(self) -> DHTNode:
        """The node's DHT node."""
        return _started(self._dht)

    @property
    def is_parents(self) -> bool:
        """Whether it was started by the process that this one was forked from: then nothing can be done with it."""
        return self._is_parents

    # -- life

    async def start(self) -> None:
        """Start everything; on an error nothing stays behind."""
        if self._is_parents:
            raise forks.forked("started the node", "make a new Node there")
        self._begun = True
        async with contextlib.AsyncExitStack() as parts:
            await self._start(parts)
            self._parts = parts.pop_all()
        logger.info("node %s serves %d experts at %s", self.peer_id, len(self.backends), self._endpoint)
        if self.backends:
            logger.info("%s", describe_experts((each.name, each.update_count) for each in self.backends))

    async def close(self, *, drain: bool = True) -> None:
        """Withdraw the experts, let running calls end for at most `http.drain_timeout_s`, stop. Safe to call twice."""
        if self._is_parents:
            return
        parts, self._parts = self._parts, contextlib.AsyncExitStack()
        if self.handlers is not None:
            self.handlers.drain()
        if not drain:
            self._drain_timeout_s = 0.0
        self._close_by = time.monotonic() + self._drain_timeout_s
        await parts.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- private

    def became_a_child(self) -> None:
        """See `forks`: the node's threads and connections stayed in the parent."""
        self._is_parents = self._begun

    async def _start(self, parts: contextlib.AsyncExitStack) -> None:
        config = self.config
        if config.torch_threads is not None:
            torch.set_num_threads(config.torch_threads)
        self.stage = "identity"
        self._identity = _open_identity(config)
        key_path = config.access.swarm_key_path
        self._swarm_key = None if key_path is None else SwarmKey.load(key_path)
        self._doorkeeper = _open_access(config, self._identity, self._swarm_key)
        self.stage = "experts"
        with as_in_a_new_thread():  # other threads train what is made here, in whatever mode this one is
            made = make_backends(config.experts, config.batching, config.optimizer, config.devices)
            self.backends = self._given + made
            check_limits(self.backends, config.limits)
            guard_experts(self.backends, config.gate, self.metrics)
        self._keeping = Keeping(config.state, config.experts.fresh, config.dht.swarm_id)
        self._keeping.restore(self.backends)
        parts.push_async_callback(self._stop_keeping)
        runtimes = self._start_runtimes(parts)
        self.handlers = ExpertHandlers(
            self.backends,
            runtimes.values(),
            metrics=self.metrics,
            peer_id=self._identity.peer_id,
            quota=self._quota,
            replay=self._keeping.replay,
        )
        for backend in self.backends:
            for pool in backend.get_pools():
                runtimes[str(backend.device)].add(pool)
        self._keeping.start(self.handlers, {backend: runtimes[str(backend.device)] for backend in self.backends})
        self.stage = "http"
        await self._start_http(parts, self.handlers)
        self.stage = "dht"
        await self._start_dht(parts, self._identity)
        self.stage = "serving"
        self._watch(runtimes)
        self._keeping.watch(self.metrics)
        self._start_heartbeat(parts)

    async def _stop_keeping(self) -> None:
        """Within what is left of the drain timeout, and a second of it at least."""
        keeping = _started(self._keeping)
        left_s = max(1.0, self._close_by - time.monotonic())
        await _in_thread(partial(keeping.close, left_s))

    def _start_runtimes(self, parts: contextlib.AsyncExitStack) -> dict[str, Runtime]:
        if (twice := first_repeated(backend.name for backend in self.backends)) is not None:
            raise ConfigError(f"two experts have the same uid: {twice}")
        runtimes: dict[str, Runtime] = {}
        for name in dict.fromkeys(str(backend.device) for backend in self.backends):
            runtimes[name] = Runtime(device=name, on_batch=lambda *batch: _started(self.handlers).observe_batch(*batch))
            runtimes[name].start()
            parts.push_async_callback(_in_thread, runtimes[name].close)
        return runtimes

    async def _start_http(self, parts: contextlib.AsyncExitStack, handlers: ExpertHandlers) -> None:
        config = self.config.http
        server = HttpServer(
            handlers,
            config,
            fit_connections(self.config.limits),
            identity=_started(self._identity) if config.tls else None,
            server_name=self._server_name,
            render_metrics=self.metrics.render,
            render_experts=partial(render_experts, self.metrics),
            doorkeeper=self._doorkeeper,
        )
        await server.start()
        self._http = server
        parts.push_async_callback(server.close)
        parts.push_async_callback(lambda: server.drain(self._drain_timeout_s))
        public_key = _started(self._identity).public_key
        port = config.announce_port or server.port
        if is_wildcard(config.host) and not config.announce_host and is_loopback(_announced_host(config)):
            logger.warning(
                "calls are taken on all interfaces, but this machine has loopback alone: nobody else reaches it until "
                "it has a network (or http.announce_host says where it is reached)"
            )
        if config.announce_port and not config.port:
            logger.warning(
                "http.announce_port = %d with http.port = 0: the port mapping has to lead to port %d, which the system "
                "picked for this start only; set http.port",
                port,
                server.port,
            )
        self._endpoint = Endpoint(_announced_host(config), port, "https" if config.tls else "http", public_key)

    async def _start_dht(self, parts: contextlib.AsyncExitStack, identity: Identity) -> None:
        config = self.config.dht
        dht = DHTNode(identity, config, swarm_key=self._swarm_key)
        schemas = {backend.name: backend.schema_digest for backend in self.backends}
        check_announceable(schemas, _started(self._endpoint))
        await dht.astart()
        parts.push_async_callback(dht.aclose)
        self._dht = dht
        self.directory = ExpertDirectory(dht, readdress=self._as_seen)
        self.directory.check(schemas)  # again: the delegation was read just now
        self.announcer = Announcer(
            self.directory,
            schemas,
            self.endpoint,
            ttl_s=config.ttl_s,
            refresh_s=config.refresh_s,
            watch=self._watch_twins(parts, self.directory, schemas) if self.config.experts.twins == "wait" else None,
        )
        parts.push_async_callback(self.announcer.close)
        await self.announcer.start()

    def _watch_twins(
        self, parts: contextlib.AsyncExitStack, directory: ExpertDirectory, schemas: Mapping[str, str]
    ) -> TwinWatch:
        documents = HttpDocuments(timeout_s=ASK_TIMEOUT_S)
        parts.push_async_callback(documents.close)
        return TwinWatch(directory, documents.get_json, self.peer_id, lambda: self.endpoint, schemas)

    def _start_heartbeat(self, parts: contextlib.AsyncExitStack) -> None:
        every_s = self.config.log.heartbeat_s
        if every_s is None:
            return
        quota, http, dht = self._quota, _started(self._http), self.dht

        def show(since: float) -> dict[str, int]:
            connections = http.admission.connections
            return {"callers": quota.active_since(since), "connections": connections, "dht_peers": dht.peer_count}

        beating: set[asyncio.Task[None]] = set()
        heartbeat = Heartbeat(every_s, self.metrics.totals, show)
        parts.callback(own(heartbeat.run(), beating, "the heartbeat").cancel)

    def _as_seen(self, endpoint: Endpoint) -> Endpoint:
        if self.config.http.announce_host or self._dht is None:
            return endpoint
        seen = self._dht.observations.host
        return replace(endpoint, host=reachable_host(self.config.http.host, endpoint.host, seen))

    def _watch(self, runtimes: dict[str, Runtime]) -> None:
        every = list(runtimes.values())
        watch = self.metrics.watch
        watch("p2pmoe_requests_waiting", "Calls queued.", lambda: sum(each.tasks_waiting for each in every))
        watch("p2pmoe_requests_running", "Calls on a device.", lambda: sum(each.tasks_running for each in every))
        watch("p2pmoe_dht_peers", "Peers in the routing table.", lambda: self.dht.peer_count)
        http, dht = _started(self._http), self.dht
        watch("p2pmoe_connections", "Open connections of callers.", lambda: http.admission.connections)
        count = self.metrics.watch_counts
        count("p2pmoe_connections_refused", "Connections turned away.", "reason", lambda: http.refusals)
        count("p2pmoe_dht_datagrams", "Datagrams, and why some were dropped.", "what", lambda: _datagrams(dht))
        count("p2pmoe_dht_records_refused", "Records not believed or not kept.", "reason", lambda: _records(dht))


def _datagrams(dht: DHTNode) -> dict[str, int]:
    stats = dht.stats()
    return {
        "in": stats.datagrams_in,
        "out": stats.datagrams_out,
        "malformed": stats.malformed,
        "not_ours": stats.unopened,
        "over_budget": stats.over_budget,
    }


def _records(dht: DHTNode) -> dict[str, int]:
    stats = dht.stats()
    return {
        "not_stored": stats.records_refused,
        "forged": stats.records_forged,
        "undelegated": stats.records_undelegated,
    }


@contextlib.contextmanager
def background_node(
    config: NodeConfig | None = None, backends: ExpertBackend | Sequence[ExpertBackend] = (), *, timeout_s: float = 30.0
) -> Iterator[Node]:
    """A node in a thread of its own, for tests and notebooks. Raises what `Node.start` raises."""
    node = Node(config, backends)
    loop = forks.new_loop()
    thread = threading.Thread(target=run_loop, args=(loop,), name="p2pmoe-node", daemon=True)
    thread.start()

    def run(coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=timeout_s)

    try:
        run(node.start())
        try:
            yield node
        finally:
            if not node.is_parents:
                run(node.close())
    finally:
        if not node.is_parents:
            _end_loop(loop, thread)


def _end_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5.0)
    if not thread.is_alive():
        loop.close()


def _started(part: T | None) -> T:
    if part is None:
        raise ClosedError("the node is not running; use it as `async with p2pmoe.Node(config) as node:`")
    return part


def _open_identity(config: NodeConfig) -> Identity:
    if config.identity_path is None:
        return Identity.generate()
    return Identity.load_or_create(config.identity_path)


def _open_access(config: NodeConfig, identity: Identity, swarm_key: SwarmKey | None) -> Access:
    """Raises IdentityError when the token file cannot be used."""
    token_path = config.admin.token_path
    return Access(
        config.access,
        identity.public_key,
        swarm_key=swarm_key,
        admin_token=None if token_path is None else load_admin_token(token_path),
        clock=time.monotonic,
    )


async def _in_thread(function: Callable[[], None]) -> None:
    await asyncio.get_running_loop().run_in_executor(None, function)


def _announced_host(config: HttpConfig) -> str:
    """The address that others are told: never a wildcard."""
    return canonical_host(config.announce_host) if config.announce_host else reached_at(config.host)
