"""Closed swarms: whose records count where an owner decides, and the delegation that we show ourselves.

Records are bytes and values here, time is passed in; the only I/O is the delegation file. Knows no socket.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Final

from p2pmoe.errors import BadSignatureError, ConfigError, DecodeError, DelegationError, NotDelegatedError
from p2pmoe.files import without_mark
from p2pmoe.identity import PUBLIC_KEY_BYTES
from p2pmoe.protocol.delegations import (
    MAX_FILE_BYTES,
    Delegation,
    parse_delegation,
    signed_bytes,
    unwrap,
)
from p2pmoe.protocol.records import Record

log = logging.getLogger(__name__)

MAX_SKEW_S: Final = 60.0
"""How far past its end a delegation is still taken: the clocks of two honest nodes may be that far apart."""
MAX_VERIFIED: Final = 4096
WARN_BEFORE_S: Final = 24 * 3600.0


class ClosedSwarm:
    """The rules of a swarm that has an owner: only members with the owner's delegation provide anything.

    A storer does not know the prefix, of which a key is a hash; it checks that the delegation is in force and was
    given to the signer (`delegation_of`, `check`). A reader checks the scope as well (`open`).

    Args:
        owner: The owner's public key, 32 bytes.
        swarm_id: The swarm's name, which the owner's signature covers.
    """

    def __init__(self, owner: bytes, swarm_id: str) -> None:
        self.owner = owner
        self.swarm_id = swarm_id
        self._verified: OrderedDict[bytes, None] = OrderedDict()

    def delegation_of(self, record: Record, now: float) -> Delegation:
        """The delegation that a record carries, in force but not verified. Cheap. Raises NotDelegatedError."""
        try:
            delegation, _ = unwrap(record.value)
        except DecodeError as error:
            raise NotDelegatedError(
                f"the record carries no delegation, and this swarm has an owner: {error}"
            ) from error
        if now >= delegation.expires_at + MAX_SKEW_S:
            raise NotDelegatedError(f"the signer's delegation ended {now - delegation.expires_at:.0f} s ago")
        return delegation

    def check(self, record: Record, delegation: Delegation) -> None:
        """One signature per member, not per record: those found good are remembered. Raises NotDelegatedError."""
        signed = signed_bytes(self.swarm_id, record.public_key, delegation.scope, delegation.expires_at_ms)
        name = hashlib.sha256(delegation.signature + signed).digest()
        if name in self._verified:
            self._verified.move_to_end(name)
            return
        try:
            delegation.check_signature(self.owner, self.swarm_id, record.public_key)
        except BadSignatureError as error:
            raise NotDelegatedError("the delegation was not given by this swarm's owner to this signer") from error
        self._verified[name] = None
        if len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)

    def open(self, record: Record, prefix: str, now: float) -> Record:
        """A record under `prefix` that passed the other rules, with its payload as the value.

        Raises NotDelegatedError: the delegation has ended meanwhile, or its scope lies elsewhere.
        """
        delegation = self.delegation_of(record, now)
        if not (delegation.covers(prefix) or delegation.leads_through(prefix)):
            raise NotDelegatedError(f"the signer's delegation for {delegation.scope} does not reach {prefix}")
        return replace(record, value=unwrap(record.value)[1], scope=delegation.scope)

    def __repr__(self) -> str:
        return f"<ClosedSwarm {self.swarm_id!r} of {self.owner[:4].hex()}…, {len(self._verified)} members seen>"


class OwnDelegation:
    """The delegation that our records carry, from a file that may be replaced by a newer one while we run.

    Args:
        path: The file; None: we were given no delegation, so that we store and read but declare nothing.
        closed: The swarm.
        member: Our public key, 32 bytes.
    """

    def __init__(self, path: str | None, closed: ClosedSwarm, member: bytes) -> None:
        self._path = Path(path) if path else None
        self._closed = closed
        self._member = member
        self._current: Delegation | None = None
        self._read_from: tuple[int, int] | None = None
        self._warned_of: Delegation | None = None

    def load(self) -> None:
        """Read the file. Raises DelegationError: it cannot be read, is none, or is not for us here by this owner."""
        if self._path is not None:
            self._current = self._read(self._path)

    def current(self, now: float) -> Delegation:
        """What to show now. Raises DelegationError when there is none in force."""
        self._reload(now)
        if self._current is None:
            raise DelegationError(
                "this swarm has an owner, and we have no delegation: ask the owner for one "
                "(`p2pmoe id delegate OWNER_KEY_FILE OUR_PUBLIC_KEY`) and set dht.delegation_path"
            )
        if now >= self._current.expires_at:
            raise DelegationError(
                f"our delegation ended {_readable(now - self._current.expires_at)} ago: ask the owner for a new one "
                f"and put it into {self._path}; no restart is needed"
            )
        return self._current

    def _reload(self, now: float) -> None:
        """Near its end, see whether the file holds a newer one; say once how much time is left."""
        if self._path is None or self._current is None or now < self._current.expires_at - WARN_BEFORE_S:
            return
        try:
            if _stamp(self._path) != self._read_from:
                self._current = self._read(self._path)
        except (OSError, DelegationError) as error:
            log.debug("the delegation in %s cannot be read again: %s", self._path, error)
        left_s = self._current.expires_at - now
        if self._warned_of != self._current and left_s < WARN_BEFORE_S:
            self._warned_of = self._current
            log.warning(
                "our delegation in %s ends in %s; ask the swarm's owner for a new one and replace the file: "
                "after that nothing of ours is announced",
                self._path,
                _readable(max(0.0, left_s)),
            )

    def _read(self, path: Path) -> Delegation:
        try:
            stamp = _stamp(path)
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
            if len(content) > MAX_FILE_BYTES:
                raise DelegationError(f"{path} is larger than {MAX_FILE_BYTES} bytes; it is no delegation")
            delegation = parse_delegation(without_mark(content).decode("utf-8"))
            delegation.check_signature(self._closed.owner, self._closed.swarm_id, self._member)
        except OSError as error:
            raise DelegationError(f"the delegation {path} cannot be read: {error.strerror}") from error
        except (DecodeError, UnicodeDecodeError) as error:
            raise DelegationError(
                f"{path} holds no delegation: {error}; ask the swarm's owner for a new one"
            ) from error
        except BadSignatureError as error:
            raise DelegationError(
                f"the delegation {path} was not given by dht.owner to our key in swarm {self._closed.swarm_id!r}; "
                f"check dht.owner, dht.swarm_id and identity_path, or ask the owner for a new one"
            ) from error
        self._read_from = stamp
        return delegation

    def __repr__(self) -> str:
        return f"<OwnDelegation {self._path}: {self._current}>"


def parse_owner(text: str) -> bytes:
    """The 32 bytes of `dht.owner`. Raises ConfigError."""
    try:
        owner = bytes.fromhex(text)
    except ValueError:
        owner = b""
    if len(owner) != PUBLIC_KEY_BYTES:
        raise ConfigError(
            f"dht.owner: expected the owner's public key, {2 * PUBLIC_KEY_BYTES} hexadecimal digits, got {text!r}; "
            f"`p2pmoe id show OWNER_KEY_FILE --json` prints it"
        )
    return owner


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _readable(seconds: float) -> str:
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{math.floor(seconds / unit_s)} {unit}"
    return f"{seconds:.0f} s"
