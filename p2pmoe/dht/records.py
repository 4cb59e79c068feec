"""A node's records and everybody's: signed and handed over, read and opened. On the DHT's loop; knows no threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from p2pmoe.config import DHTConfig
from p2pmoe.dht.ownership import ClosedSwarm
from p2pmoe.dht.server import SwarmServer
from p2pmoe.dht.signing import RecordSigner
from p2pmoe.errors import NotDelegatedError, PeerUnreachableError
from p2pmoe.protocol.delegations import is_wrapped
from p2pmoe.protocol.records import Record, key_of

log = logging.getLogger(__name__)

MAX_CONCURRENT_PUTS: Final = 16
MAX_CONCURRENT_GETS: Final = 16


class NodeRecords:
    """`put` and `get` by prefix.

    Args:
        server: The node's DHT.
        signer: Makes our records.
        config: The `[dht]` section, of which it takes the swarm's name and the time to live.
        closed: The rules of a swarm that has an owner.
        require_peers: Raises BootstrapError where the node ought to have peers and has none.
    """

    def __init__(
        self,
        server: SwarmServer,
        signer: RecordSigner,
        config: DHTConfig,
        *,
        closed: ClosedSwarm | None,
        require_peers: Callable[[], None],
    ) -> None:
        self._server = server
        self._signer = signer
        self._config = config
        self._closed = closed
        self._require_peers = require_peers
        self._puts = asyncio.Semaphore(MAX_CONCURRENT_PUTS)
        self._gets = asyncio.Semaphore(MAX_CONCURRENT_GETS)
        self._hinted = False

    async def put(self, prefix: str, parts: Mapping[int, bytes], ttl_s: float | None) -> int:
        """Raises as `DHTNode.put`."""
        self._require_peers()
        async with self._puts:
            key, records = self._signer.sign(prefix, parts, self._config.ttl_s if ttl_s is None else ttl_s)
            taken = await self._server.set(key, records)
        if not taken:
            raise PeerUnreachableError(
                f"none of the nodes nearest to {prefix!r} took the record; set this machine's clock right, and see "
                f"that UDP reaches other nodes (dht_peers in the log's heartbeat line)"
            )
        return taken

    async def put_many(self, values: Mapping[str, Mapping[int, bytes]], ttl_s: float | None) -> dict[str, int]:
        """Raises as `DHTNode.put_many`."""
        self._require_peers()

        async def put(prefix: str, parts: Mapping[int, bytes]) -> int:
            try:
                return await self.put(prefix, parts, ttl_s)
            except PeerUnreachableError:
                return 0

        taken = await asyncio.gather(*(put(prefix, parts) for prefix, parts in values.items()))
        return dict(zip(values, taken, strict=True))

    async def get(self, prefix: str, *, quick: bool) -> list[Record]:
        """Raises as `DHTNode.get`."""
        self._require_peers()
        async with self._gets:
            records = await self._server.get(key_of(self._config.swarm_id, prefix), quick=quick)
        if self._closed is not None:
            return list(self._opened(self._closed, prefix, records))
        if not self._hinted and any(is_wrapped(record.value) for record in records):
            self._hinted = True
            log.warning(
                "records of swarm %r carry delegations: it has an owner, whose public key this side was not told; "
                "set dht.owner, pass --owner or Swarm(owner=…)",
                self._config.swarm_id,
            )
        return records

    def _opened(self, closed: ClosedSwarm, prefix: str, records: Sequence[Record]) -> Iterator[Record]:
        now = self._server.clock()
        for record in records:
            try:
                yield closed.open(record, prefix, now)
            except NotDelegatedError:
                self._server.undelegated += 1

    def __repr__(self) -> str:
        return f"<NodeRecords of {self._server!r}>"
