"""An Ed25519 key pair, the peer id made from it, signing and verifying.

Knows nothing of records, certificates or the network.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from p2pmoe.errors import BadSignatureError, IdentityError
from p2pmoe.files import without_mark
from p2pmoe.identity.private_files import (
    MAX_KEY_FILE_BYTES,
    exists,
    read_private_file,
    write_new_private_file,
)
from p2pmoe.types import PeerId

PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
NODE_ID_BYTES: Final = 20

_NODE_DOMAIN: Final = b"p2pmoe-node-1\0"

# The y coordinates of the eight points of small order, canonical or not. A "signature" of such a key needs no private
# key and fits almost any message; no honest key pair has one. Source: Chalkias, Garillot and Nikolaenko, "Taming the
# many EdDSAs" (2020), table 1.
_SMALL_ORDER_Y: Final = frozenset(
    bytes.fromhex(text)
    for text in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


def node_id_of(public_key: bytes) -> bytes:
    """The 20-byte place of a public key (32 raw bytes) in the DHT's id space."""
    return hashlib.sha256(_NODE_DOMAIN + public_key).digest()[:NODE_ID_BYTES]


def peer_id_from_node_id(node_id: bytes) -> PeerId:
    """The 32 lower-case base32 characters that people see instead of a 20-byte node id."""
    return PeerId(base64.b32encode(node_id).decode("ascii").lower())


@functools.lru_cache(maxsize=4096)
def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a raw Ed25519 public key (32 bytes)."""
    return peer_id_from_node_id(node_id_of(public_key))


@functools.lru_cache(maxsize=1024)
def _parsed(public_key: bytes) -> Ed25519PublicKey:
    parsed = Ed25519PublicKey.from_public_bytes(public_key)
    if public_key[:-1] + bytes([public_key[-1] & 0x7F]) in _SMALL_ORDER_Y:
        raise ValueError("a public key of small order belongs to nobody")
    return parsed


def verify(public_key: bytes, message: bytes, signature: bytes) -> None:
    """Check an Ed25519 signature.

    Raises:
        BadSignatureError: the three do not fit together, whatever the bytes are.
    """
    try:
        _parsed(public_key).verify(signature, message)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError) as error:
        raise BadSignatureError("the signature does not fit the public key and the bytes") from error


class Identity:
    """A peer's Ed25519 key pair. Immutable; safe to use from any thread; prints the peer id, never the key."""

    __slots__ = ("_private", "node_id", "peer_id", "public_key")

    public_key: bytes
    """32 raw bytes."""
    node_id: bytes
    """20 bytes: where this peer stands in the DHT."""
    peer_id: PeerId

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private = private_key
        self.public_key = private_key.public_key().public_bytes_raw()
        self.node_id = node_id_of(self.public_key)
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> Identity:
        """A fresh random identity that lives in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a 32-byte private seed; for tests and golden bytes. Raises IdentityError."""
        if len(seed) != 32:
            raise IdentityError(f"a private seed has 32 bytes, got {len(seed)}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Identity:
        """Read a key file (PKCS#8 PEM, mode 0600).

        Raises:
            IdentityError: the file is missing, unreadable, no Ed25519 key, or others than its owner may read it.
        """
        return cls(_parse_key(Path(path), read_private_file(Path(path))))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """Read a key file, or make it (mode 0600, in a folder that is made too) when there is none.

        Two processes that race for the same path end with the same key.

        Raises:
            IdentityError: as `load`, or the file cannot be written.
        """
        path = Path(path)
        if not exists(path):
            fresh = cls.generate()
            if write_new_private_file(path, _pem(fresh._private)):  # noqa: SLF001 - our own class
                return fresh
        return cls.load(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a new file of mode 0600. Never overwrites.

        Raises:
            IdentityError: the file exists already or cannot be written.
        """
        if not write_new_private_file(Path(path), _pem(self._private)):
            raise IdentityError(
                f"{path} exists already; a key is never overwritten: move it away or choose another path"
            )

    @classmethod
    def from_pem(cls, content: bytes, source: str = "on standard input") -> Identity:
        """The identity of an exported key; `source` is what errors name. Raises IdentityError."""
        return cls(_parse_key(source, without_mark(content)))

    def export_pem(self) -> bytes:
        """The private key as unencrypted PKCS#8 PEM. Whoever has it is this peer: for moving a node, nothing else."""
        return _pem(self._private)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `message`."""
        return self._private.sign(message)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.public_key == self.public_key

    def __hash__(self) -> int:
        return hash(self.public_key)

    def __repr__(self) -> str:
        return f"<Identity {self.peer_id}>"

    def __reduce__(self) -> str:
        raise TypeError("an Identity is not pickled: its private key stays where it is")


def _pem(private_key: Ed25519PrivateKey) -> bytes:
    return private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _parse_key(path: Path | str, content: bytes) -> Ed25519PrivateKey:
    if len(content) > MAX_KEY_FILE_BYTES:
        raise IdentityError(f"key file {path} is larger than {MAX_KEY_FILE_BYTES} bytes; it is no p2pmoe key")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError) as error:
        # InternalError is what an Ed448 key of a wrong length gives.
        # The parser's own text may quote the content, and the content may be a key.
        raise IdentityError(
            f"key file {path} holds no unencrypted PEM private key; restore it from a backup, or move it away "
            f"and a new identity is made"
        ) from ValueError(f"unparsable key file ({type(error).__name__})")
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"key file {path} holds another kind of key; p2pmoe uses Ed25519")
    return key
