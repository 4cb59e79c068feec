"""Nonces and tokens of the session handshake: made, checked, spent. Knows no HTTP and no policy.

Rules:
1. A nonce is ours (it carries its own HMAC), lives `NONCE_LIFETIME_S`, and opens one session at most.
2. A token is a public key, an expiry, a share (see `Access`) and an HMAC under a secret of this process: no table,
   nothing to fill up. Another node, or this one after a restart, does not take it.
3. Where spent nonces can no longer be remembered, sessions are refused; none is ever forgotten while it lives.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from p2pmoe.errors import AuthenticationError, OverloadedError
from p2pmoe.identity import PUBLIC_KEY_BYTES
from p2pmoe.protocol.sessions import NONCE_BYTES

NONCE_LIFETIME_S: Final = 30.0
MAX_SPENT: Final = 65_536

_EXPIRY = struct.Struct("<Q")  # milliseconds of the node's own monotonic clock
_SALT_BYTES: Final = 8
_NONCE_MAC_BYTES: Final = NONCE_BYTES - _EXPIRY.size - _SALT_BYTES
_MAC_BYTES: Final = 32
SHARE_BYTES: Final = 8
OWN_SHARE: Final = bytes(SHARE_BYTES)
_TOKEN_BYTES: Final = PUBLIC_KEY_BYTES + _EXPIRY.size + SHARE_BYTES + _MAC_BYTES


class Sessions:
    """Nonces and tokens of one node process. Never prints its secret."""

    def __init__(
        self, *, lifetime_s: float, clock: Callable[[], float], max_spent: int = MAX_SPENT, secret: bytes | None = None
    ) -> None:
        self.lifetime_s = lifetime_s
        self._clock = clock
        self._max_spent = max_spent
        self._secret = secret or secrets.token_bytes(32)
        self._spent: OrderedDict[bytes, float] = OrderedDict()  # nonce -> when it may be forgotten

    def __repr__(self) -> str:
        return f"<Sessions: {len(self._spent)} nonces spent>"

    def make_nonce(self) -> bytes:
        """32 bytes that open one session within `NONCE_LIFETIME_S`."""
        body = _EXPIRY.pack(int((self._clock() + NONCE_LIFETIME_S) * 1e3)) + secrets.token_bytes(_SALT_BYTES)
        return body + self._mac(b"nonce", body)[:_NONCE_MAC_BYTES]

    def check_nonce(self, nonce: bytes) -> None:
        """Raises AuthenticationError for a nonce that is not ours, too old, or spent."""
        body, mac = nonce[:-_NONCE_MAC_BYTES], nonce[-_NONCE_MAC_BYTES:]
        if len(nonce) != NONCE_BYTES or not hmac.compare_digest(self._mac(b"nonce", body)[:_NONCE_MAC_BYTES], mac):
            raise AuthenticationError("the nonce is not one of this node's; ask for a new one")
        if _EXPIRY.unpack_from(body)[0] <= self._clock() * 1e3:
            raise AuthenticationError(f"the nonce is older than {NONCE_LIFETIME_S:.0f} s; ask for a new one")
        if nonce in self._spent:
            raise AuthenticationError("the nonce was used before; ask for a new one for every session")

    def spend(self, nonce: bytes) -> None:
        """Use a checked nonce up. Raises OverloadedError when too many were spent in its lifetime."""
        now = self._clock()
        while self._spent and next(iter(self._spent.values())) <= now:
            self._spent.popitem(last=False)
        if len(self._spent) >= self._max_spent:
            error = OverloadedError(
                f"{self._max_spent} sessions were opened within {NONCE_LIFETIME_S:.0f} s; try later"
            )
            error.retry_after_s = NONCE_LIFETIME_S
            raise error
        self._spent[nonce] = now + NONCE_LIFETIME_S

    def issue(self, public_key: bytes, share: bytes = OWN_SHARE) -> str:
        """A token for the holder of a key; it opens nothing after `lifetime_s`."""
        body = public_key + _EXPIRY.pack(int((self._clock() + self.lifetime_s) * 1e3)) + share
        return base64.urlsafe_b64encode(body + self._mac(b"token", body)).decode("ascii")

    def read(self, token: str) -> tuple[bytes, bytes, float]:
        """The public key and the share of a token, and when it expires, on the clock. Raises AuthenticationError."""
        try:
            raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            raw = b""
        body, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if len(raw) != _TOKEN_BYTES or not hmac.compare_digest(self._mac(b"token", body), mac):
            raise AuthenticationError("the session token is not one of this node's; open a new session")
        expires_at = _EXPIRY.unpack_from(body, PUBLIC_KEY_BYTES)[0] / 1e3
        if expires_at <= self._clock():
            raise AuthenticationError("the session has ended; open a new one")
        return body[:PUBLIC_KEY_BYTES], body[-SHARE_BYTES:], expires_at

    def _mac(self, purpose: bytes, body: bytes) -> bytes:
        return hmac.digest(self._secret, b"p2pmoe-" + purpose + b"-1\0" + body, "sha256")
