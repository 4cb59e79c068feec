"""What a DHT node can tell about itself at a glance. Knows no loop: it is read from any thread."""

from __future__ import annotations

import msgspec

from p2pmoe.dht.observations import Observations
from p2pmoe.dht.protocol import Counters
from p2pmoe.dht.server import SwarmServer
from p2pmoe.types import PeerId


class DHTStats(msgspec.Struct, frozen=True):
    """A snapshot of a node's DHT. Counters count from the start; sizes are in bytes, times in seconds."""

    peer_id: str
    address: str
    client_mode: bool
    peers: int
    joined: bool
    records: int
    keys: int
    record_bytes: int
    lookups: int
    repairs: int
    datagrams_in: int
    datagrams_out: int
    bytes_in: int
    bytes_out: int
    timeouts: int
    malformed: int
    unopened: int
    over_budget: int
    records_refused: int
    records_forged: int
    records_undelegated: int
    calls_under_way: int
    observed_host: str | None
    clock_offset_s: float | None


def take_stats(peer_id: PeerId, address: str, server: SwarmServer, observations: Observations) -> DHTStats:
    """The state of a node now; of one that has not started, with zeros. `address` is where it listens."""
    store = server.storage
    counters = server.protocol.counters if server.protocol else Counters()
    return DHTStats(
        peer_id=peer_id,
        address=address,
        client_mode=server.client_mode,
        peers=len(server.table),
        joined=len(server.table) > 0,
        records=len(store),
        keys=store.key_count,
        record_bytes=store.size,
        lookups=server.lookups,
        repairs=server.repairs,
        datagrams_in=counters.datagrams_in,
        datagrams_out=counters.datagrams_out,
        bytes_in=counters.bytes_in,
        bytes_out=counters.bytes_out,
        timeouts=server.protocol.caller.timeouts if server.protocol else 0,
        malformed=counters.malformed,
        unopened=counters.unopened,
        over_budget=counters.over_budget,
        records_refused=counters.records_refused,
        records_forged=server.forged,
        records_undelegated=server.undelegated,
        calls_under_way=len(server.protocol.book) if server.protocol else 0,
        observed_host=observations.host,
        clock_offset_s=observations.clock_offset_s,
    )
