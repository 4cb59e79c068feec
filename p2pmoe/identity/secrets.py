"""Secrets beside a peer's own key: that of a private swarm, and the admin's token. Knows nothing of who asks."""

from __future__ import annotations

import base64
import hmac
import os
import secrets
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2pmoe.errors import IdentityError
from p2pmoe.identity.private_files import read_private_file, write_new_private_file

SWARM_KEY_BYTES: Final = 32
MIN_TOKEN_CHARACTERS: Final = 32
_SWARM_DOMAIN: Final = b"p2pmoe-swarm-key-1\0"


class SwarmKey:
    """The secret that the members of a closed swarm share. Immutable; never printed, compared in constant time.

    The secret itself is used for nothing but `derive`, so that no two purposes ever share a key.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SWARM_KEY_BYTES:
            raise IdentityError(f"a swarm key has {SWARM_KEY_BYTES} bytes, got {len(secret)}")
        self._secret = bytes(secret)

    @classmethod
    def generate(cls) -> SwarmKey:
        """A fresh random key, in memory only."""
        return cls(secrets.token_bytes(SWARM_KEY_BYTES))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SwarmKey:
        """Read a swarm key file: 32 random bytes as 64 hexadecimal or 52 base32 characters, mode 0600.

        Raises:
            IdentityError: the file is missing, unreadable, no swarm key, or others than its owner may read it.
        """
        path = Path(path)
        return cls(_parse_swarm_key(path, read_private_file(path, "copy it from another member of the swarm")))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key in hexadecimal to a new file of mode 0600. Never overwrites. Raises IdentityError."""
        if not write_new_private_file(Path(path), self._secret.hex().encode("ascii") + b"\n"):
            raise IdentityError(f"{path} exists already; a swarm key is never overwritten: choose another path")

    def derive(self, purpose: bytes) -> bytes:
        r"""The 32-byte key for one purpose: HKDF-SHA256 without salt, info `"p2pmoe-swarm-key-1\0" ‖ purpose`."""
        return HKDF(SHA256(), 32, salt=None, info=_SWARM_DOMAIN + purpose).derive(self._secret)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SwarmKey) and hmac.compare_digest(other._secret, self._secret)

    def __hash__(self) -> int:
        return hash(self.derive(b"hash"))

    def __repr__(self) -> str:
        return "<SwarmKey>"

    def __reduce__(self) -> str:
        raise TypeError("a SwarmKey is not pickled: the secret stays where it is")


def load_admin_token(path: str | os.PathLike[str]) -> bytes:
    """The one line of a token file (mode 0600): 32 or more printable ASCII characters without spaces.

    Raises:
        IdentityError: the file is missing, unreadable, no such line, or others than its owner may read it.
    """
    path = Path(path)
    token = read_private_file(path, f"make it with: p2pmoe id admin-token {path}").strip()
    if len(token) < MIN_TOKEN_CHARACTERS or len(token) > 1024 or not all(0x21 <= byte <= 0x7E for byte in token):
        raise IdentityError(
            f"token file {path} must hold one line of {MIN_TOKEN_CHARACTERS} or more printable characters without "
            f"spaces; make another with: p2pmoe id admin-token FILE"
        )
    return token


def save_new_admin_token(path: str | os.PathLike[str]) -> None:
    """Write a random token to a new file of mode 0600. Never overwrites. Raises IdentityError."""
    if not write_new_private_file(Path(path), secrets.token_urlsafe(32).encode("ascii") + b"\n"):
        raise IdentityError(f"{path} exists already; a token is never overwritten: choose another path")


def _parse_swarm_key(path: Path, content: bytes) -> bytes:
    text = content.strip()
    try:
        secret = bytes.fromhex(text.decode("ascii")) if len(text) == 64 else _base32_bytes(text)
    except ValueError:
        secret = b""
    if len(secret) != SWARM_KEY_BYTES:
        # The content may be a secret: it is not quoted.
        raise IdentityError(
            f"swarm key file {path} holds no swarm key ({SWARM_KEY_BYTES} bytes as 64 hexadecimal or 52 base32 "
            f"characters); copy it again from another member of the swarm"
        ) from None
    return secret


def _base32_bytes(text: bytes) -> bytes:
    """Raises ValueError."""
    bare = text.rstrip(b"=")
    return base64.b32decode(bare + b"=" * (-len(bare) % 8), casefold=True)
