r"""Sealed datagrams: in a private swarm only holders of the swarm key can write, read or recognise them. No I/O.

A sealed datagram is

    salt 12 | counter u48 | AES-256-GCM(plaintext = the datagram without its header, associated data = its header)

with the tag of 16 bytes at the end: 29 bytes more than the plain one. The key of a sender's session is
`BLAKE2b-256(salt, key = HKDF("dht-datagram-1"))`, the nonce is the counter, filled up with zeros in front.

A salt is random and lives as long as its sender's process, so that no two sessions under one swarm key share a key;
within a session the counter never repeats. Random nonces under the swarm key itself would be too few for a large
swarm: 96 bits bear 2^32 datagrams, and a thousand nodes send those in a day.

A receiver remembers which counters of a session it has seen: what an outsider records and sends again does not open.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from p2pmoe.identity import SwarmKey
from p2pmoe.protocol.datagrams import MAX_DATAGRAM_BYTES

SALT_BYTES: Final = 12
COUNTER_BYTES: Final = 6
TAG_BYTES: Final = 16
MAX_SESSIONS: Final = 4096
WINDOW: Final = 4096
"""How many of a session's counters behind its highest are told apart; older ones do not open."""

_PURPOSE: Final = b"dht-datagram-1"
_PREFIX_BYTES: Final = SALT_BYTES + COUNTER_BYTES
_LAST_COUNTER: Final = 2 ** (8 * COUNTER_BYTES) - 1
_NONCE_FILL: Final = bytes(12 - COUNTER_BYTES)
_MASK: Final = 2**WINDOW - 1


class _Session:
    """What one sender's process has sent us."""

    __slots__ = ("aead", "highest", "seen")

    def __init__(self, aead: AESGCM) -> None:
        self.aead = aead
        self.highest = -1
        self.seen = 0
        """Bit i: the counter `highest - i` was seen."""

    def is_fresh(self, counter: int) -> bool:
        behind = self.highest - counter
        return behind < 0 or (behind < WINDOW and not self.seen >> behind & 1)

    def note(self, counter: int) -> None:
        ahead = counter - self.highest
        if ahead > 0:
            # Not shifted by whatever a peer likes: the number would grow to that many bits first.
            self.seen = ((self.seen << ahead) & _MASK | 1) if ahead < WINDOW else 1
            self.highest = counter
        else:
            self.seen |= 1 << -ahead


class Sealer:
    """Seals what a node sends and opens what it receives.

    Args:
        swarm_key: The secret of the private swarm.
        header: What plain datagrams of the swarm begin with; bound to the seal, not sent.
    """

    overhead_bytes: int
    """How much longer a sealed datagram is than the plain one."""

    def __init__(self, swarm_key: SwarmKey, header: bytes) -> None:
        self.overhead_bytes = _PREFIX_BYTES + TAG_BYTES - len(header)
        self._key = swarm_key.derive(_PURPOSE)
        self._header = header
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        self._begin()

    def seal(self, datagram: bytes) -> bytes:
        """The datagram (header and message) for the wire."""
        if self._counter > _LAST_COUNTER:
            self._begin()
        counter = self._counter.to_bytes(COUNTER_BYTES, "big")
        self._counter += 1
        sealed = self._aead.encrypt(_NONCE_FILL + counter, datagram[len(self._header) :], self._header)
        return self._salt + counter + sealed

    def open(self, sealed: bytes) -> bytes | None:
        """The datagram with its header. None: not sealed by a holder of the key, of another swarm, or seen before."""
        if not _PREFIX_BYTES + TAG_BYTES < len(sealed) <= MAX_DATAGRAM_BYTES:
            return None
        salt, counter = sealed[:SALT_BYTES], sealed[SALT_BYTES:_PREFIX_BYTES]
        known = self._sessions.get(salt)
        session = known or _Session(AESGCM(self._session_key(salt)))
        number = int.from_bytes(counter, "big")
        if not session.is_fresh(number):
            return None
        try:
            message = session.aead.decrypt(_NONCE_FILL + counter, sealed[_PREFIX_BYTES:], self._header)
        except InvalidTag:
            return None
        session.note(number)
        # Only sessions of members are remembered: strangers drive nobody out.
        self._sessions[salt] = session
        self._sessions.move_to_end(salt)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return self._header + message

    def _begin(self) -> None:
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._counter = 0
        self._aead = AESGCM(self._session_key(self._salt))

    def _session_key(self, salt: bytes) -> bytes:
        return hashlib.blake2b(salt, key=self._key, digest_size=32).digest()

    def __repr__(self) -> str:
        return f"<Sealer {self._counter} sealed, {len(self._sessions)} senders known>"
