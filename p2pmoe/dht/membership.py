"""How a node gets into the swarm and stays there: joining, upkeep, finding back after a partition. Runs on the
DHT's loop; knows no threads and no records.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from p2pmoe.config import DHTConfig
from p2pmoe.dht.addresses import resolve
from p2pmoe.dht.contacts import BUCKET_SIZE
from p2pmoe.dht.observations import MIN_REPORTERS, Observations
from p2pmoe.dht.server import SwarmServer
from p2pmoe.errors import BootstrapError
from p2pmoe.faults import unexpected
from p2pmoe.protocol.datagrams import Address

log = logging.getLogger(__name__)

MAINTAIN_EVERY_S: Final = 10.0
FIRST_RETRY_S: Final = 0.25
LAST_RETRY_S: Final = 10.0
LOG_EVERY_S: Final = 30.0
FEW_PEERS: Final = 3
CLOCK_WARNING_S: Final = 10.0
ASKED_WHERE_WE_ARE: Final = 8
MAX_REMEMBERED: Final = 256
TRIED_AGAIN: Final = 2
"""Peers out of the table that are pinged in each round of upkeep."""


class Membership:
    """A node's place in the swarm.

    Args:
        server: The node's DHT.
        config: The `[dht]` section, of which it takes the initial peers.
        on_round: Called after each round of upkeep.
    """

    def __init__(self, server: SwarmServer, config: DHTConfig, *, on_round: Callable[[], None]) -> None:
        self.observations = Observations()
        self.ipv6 = False
        """Whether our socket takes IPv6."""
        self._server = server
        self._config = config
        self._on_round = on_round
        self._remembered: OrderedDict[Address, None] = OrderedDict()
        self._last_logged = -LOG_EVERY_S

    @property
    def wants_peers(self) -> bool:
        """False for a node that was told of nobody: it waits to be asked."""
        return bool(self._config.initial_peers or self._remembered)

    @property
    def peers(self) -> list[Address]:
        """Those in the table that answer, then those who did once."""
        answering = [contact.address for contact in self._server.table if not contact.misses]
        return list(dict.fromkeys([*answering, *reversed(self._remembered)]))

    def remember(self, peers: Iterable[Address]) -> None:
        """These answered once."""
        for peer in peers:
            self._remembered[peer] = None
            self._remembered.move_to_end(peer)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    # --- joining ----------------------------------------------------------------------------------------------

    async def join_first(self, *, wait_for_peers: bool) -> None:
        """Try until it succeeds or `join_timeout_s` is over. Raises BootstrapError then, with `wait_for_peers`."""
        deadline = asyncio.get_running_loop().time() + self._config.join_timeout_s
        delay_s = FIRST_RETRY_S
        while not await self._join(deadline):
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                if wait_for_peers and self._config.initial_peers:
                    raise BootstrapError(self.no_peers())
                self._log_no_peers()
                return
            await asyncio.sleep(min(delay_s, left_s))
            delay_s *= 2
        await self._ask_where_we_are()

    async def _join(self, deadline: float) -> bool:
        try:
            async with asyncio.timeout_at(deadline):
                return await self._server.bootstrap(await self._known_addresses()) > 0
        except TimeoutError:
            # The look-up of ourselves may be cut short; a contact in the table is what counts.
            return len(self._server.table) > 0

    async def _known_addresses(self) -> list[Address]:
        addresses = await resolve(self._config.initial_peers, ipv6=self.ipv6, timeout_s=2.0)
        remembered = [peer for peer in self._remembered if self.ipv6 or ":" not in peer[0]]
        return list(dict.fromkeys([*addresses, *remembered]))

    # --- staying ----------------------------------------------------------------------------------------------

    async def upkeep(self) -> None:
        """Runs until it is cancelled."""
        retry_s = FIRST_RETRY_S
        if not self._server.client_mode:
            try:
                await self._server.refresh_buckets(0)
            except Exception as error:  # noqa: BLE001 - the rounds below must begin all the same
                unexpected("filling the DHT's table", error)
        while True:
            if len(self._server.table) == 0 and self.wants_peers:
                pause_s = retry_s
                retry_s = min(2 * retry_s, LAST_RETRY_S)
            else:
                pause_s, retry_s = MAINTAIN_EVERY_S, FIRST_RETRY_S
            # Jitter, so that nodes that lost the same peer do not come back in step.
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311
            try:
                await self.maintain()
            except Exception as error:  # noqa: BLE001 - the next round may go better
                unexpected("a round of the DHT's upkeep", error, by_a_stranger=True)

    async def maintain(self) -> None:
        """One round: join again when nearly alone, ping the silent, try some of those that were lost."""
        lonely = self.wants_peers and len(self._server.table) < FEW_PEERS
        if lonely and not await self._join(asyncio.get_running_loop().time() + self._config.join_timeout_s):
            self._log_no_peers()
        self.remember(contact.address for contact in self._server.table if not contact.misses)
        await self._server.maintain()
        await self.find_the_lost()
        await self._ask_where_we_are()
        self._on_round()

    async def find_the_lost(self) -> bool:
        """Ping some known addresses that are not in the table; True when one answers that had been lost.

        After a partition both sides have forgotten one another. One answer is enough to bring them together: whoever
        gets it looks itself up through the other side, and is entered there by those it asks.
        """
        held = {contact.address for contact in self._server.table}
        lost = [address for address in await self._known_addresses() if address not in held]
        tried = random.sample(lost, min(TRIED_AGAIN, len(lost)))
        answers = await asyncio.gather(*(self._server.protocol.call_ping(address) for address in tried))
        back = [pong for pong in answers if pong is not None and pong.sender not in {b"", self._server.node.id}]
        if not any(self._server.table.get(pong.sender) for pong in back):
            return False  # nobody, or our buckets there are full of others
        await self._server.find_nearest(self._server.node.id, BUCKET_SIZE)
        return True

    async def _ask_where_we_are(self) -> None:
        """Ping some contacts, whose answers say at which address they see us."""
        contacts = [contact.contact for contact in self._server.table][:ASKED_WHERE_WE_ARE]
        if self.observations.host is None and len(contacts) >= MIN_REPORTERS:
            await asyncio.gather(*(self._server.protocol.call_ping(contact) for contact in contacts))

    # --- what is said -----------------------------------------------------------------------------------------

    def on_seen(self, reporter: Address, seen: Address, their_time: float) -> None:
        """A peer says where it sees us, and what its clock shows."""
        self.observations.report(reporter, seen, their_time - self._server.clock())
        offset_s = self.observations.clock_offset_s
        if offset_s is not None and abs(offset_s) > CLOCK_WARNING_S and self._may_log():
            log.warning(
                "this machine's clock is %.0f s off its peers'; records may be refused: set it right", -offset_s
            )

    def no_peers(self) -> str:
        """Nobody answers: why, and what to do."""
        peers = ", ".join(self._config.initial_peers) or "none given"
        return (
            f"no peer of the DHT answers (initial peers: {peers}); check that a node runs there and that UDP "
            f"reaches it, or pass another with --initial-peers HOST:PORT; {self._about_keys()}"
        )

    def _about_keys(self) -> str:
        if self._server.sealer is None:
            return "a private swarm answers only those who have its key: set access.swarm_key_path or pass --swarm-key"
        strange = self._server.protocol.counters.unopened if self._server.protocol else 0
        heard = f" ({strange} datagrams came that ours does not open)" if strange else ""
        return f"a private swarm answers only those who have its key: is our swarm key the one that they have{heard}?"

    def _log_no_peers(self) -> None:
        if self._may_log():
            log.warning("%s; trying again in the background", self.no_peers())

    def _may_log(self) -> bool:
        now = time.monotonic()
        if now - self._last_logged < LOG_EVERY_S:
            return False
        self._last_logged = now
        return True

    def __repr__(self) -> str:
        return f"<Membership {len(self._server.table)} contacts, {len(self._remembered)} remembered>"
