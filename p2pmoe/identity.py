"""Who a peer is: an Ed25519 key pair, the peer id made from it, signing and verifying; the key of a closed swarm.

Knows nothing of records, certificates or the network.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from p2pmoe.errors import BadSignatureError, IdentityError
from p2pmoe.types import PeerId

PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
NODE_ID_BYTES: Final = 20
SWARM_KEY_BYTES: Final = 32
MIN_TOKEN_CHARACTERS: Final = 32
MAX_KEY_FILE_BYTES: Final = 4096

_NODE_DOMAIN: Final = b"p2pmoe-node-1\0"
_SWARM_DOMAIN: Final = b"p2pmoe-swarm-key-1\0"

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
        return cls(_parse_key(Path(path), _read_private_file(Path(path))))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """Read a key file, or make it (mode 0600, in a folder that is made too) when there is none.

        Two processes that race for the same path end with the same key.

        Raises:
            IdentityError: as `load`, or the file cannot be written.
        """
        path = Path(path)
        if not _exists(path):
            fresh = cls.generate()
            if _write_new_private_file(path, _pem(fresh._private)):  # noqa: SLF001 - our own class
                return fresh
        return cls.load(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a new file of mode 0600. Never overwrites.

        Raises:
            IdentityError: the file exists already or cannot be written.
        """
        if not _write_new_private_file(Path(path), _pem(self._private)):
            raise IdentityError(
                f"{path} exists already; a key is never overwritten: move it away or choose another path"
            )

    @classmethod
    def from_pem(cls, content: bytes, source: str = "on standard input") -> Identity:
        """The identity of an exported key; `source` is what errors name. Raises IdentityError."""
        return cls(_parse_key(source, content))

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
        return cls(_parse_swarm_key(path, _read_private_file(path, "copy it from another member of the swarm")))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key in hexadecimal to a new file of mode 0600. Never overwrites. Raises IdentityError."""
        if not _write_new_private_file(Path(path), self._secret.hex().encode("ascii") + b"\n"):
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
    token = _read_private_file(path, f"make it with: p2pmoe id admin-token {path}").strip()
    if len(token) < MIN_TOKEN_CHARACTERS or len(token) > 1024 or not all(0x21 <= byte <= 0x7E for byte in token):
        raise IdentityError(
            f"token file {path} must hold one line of {MIN_TOKEN_CHARACTERS} or more printable characters without "
            f"spaces; make another with: p2pmoe id admin-token FILE"
        )
    return token


def save_new_admin_token(path: str | os.PathLike[str]) -> None:
    """Write a random token to a new file of mode 0600. Never overwrites. Raises IdentityError."""
    if not _write_new_private_file(Path(path), secrets.token_urlsafe(32).encode("ascii") + b"\n"):
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


def _pem(private_key: Ed25519PrivateKey) -> bytes:
    return private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise IdentityError(f"key file {path} cannot be reached: {error.strerror}") from error


def _read_private_file(path: Path, remedy: str = "start a node once to make it, or give another path") -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise IdentityError(f"key file {path} is no regular file")
            # Windows has no mode bits; its files inherit the folder's access list.
            if os.name == "posix" and mode & 0o077:
                raise IdentityError(
                    f"key file {path} can be read by others (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}"
                )
            return file.read(MAX_KEY_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise IdentityError(f"key file {path} does not exist; {remedy}") from error
    except OSError as error:
        raise IdentityError(f"key file {path} cannot be read: {error.strerror}; check its owner and mode") from error


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


def _write_new_private_file(path: Path, content: bytes) -> bool:
    """True when this call made the file, False when it was there. The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_private(temporary, content)
            return _publish(temporary, path, content)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise IdentityError(
            f"key file {path} cannot be written: {error.strerror}; check the folder's owner and mode"
        ) from error


def _write_private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, path: Path, content: bytes) -> bool:
    try:
        os.link(temporary, path)  # unlike rename, fails when somebody else was first
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: the exclusive create still decides who was first.
        try:
            _write_private(path, content)
        except FileExistsError:
            return False
    return True
