"""Files that a node reads back: its key, the secrets beside it, and what its DHT remembers."""

from __future__ import annotations

import atexit
import base64
import shutil
import tempfile
from pathlib import Path
from typing import Final

import msgspec

from fuzzing.target import KIB, Target
from p2pmoe.config import DHTConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.dht.state_file import MAX_STATE_BYTES, SavedState
from p2pmoe.errors import IdentityError
from p2pmoe.identity import MAX_KEY_FILE_BYTES, Identity, SwarmKey
from p2pmoe.identity.secrets import load_admin_token

from fuzzing.targets.records import ALICE, NOW  # isort: skip

_FOLDER: Final = Path(tempfile.mkdtemp(prefix="p2pmoe-fuzz-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
_KEY: Final = _FOLDER / "key.pem"
_KEY.touch(0o600)
_SECRET: Final = _FOLDER / "secret"
_SECRET.touch(0o600)
_STATE: Final = _FOLDER / "state.json"


def read_key(data: bytes) -> str:
    """A key file: an identity that signs, or an IdentityError that quotes nothing of it."""
    _KEY.write_bytes(data)
    try:
        identity = Identity.load(_KEY)
    except IdentityError as error:
        _check_unquoted(data, error)
        raise
    identity.sign(b"message")
    return "key"


def read_secret(data: bytes) -> str:
    """A file as a swarm key and as an admin token: a secret of the promised size, or an error that quotes nothing."""
    _SECRET.write_bytes(data)
    said: list[str] = []
    refused: list[IdentityError] = []
    for name, read in (("swarm key", _read_swarm_key), ("token", _read_token)):
        try:
            read(data)
        except IdentityError as error:
            _check_unquoted(data, error)
            refused.append(error)
        else:
            said.append(name)
    if not said:
        raise refused[0]
    return " ".join(said)


def _read_swarm_key(data: bytes) -> None:
    key = SwarmKey.load(_SECRET)
    text = data.strip()
    bare = text.rstrip(b"=").upper()
    written = bytes.fromhex(text.decode()) if len(text) == 64 else base64.b32decode(bare.ljust(56, b"="))
    if key != SwarmKey(written) or len(key.derive(b"purpose")) != 32:
        raise AssertionError("another swarm key than the file's")


def _read_token(data: bytes) -> None:
    token = load_admin_token(_SECRET)
    if token != data.strip() or not 32 <= len(token) <= 1024 or not token.isascii() or b" " in token:
        raise AssertionError("a token that nobody could send")


def _check_unquoted(data: bytes, error: IdentityError) -> None:
    if any(len(line) > 15 and line in str(error) for line in data.decode("latin-1").split("\n")):
        raise AssertionError("an error that quotes the file") from error


def read_state(data: bytes) -> str:
    """The DHT's memory: whatever it holds, the peers can be sent to and the sequence is one that peers take."""
    _STATE.write_bytes(data)
    node = DHTNode(ALICE, DHTConfig(state_path=str(_STATE)), clock=lambda: NOW)
    node._load_state()
    peers = node.membership.peers
    for host, port in peers:
        if not host.replace(":", "").replace(".", "").isalnum() or not 0 < port < 65536:
            raise AssertionError(f"{host!r}:{port} would be asked")
    _, (record,) = node.signer.sign("ffn.", {0: b""}, 60.0)
    if record.sequence > (NOW + 31) * 1e6:
        raise AssertionError("a sequence that every peer refuses")
    return f"{min(len(peers), 3)} {node.signer.last_sequence > NOW * 1e6}"


def key_seeds() -> dict[str, bytes]:
    path = _FOLDER / "alice.pem"
    path.unlink(missing_ok=True)
    ALICE.save(path)
    return {"ed25519": path.read_bytes()}


def secret_seeds() -> dict[str, bytes]:
    raw = bytes(range(32))
    base32 = base64.b32encode(raw)
    return {
        "hexadecimal": raw.hex().encode() + b"\n",
        "base32": base32.rstrip(b"=").lower() + b"\n",
        "base32-padded": base32,
        "token": b"an-admin-token_of-enough.characters!\n",
        "token-longest": b"~" * 1024,
    }


def state_seeds() -> dict[str, bytes]:
    full = SavedState((("192.0.2.1", 1), ("2001:db8::1", 65535)), int(NOW * 1e6))
    return {"empty": b"{}", "full": msgspec.json.encode(full)}


TARGETS: Final = (
    Target("key_files", read_key, (IdentityError,), MAX_KEY_FILE_BYTES, key_seeds, max_input_bytes=8 * KIB),
    Target("secrets_files", read_secret, (IdentityError,), MAX_KEY_FILE_BYTES, secret_seeds, max_input_bytes=8 * KIB),
    Target("dht_state", read_state, (), MAX_STATE_BYTES, state_seeds, mutate="json", max_input_bytes=32 * KIB),
)
