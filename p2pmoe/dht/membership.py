"""How a node gets into the swarm and stays there: joining, upkeep, finding back after a partition. Runs on the
DHT's loop; knows no threads and no records.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from p2pmoe.config import DHTConfig
from p2pmoe.dht.contacts import BUCKET_SIZE
from p2pmoe.dht.initial_peers import InitialPeers
from p2pmoe.dht.observations import MIN_REPORTERS, Observations
from p2pmoe.dht.same_key import MAX_SUSPECTS, find_same_key
from p2pmoe.dht.server import SwarmServer
from p2pmoe.errors import BootstrapError, IdentityError
from p2pmoe.faults import unexpected
from p2pmoe.identity import peer_id_from_node_id
from p2pmoe.protocol.datagrams import Address
from p2pmoe.rpc.resolver import Resolver
from p2pmoe.seldom import Seldom
from p2pmoe.types import format_host_port

log = logging.getLogger(__name__)

MAINTAIN_EVERY_S: Final = 10.0
FIRST_RETRY_S: Final = 0.25
LAST_RETRY_S: Final = 10.0
FEW_PEERS: Final = 3
CLOCK_WARNING_S: Final = 10.0
ASKED_WHERE_WE_ARE: Final = 8
MAX_REMEMBERED: Final = 256
SAME_KEY_EVERY_S: Final = 60.0
TRIED_AGAIN: Final = 2
"""Peers out of the table that are pinged in each round of upkeep."""


class Membership:
    """A node's place in the swarm.

    Args:
        server: The node's DHT.
        config: The `[dht]` section, of which it takes the initial peers and whether we may be alone.
        on_round: Called after each round of upkeep.
        resolver: Looks up the initial peers' names.
        public_key: Ours; another node that holds it, too, is looked for.

    Raises:
        ConfigError: an initial peer is no HOST:PORT.
    """

    def __init__(
        self,
        server: SwarmServer,
        config: DHTConfig,
        *,
        on_round: Callable[[], None],
        resolver: Resolver | None = None,
        public_key: bytes | None = None,
    ) -> None:
        self.observations = Observations()
        self.initial = InitialPeers(
            config.initial_peers,
            swarm_id=config.swarm_id,
            announced=(config.announce_host, config.announce_port),
            resolver=resolver,
        )
        self.ran_before = False
        """Whether an earlier run left its state on disk."""
        self._server = server
        self._config = config
        self._on_round = on_round
        self._remembered: OrderedDict[Address, None] = OrderedDict()
        self._alone = Seldom()
        self._clock_off = Seldom()
        self._failing = Seldom()
        self._is_alone = False
        self._reasons: list[str] = []
        self._public_key = public_key
        self._suspects: dict[Address, None] = {}
        self._same_key = Seldom()
        self._looked_at = -math.inf

    @property
    def wants_peers(self) -> bool:
        """False for a node that was told of nobody but itself: it waits to be asked."""
        return bool(self.initial.others or self._remembered)

    @property
    def founds(self) -> bool:
        """Whether we are told of nobody else, and others come to us."""
        return not self._server.client_mode and not self.initial.others

    @property
    def may_be_alone(self) -> bool:
        """Whether we are a node of the swarm, too, while nobody else is there.

        So is whoever founds it, was one of it before, is among the initial peers of all, or was told to.
        """
        if self._server.client_mode:
            return False
        return self.founds or self._config.allow_alone or self.ran_before or self.initial.names_us

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

    def attend(self) -> None:
        """Listen to what the server's protocol hears, from when that is open."""
        caller, protocol = self._server.protocol.caller, self._server.protocol
        caller.on_seen = self.on_seen
        caller.on_own = self.initial.note_own
        caller.on_same_id = self._suspect
        protocol.on_foreign = self.initial.note_foreign

    # --- joining ----------------------------------------------------------------------------------------------

    async def join_first(self, *, wait_for_peers: bool) -> None:
        """Try until it succeeds or `join_timeout_s` is over.

        Raises:
            BootstrapError: with `wait_for_peers`, unless we may be alone (a client: was told to start so).
            IdentityError: another node holds our key, and was there before us.
        """
        deadline = asyncio.get_running_loop().time() + self._config.join_timeout_s
        delay_s = FIRST_RETRY_S
        while self.wants_peers and not await self._join(deadline):
            if self._suspects:
                await self._refuse_the_same_key()
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0 or (self.initial.is_hopeless and not self._remembered):
                break
            await asyncio.sleep(min(delay_s, left_s))
            delay_s *= 2
        if len(self._server.table):
            await self._ask_where_we_are()
            await self._refuse_the_same_key()
            return
        if not self.wants_peers:
            self._log_founding()
            return
        self._reasons = await self.initial.why_silent(self._server.make_ping)
        if wait_for_peers and not (self.may_be_alone or self._config.allow_alone):
            raise BootstrapError(self.no_peers())
        self._log_alone()

    async def _join(self, deadline: float) -> bool:
        try:
            async with asyncio.timeout_at(deadline):
                return await self._ask_everybody()
        except TimeoutError:
            # The look-up of ourselves may be cut short; a contact in the table is what counts.
            return len(self._server.table) > 0

    async def _ask_everybody(self) -> bool:
        """Ask all addresses at once, those of a name as soon as it is looked up. True once one of them answers."""
        asking = [asyncio.create_task(self._server.bootstrap(self._known_addresses()))]
        asking += [asyncio.create_task(self._ask_named(peer)) for peer in self.initial.names]
        try:
            for answered in asyncio.as_completed(asking):
                if await answered:
                    return True
            return False
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _ask_named(self, peer: str) -> int:
        known = set(self._known_addresses())
        found = await self.initial.look_up(peer)
        return await self._server.bootstrap([address for address in found if address not in known])

    def _known_addresses(self) -> list[Address]:
        remembered = [peer for peer in self._remembered if not self.initial.is_own(peer)]
        return list(dict.fromkeys([*self.initial.known(), *remembered]))

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
                if (more := self._failing.note()) is not None:
                    unexpected(f"a round of the DHT's upkeep{more}", error)

    async def maintain(self) -> None:
        """One round: join again when nearly alone, ping the silent, try some of those that were lost."""
        if self.wants_peers and len(self._server.table) < FEW_PEERS:
            await self._join(asyncio.get_running_loop().time() + self._config.join_timeout_s)
        self._log_company()
        self.remember(contact.address for contact in self._server.table if not contact.misses)
        await self._server.maintain()
        await self.find_the_lost()
        await self._ask_where_we_are()
        await self._look_for_the_same_key()
        self._on_round()

    async def find_the_lost(self) -> bool:
        """Ping some known addresses that are not in the table; True when one answers that had been lost.

        After a partition both sides have forgotten one another. One answer is enough to bring them together: whoever
        gets it looks itself up through the other side, and is entered there by those it asks.
        """
        held = {contact.address for contact in self._server.table}
        lost = [address for address in self._known_addresses() if address not in held]
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

    # --- one key, one node -------------------------------------------------------------------------------------

    async def _refuse_the_same_key(self) -> None:
        """Raises IdentityError where another node that holds our key was there before us."""
        other = await self._find_same_key()
        if other is not None:
            raise IdentityError(
                f"this node's key ({peer_id_from_node_id(self._server.node.id)}) is in use by a node at "
                f"{format_host_port(*other)}, and two nodes cannot share one: stop that node, or make a key for this "
                f"one with `p2pmoe id new FILE` and pass --identity FILE (identity_path)"
            )

    async def _look_for_the_same_key(self) -> None:
        """While running nobody is refused: it is said, and the announcer sees to the records."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_at < SAME_KEY_EVERY_S and not self._suspects:
            return
        other = await self._find_same_key()
        if other is not None and (more := self._same_key.note()) is not None:
            log.warning(
                "a second node, at %s, uses this node's key, and the records of one overwrite the other's: stop it, or "
                "make it a key of its own with `p2pmoe id new FILE`%s",
                format_host_port(*other),
                more,
            )

    async def _find_same_key(self) -> Address | None:
        self._looked_at = asyncio.get_running_loop().time()
        suspects, self._suspects = tuple(self._suspects), {}
        if self._public_key is None or self._server.client_mode:
            return None
        return await find_same_key(self._server, self._public_key, suspects, is_own=self.initial.may_be_us)

    def _suspect(self, address: Address) -> None:
        if len(self._suspects) < MAX_SUSPECTS and not self.initial.is_own(address):
            self._suspects[address] = None

    # --- what is said -----------------------------------------------------------------------------------------

    def on_seen(self, reporter: Address, seen: Address, their_time: float) -> None:
        """A peer says where it sees us, and what its clock shows."""
        self.observations.report(reporter, seen, their_time - self._server.clock())
        self.initial.note_seen((seen[0], self._config.announce_port or seen[1]))
        offset_s = self.observations.clock_offset_s
        if offset_s is None or abs(offset_s) <= CLOCK_WARNING_S:
            return
        if (more := self._clock_off.note()) is not None:
            log.warning(
                "this machine's clock is %.0f s off its peers'; records may be refused: set it right%s", -offset_s, more
            )

    def no_peers(self) -> str:
        """Nobody answers: why, and what to do."""
        peers = ", ".join(self.initial.texts) or "none given"
        reasons = "; ".join([*self._reasons, *([self._about_keys()] if self.initial.any_silent else [])])
        alone = "" if self._server.client_mode else ", or start without: --allow-alone (dht.allow_alone = true)"
        return (
            f"no peer of the DHT answers (initial peers: {peers}): {reasons}; else pass another with "
            f"--initial-peers HOST:PORT{alone}"
        )

    def _about_keys(self) -> str:
        if self._server.sealer is None:
            return "a private swarm answers only those who have its key: set access.swarm_key_path or pass --swarm-key"
        strange = self._server.protocol.counters.unopened if self._server.protocol else 0
        heard = f" ({strange} datagrams came that ours does not open)" if strange else ""
        return f"a private swarm answers only those who have its key: is our swarm key the one that they have{heard}?"

    def _log_founding(self) -> None:
        among = " but ourselves" if self.initial.texts else ""
        log.info("no initial peers%s: this node founds swarm %r, others join through it", among, self._config.swarm_id)

    def _log_alone(self) -> None:
        self._is_alone = True
        if (more := self._alone.note()) is not None:
            reasons = "; ".join(self._reasons) or f"none of {len(self._remembered)} remembered ones answers"
            log.warning("alone for now, looking for peers in the background: %s%s", reasons, more)

    def _log_company(self) -> None:
        """One line when everybody is lost, one when somebody is found again; a founder's visitors come and go."""
        if len(self._server.table) > 0:
            if self._is_alone:
                first = next(iter(self._server.table))
                log.info("no longer alone: %s answers", format_host_port(*first.address))
            self._is_alone = False
        elif self.initial.others:
            self._log_alone()

    def __repr__(self) -> str:
        return f"<Membership {len(self._server.table)} contacts, {len(self._remembered)} remembered>"
