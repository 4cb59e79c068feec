"""Whether somebody else writes into our slots, which takes our own key: a second node with a copied key file.

Rules:
1. A record in our slots is foreign when it is newer than all that we had written when we last wrote there, and leads
   to another endpoint. One may be of a former run of ours whose clock was ahead; two, one newer than the other, are a
   node that lives.
2. Of the two the one whose endpoint comes first, by (host, port), goes on, and says so. The other one writes nothing
   more, not even a withdrawal, until the first one's records have ended. So both decide the same without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NoReturn

from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import DecodeError, IdentityError, P2PMoEError
from p2pmoe.experts.bundles import decode_bundle
from p2pmoe.seldom import Seldom
from p2pmoe.types import Endpoint

log = logging.getLogger(__name__)


class OwnSlots:
    """What stands in the slots of one node. On the DHT's loop."""

    def __init__(self, dht: DHTNode) -> None:
        self.is_yielding = False
        """Whether the other node goes on, and we do not."""
        self._dht = dht
        self._written: dict[str, int] = {}
        self._foreign = 0
        self._told = Seldom()

    def wrote(self, prefixes: Iterable[str]) -> None:
        """Our records of these prefixes have just been handed over."""
        self._written.update(dict.fromkeys(prefixes, self._dht.signer.last_sequence))

    async def require_ours(self, endpoint: Endpoint) -> None:
        """Look at what stands under the shortest of our prefixes, before it is written anew with this endpoint.

        Raises IdentityError: a second node holds our key, and is the one that goes on.
        """
        if not self._written:
            return
        prefix = min(self._written, key=len)
        try:
            found = await self._foreign_record(prefix, endpoint)
        except P2PMoEError:
            return  # whoever writes next meets the same fault, and says so
        if found is None:
            self.is_yielding, self._foreign = False, 0
            return
        sequence, other = found
        first_sight = not self._foreign
        lives = self.is_yielding or (not first_sight and sequence > self._foreign)
        self._foreign = max(sequence, self._foreign)
        if not lives:
            return
        if _place(other) < _place(endpoint):
            self.is_yielding = True
            self._yield_to(other)
        if (more := self._told.note()) is not None:
            log.warning(
                "a second node, at %s, announces experts with this node's key; this one goes on: stop the other, or "
                "make it a key of its own with `p2pmoe id new FILE`%s",
                other,
                more,
            )

    async def _foreign_record(self, prefix: str, endpoint: Endpoint) -> tuple[int, Endpoint] | None:
        own_key, floor = self._dht.identity.public_key, self._written[prefix]
        newest: tuple[int, Endpoint] | None = None
        for record in await self._dht.get(prefix):
            if record.public_key != own_key or record.sequence <= floor:
                continue
            try:
                bundle = decode_bundle(record.value, own_key)
            except DecodeError:
                continue
            foreign = not bundle.is_tombstone and _place(bundle.endpoint) != _place(endpoint)
            if foreign and (newest is None or record.sequence > newest[0]):
                newest = record.sequence, bundle.endpoint
        return newest

    def _yield_to(self, other: Endpoint) -> NoReturn:
        raise IdentityError(
            f"a second node, at {other}, announces experts with this node's key ({self._dht.peer_id}), and this one "
            f"announces nothing more until that is gone: stop one of them, or make it a key of its own with "
            f"`p2pmoe id new FILE`"
        )

    def __repr__(self) -> str:
        return f"<OwnSlots of {len(self._written)} prefixes{', yielding' if self.is_yielding else ''}>"


def _place(endpoint: Endpoint) -> tuple[str, int]:
    return endpoint.host, endpoint.port
