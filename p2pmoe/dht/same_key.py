"""Whether another node holds our key: asked of those who would know it, and proved by whoever answers.

Rules:
1. Peers enter one address for a node id, the one that answered first. So the nodes nearest to our own id name a second
   holder of our key, if it was there before us. They are asked without saying who asks: nobody is told of itself.
2. What they name may be ourselves at another address of ours, a former run of ours that is gone, or a lie. It counts
   when it signs a question that we have just made up, and that did not come back to us (`proof_text`).
3. Nobody waits long for it: a former run that was killed answers nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Final

from p2pmoe.dht.requests import find_message, prove_message
from p2pmoe.dht.server import SwarmServer
from p2pmoe.errors import BadSignatureError
from p2pmoe.identity import verify
from p2pmoe.protocol.datagrams import Address, Contact, Found, Proof, proof_text

WAIT_S: Final = 1.0
ASKED: Final = 8
MAX_SUSPECTS: Final = 8


async def find_same_key(
    server: SwarmServer, public_key: bytes, suspects: Iterable[Address], *, is_own: Callable[[Address], bool]
) -> Address | None:
    """Where another node proves our key now; None: nobody does, in time.

    Args:
        server: Our DHT.
        public_key: Our key.
        suspects: Addresses to look at besides those that peers name.
        is_own: Whether an address is known to be ours.
    """
    search = _Search(server, public_key, is_own)
    contacts = [each.contact for each in server.table.closest(server.node.long_id, ASKED)]
    tasks = [asyncio.create_task(search.look_at(address)) for address in suspects]
    tasks += [asyncio.create_task(search.ask(contact)) for contact in contacts]
    try:
        async with asyncio.timeout(WAIT_S):
            for done in asyncio.as_completed(tasks):
                await done
                if search.found is not None:
                    break
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return search.found


class _Search:
    def __init__(self, server: SwarmServer, public_key: bytes, is_own: Callable[[Address], bool]) -> None:
        self.found: Address | None = None
        self._server, self._public_key, self._is_own = server, public_key, is_own
        self._looked_at: set[Address] = set()

    async def ask(self, contact: Contact) -> None:
        """Where a peer says that we are, without our saying that it is us."""
        own_id = self._server.node.id
        reply = await self._server.protocol.ask(contact, find_message(own_id, 1), anonymous=True)
        if not isinstance(reply, Found):
            return
        named = self._server.protocol.contacts_in(reply, contact.host)
        await asyncio.gather(*(self.look_at(each.address) for each in named if each.node_id == own_id))

    async def look_at(self, address: Address) -> None:
        """Ask for a proof there, if nobody was asked there before."""
        if address in self._looked_at or len(self._looked_at) >= MAX_SUSPECTS or self._is_own(address):
            return
        self._looked_at.add(address)
        reply = await self._server.protocol.ask(address, prove_message, anonymous=True)
        if not isinstance(reply, Proof) or reply.sender != self._server.node.id:
            return
        with contextlib.suppress(BadSignatureError):
            verify(self._public_key, proof_text(self._server.header, reply.id), reply.signature)
            self.found = address
