"""SwarmKey: read from private files only, never shown, one derived key a purpose."""

from __future__ import annotations

import base64
import copy
import os
from pathlib import Path

import pytest

from p2pmoe.errors import IdentityError
from p2pmoe.identity import SwarmKey, load_admin_token, save_new_admin_token

SECRET = bytes(range(32))
needs_modes = pytest.mark.skipif(os.name != "posix", reason="mode bits")


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    "text",
    [
        SECRET.hex(),
        SECRET.hex().upper() + "\n",
        base64.b32encode(SECRET).decode(),
        base64.b32encode(SECRET).decode().rstrip("=").lower() + "\n",
    ],
)
def test_a_key_is_read_in_hexadecimal_and_in_base32(tmp_path: Path, text: str) -> None:
    assert SwarmKey.load(write(tmp_path / "swarm.key", text.encode())) == SwarmKey(SECRET)


@pytest.mark.parametrize("content", [b"", b"00", b"zz" * 32, b"0" * 63, b"A" * 51 + b"!", SECRET, b"\xff" * 64])
def test_anything_else_is_refused_without_quoting_it(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(IdentityError, match="holds no swarm key") as caught:
        SwarmKey.load(write(tmp_path / "swarm.key", content))
    if len(content) > 8:
        assert content.decode("latin-1") not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="another member"):
        SwarmKey.load(tmp_path / "swarm.key")


@needs_modes
def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "swarm.key", SECRET.hex().encode(), 0o640)
    with pytest.raises(IdentityError, match="chmod 600"):
        SwarmKey.load(path)


@needs_modes
def test_a_saved_key_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path, key = tmp_path / "folder" / "swarm.key", SwarmKey.generate()
    key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SwarmKey.load(path) == key
    with pytest.raises(IdentityError, match="never overwritten"):
        SwarmKey.generate().save(path)


def test_purposes_have_keys_of_their_own() -> None:
    key = SwarmKey(SECRET)
    assert key.derive(b"dht") == key.derive(b"dht") != key.derive(b"session")
    assert SECRET != key.derive(b"") != SwarmKey(SECRET[::-1]).derive(b"")
    # Frozen: members of one swarm may run different releases.
    assert key.derive(b"dht").hex() == "cfd28b5c22792af2c29f9df2b39d1241b98b44f37de4494a4fe5f0e6472fad21"


def test_the_secret_is_never_shown() -> None:
    key = SwarmKey(SECRET)
    for text in (repr(key), str(key), f"{key}"):
        assert text == "<SwarmKey>"
    with pytest.raises(TypeError):
        copy.deepcopy(key)
    with pytest.raises(IdentityError, match="got 31"):
        SwarmKey(SECRET[1:])


@needs_modes
def test_an_admin_token_is_made_once_and_read_from_private_files_only(tmp_path: Path) -> None:
    path = tmp_path / "admin.token"
    save_new_admin_token(path)
    assert path.stat().st_mode & 0o777 == 0o600
    token = load_admin_token(path)
    assert len(token) >= 32
    with pytest.raises(IdentityError, match="never overwritten"):
        save_new_admin_token(path)
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600") as caught:
        load_admin_token(path)
    assert token.decode() not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"short", b"two words " * 8, b"line\n" * 20, b"\xff" * 40, b"x" * 2000])
def test_what_is_no_token_is_refused_without_quoting_it(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(IdentityError, match="p2pmoe id admin-token") as caught:
        load_admin_token(write(tmp_path / "admin.token", content))
    assert not content or content.decode("latin-1") not in str(caught.value)
    with pytest.raises(IdentityError, match="p2pmoe id admin-token"):
        load_admin_token(tmp_path / "nowhere")


def test_a_byte_order_mark_is_no_part_of_a_secret(tmp_path: Path) -> None:
    text = SECRET.hex()
    for content in (b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), text.encode() + b"\r\n"):
        assert SwarmKey.load(write(tmp_path / "swarm.key", content)) == SwarmKey(SECRET)
    token = "t" * 40
    for content in (b"\xef\xbb\xbf" + token.encode() + b"\r\n", token.encode("utf-16")):
        assert load_admin_token(write(tmp_path / "admin.token", content)) == token.encode()
