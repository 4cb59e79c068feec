"""Our own records: sequences that never repeat, times to live, in a closed swarm the delegation. Knows no socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from p2pmoe.dht.ownership import OwnDelegation
from p2pmoe.errors import DelegationError
from p2pmoe.identity import Identity
from p2pmoe.protocol.delegations import room_beside, wrap
from p2pmoe.protocol.records import MAX_VALUE_BYTES, Record, key_of, sign_record


class RecordSigner:
    """Signs what one node writes.

    Args:
        identity: Whose records they are.
        swarm_id: Names the keys, with the prefixes.
        clock: Seconds since 1970.
        delegation: What they carry in a closed swarm.
    """

    def __init__(
        self, identity: Identity, swarm_id: str, clock: Callable[[], float], delegation: OwnDelegation | None = None
    ) -> None:
        self.last_sequence = 0
        """Kept on disk, so that a clock set back repeats nothing."""
        self._identity = identity
        self._swarm_id = swarm_id
        self._clock = clock
        self._delegation = delegation

    @property
    def max_value_bytes(self) -> int:
        """How long a value may be now. Raises DelegationError: in a closed swarm nothing may be written."""
        if self._delegation is None:
            return MAX_VALUE_BYTES
        return room_beside(self._delegation.current(self._clock()))

    def require_scope(self, name: str) -> None:
        """Raises DelegationError when the owner does not let us write this uid or prefix."""
        delegation = self._delegation.current(self._clock()) if self._delegation else None
        if delegation is not None and not delegation.covers(name):
            raise DelegationError(
                f"our delegation covers {delegation.scope}*, not {name}; ask the swarm's owner for a wider one"
            )

    def sign(self, prefix: str, values: Mapping[int, bytes], ttl_s: float) -> tuple[bytes, list[Record]]:
        """The key of a prefix and our records there, from values by part.

        Raises:
            EncodeError: a value is too long or a part too high.
            DelegationError: in a closed swarm, we may not write there.
        """
        key = key_of(self._swarm_id, prefix)
        now = self._clock()
        expires_at_ms = int((now + ttl_s) * 1000)
        return key, [
            sign_record(
                self._identity,
                key,
                value,
                part=part,
                sequence=self._next_sequence(now),
                expires_at_ms=expires_at_ms,
            )
            for part, value in self._delegated(prefix, values, now).items()
        ]

    def _delegated(self, prefix: str, values: Mapping[int, bytes], now: float) -> Mapping[int, bytes]:
        if self._delegation is None:
            return values
        delegation = self._delegation.current(now)
        if not delegation.leads_through(prefix):
            self.require_scope(prefix)
        return {part: wrap(delegation, value) for part, value in values.items()}

    def _next_sequence(self, now: float) -> int:
        self.last_sequence = max(int(now * 1e6), self.last_sequence + 1)
        return self.last_sequence

    def __repr__(self) -> str:
        return f"<RecordSigner {self._identity.peer_id[:8]}…, last sequence {self.last_sequence}>"
