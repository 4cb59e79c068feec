"""A DHT node to hold: starts, joins, puts, gets, closes. Its event loop runs on its own thread, away from torch."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from p2pmoe.config import DHTConfig
from p2pmoe.dht.addresses import bind, client_host, is_wildcard, reached_at
from p2pmoe.dht.datagram_socket import plain_address, versions_of
from p2pmoe.dht.loop_thread import LoopThread
from p2pmoe.dht.membership import Membership
from p2pmoe.dht.observations import Observations, reachable_host
from p2pmoe.dht.ownership import ClosedSwarm, OwnDelegation, parse_owner
from p2pmoe.dht.records import NodeRecords
from p2pmoe.dht.server import SwarmServer
from p2pmoe.dht.signing import RecordSigner
from p2pmoe.dht.state_file import SavedState, read_state, save_state
from p2pmoe.dht.stats import DHTStats, take_stats
from p2pmoe.dht.validation import MAX_SEQUENCE_AHEAD_S
from p2pmoe.errors import BootstrapError, ConfigError
from p2pmoe.faults import watch
from p2pmoe.forks import forked
from p2pmoe.identity import NODE_ID_BYTES, Identity, SwarmKey
from p2pmoe.protocol.datagrams import Address
from p2pmoe.protocol.records import Record
from p2pmoe.rpc.resolver import Resolver
from p2pmoe.types import PeerId, canonical_host, format_host_port, is_loopback

T = TypeVar("T")
log = logging.getLogger(__name__)
COMPLAIN_EVERY_S: Final = 86_400.0
"""Of a state file that cannot be written: it is tried every few seconds."""


class DHTNode:
    """One node of the DHT. `put`, `get` and `stats` may be used from any thread and any event loop.

    Args:
        identity: Whose records it signs; its node id is the identity's.
        config: The `[dht]` section.
        client_mode: Reads and writes, but answers nobody and is in nobody's table.
        swarm_key: The secret of a private swarm: every datagram is sealed with it.
        clock: Seconds since 1970, by which records are judged.
        resolver: Looks up names of hosts.

    Raises:
        ConfigError: an initial peer is no HOST:PORT, `config.owner` is no public key, or `config.delegation_path` is
            set without it.
    """

    def __init__(
        self,
        identity: Identity,
        config: DHTConfig | None = None,
        *,
        client_mode: bool = False,
        swarm_key: SwarmKey | None = None,
        clock: Callable[[], float] = time.time,
        resolver: Resolver | None = None,
    ) -> None:
        self.identity = identity
        self.config = config or DHTConfig()
        self.client_mode = client_mode
        self.clock = clock
        owner = self.config.owner
        self.closed = None if owner is None else ClosedSwarm(parse_owner(owner), self.config.swarm_id)
        self._delegation = self._own_delegation()
        self.signer = RecordSigner(identity, self.config.swarm_id, clock, self._delegation)
        self.server = SwarmServer(
            # A client is in nobody's table; one that signs with a node's key reaches that node like any other.
            secrets.token_bytes(NODE_ID_BYTES) if client_mode else identity.node_id,
            self.config.swarm_id,
            client_mode=client_mode,
            clock=clock,
            source_bytes_per_s=self.config.max_source_bytes_per_s,
            closed=self.closed,
            swarm_key=swarm_key,
            announce_port=self.config.announce_port,
            sign=identity.sign,
        )
        self._records = NodeRecords(
            self.server, self.signer, self.config, closed=self.closed, require_peers=self._require_peers
        )
        self._complained_at = -math.inf
        self._resolver = resolver or Resolver()
        self.membership = Membership(
            self.server,
            self.config,
            on_round=self._save_state,
            resolver=self._resolver,
            public_key=identity.public_key,
        )
        self._thread = LoopThread(f"p2pmoe-dht-{identity.peer_id[:8]}")
        self._address: Address | None = None
        self._started = False

    # --- life -------------------------------------------------------------------------------------------------

    def start(self, *, wait_for_peers: bool = True) -> None:
        """Bind, start the thread, join. Blocks until the node has joined, `join_timeout_s` at most.

        Args:
            wait_for_peers: Whether it is an error when initial peers are configured and none answers in time,
                which it never is for a node that `Membership.may_be_alone`. If not, the node goes on trying in the
                background.

        Raises:
            AddressInUseError: the port is taken or not allowed.
            ConfigError: the host or an initial peer is no address.
            DelegationError: the file at `delegation_path` holds no delegation for us.
            BootstrapError: no initial peer answered.
        """
        if self._thread.is_parents:
            raise forked("started the DHT node", "make a new one there")
        if self._started:
            raise RuntimeError("a DHTNode is started once; make a new one")
        self._started = True
        if self._delegation is not None:
            self._delegation.load()
        self._load_state()
        host = client_host(self.config.initial_peers) if self._binds_for_peers() else self.config.host
        sock = bind(host, self.config.port, resolver=self._resolver)
        self._address = plain_address(sock.getsockname())
        self.membership.initial.bind(self._address, versions_of(sock))
        self._warn_of_addresses()
        try:
            self._thread.start(
                lambda ready, stopping: self._main(sock, ready, stopping, wait_for_peers=wait_for_peers),
                timeout_s=self.config.join_timeout_s + 10,
            )
        except BaseException:
            sock.close()
            raise

    async def astart(self, *, wait_for_peers: bool = True) -> None:
        """`start` without blocking the caller's loop."""
        try:
            await asyncio.to_thread(self.start, wait_for_peers=wait_for_peers)
        except asyncio.CancelledError:
            await asyncio.to_thread(self.close)
            raise

    def close(self) -> None:
        """End the thread and close the socket, within seconds. Idempotent; calls under way raise ClosedError."""
        self._thread.stop()

    async def aclose(self) -> None:
        """`close` without blocking the caller's loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await self.astart()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # --- who and where ----------------------------------------------------------------------------------------

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def address(self) -> Address:
        """The bound host and port. Raises RuntimeError before `start`."""
        if self._address is None:
            raise RuntimeError("the DHT node has no address before start()")
        return self._address

    @property
    def dht_address(self) -> str:
        """What others pass as --initial-peers."""
        host, port = self.address
        if self.config.announce_host:
            host = canonical_host(self.config.announce_host)
        elif is_wildcard(host):
            host = reachable_host(host, reached_at(host), self.observations.host)
        return format_host_port(host, self.config.announce_port or port)

    @property
    def observations(self) -> Observations:
        """What peers say about our address and our clock."""
        return self.membership.observations

    @property
    def peer_count(self) -> int:
        """Contacts in the routing table."""
        return len(self.server.table)

    # --- records ----------------------------------------------------------------------------------------------

    async def put(self, prefix: str, values: Mapping[int, bytes] | Sequence[bytes], ttl_s: float | None = None) -> int:
        """Sign `values` (by part, each at most 900 bytes) and hand them to the nodes nearest to the prefix's key.

        Args:
            prefix: Names the key, with the swarm's id.
            values: Part number to value, or the values of parts 0, 1, …
            ttl_s: How long they live; `config.ttl_s` when it is left out. At most an hour.

        Returns:
            How many nodes hold them, this one included.

        Raises:
            EncodeError: a value is too long or a part too high.
            DelegationError: in a closed swarm, the owner does not let us write there.
            BootstrapError: no peer is known.
            PeerUnreachableError: nobody took them.
            ClosedError: the node is not running.
        """
        parts = dict(values) if isinstance(values, Mapping) else dict(enumerate(values))
        return await self.call(lambda: self._records.put(prefix, parts, ttl_s))

    async def put_many(self, values: Mapping[str, Mapping[int, bytes]], ttl_s: float | None = None) -> dict[str, int]:
        """`put` for many prefixes at once; a prefix that nobody took counts 0 and raises nothing."""
        return await self.call(lambda: self._records.put_many(values, ttl_s))

    async def get(self, prefix: str, *, quick: bool = False) -> list[Record]:
        """The live records under a prefix's key, signatures checked: the newest of every signer and part.

        In a closed swarm each carries its `scope`, and its `value` is the payload beside the delegation.

        Args:
            prefix: Names the key, with the swarm's id.
            quick: Stop when two holders agree, instead of merging what the eight nearest hold.

        Raises:
            BootstrapError: no peer is known.
            ClosedError: the node is not running.
        """
        return await self.call(lambda: self._records.get(prefix, quick=quick))

    async def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Await `make()` on the DHT's loop, from any loop. Cancelling cancels it. Raises ClosedError."""
        return await self._thread.call(make)

    def submit(self, make: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start `make()` on the DHT's loop, from any thread. It is cancelled on `close`. Raises ClosedError."""
        return self._thread.submit(make)

    def stats(self) -> DHTStats:
        """A snapshot; thread-safe and without waiting."""
        address = format_host_port(*self._address) if self._address else ""
        return take_stats(self.peer_id, address, self.server, self.observations)

    # --- on the DHT's loop ------------------------------------------------------------------------------------

    async def _main(
        self, sock: socket.socket, ready: Callable[[], None], stopping: asyncio.Event, *, wait_for_peers: bool
    ) -> None:
        await self.server.open(sock)
        self.membership.attend()
        upkeep: asyncio.Task[None] | None = None
        try:
            await self.membership.join_first(wait_for_peers=wait_for_peers)
            upkeep = asyncio.create_task(self.membership.upkeep())
            watch(upkeep, "the DHT's upkeep")
            ready()
            await stopping.wait()
        finally:
            if upkeep is not None:
                upkeep.cancel()
                await asyncio.gather(upkeep, return_exceptions=True)
            self._save_state()
            await self.server.close()

    def _own_delegation(self) -> OwnDelegation | None:
        if self.closed is None:
            if self.config.delegation_path:
                raise ConfigError("dht.delegation_path needs dht.owner: the public key of the swarm's owner")
            return None
        return OwnDelegation(self.config.delegation_path, self.closed, self.identity.public_key)

    def _require_peers(self) -> None:
        if self.peer_count == 0 and not self.membership.may_be_alone:
            raise BootstrapError(self.membership.no_peers())

    def _warn_of_addresses(self) -> None:
        host, port = self.address
        if self.client_mode:
            return
        if is_wildcard(host) and not self.config.announce_host and is_loopback(reached_at(host)):
            log.warning(
                "the DHT listens on all interfaces, but this machine has loopback alone: nobody else reaches it until "
                "it has a network (or announce_host says where it is reached)"
            )
        if self.config.announce_port and not self.config.port:
            log.warning(
                "dht.announce_port = %d with dht.port = 0: the port mapping has to lead to port %d, which the system "
                "picked for this start only; set dht.port",
                self.config.announce_port,
                port,
            )

    def _binds_for_peers(self) -> bool:
        return self.client_mode and self.config.host == DHTConfig().host

    def _load_state(self) -> None:
        if self.config.state_path:
            latest_s = self.clock() + MAX_SEQUENCE_AHEAD_S
            state = read_state(Path(self.config.state_path), max_sequence=int(latest_s * 1e6))
            self.membership.ran_before = state is not None
            state = state or SavedState()
            self.signer.last_sequence = state.sequence
            self.membership.remember(reversed(state.peers))

    def _save_state(self) -> None:
        if not self.config.state_path:
            return
        try:
            save_state(Path(self.config.state_path), self.membership.peers, self.signer.last_sequence)
        except OSError as error:
            self._complain_of_state(error.strerror or str(error))

    def _complain_of_state(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._complained_at < COMPLAIN_EVERY_S:
            return
        self._complained_at = now
        log.warning(
            "the DHT's peers cannot be saved to %s: %s; set dht.state_path to a file that this user may write, or the "
            "next start needs an initial peer",
            self.config.state_path,
            reason,
        )

    def __repr__(self) -> str:
        where = format_host_port(*self._address) if self._address else "not started"
        mode = ", client" if self.client_mode else ""
        return (
            f"<DHTNode {self.peer_id[:8]}… {where}: {self.peer_count} peers, {len(self.server.storage)} records{mode}>"
        )
