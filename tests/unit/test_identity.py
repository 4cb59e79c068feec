"""Keys: made once, kept private, never shown."""

from __future__ import annotations

import copy
import os
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import BadSignatureError, IdentityError
from p2pmoe.identity import Identity, node_id_of, peer_id_of, verify

ALICE = Identity.from_seed(b"alice".ljust(32, b"\0"))
posix_only = pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX thing")


def test_ids_of_a_known_key_are_frozen():
    assert ALICE.public_key.hex() == "38088e4c2ae82f5c45c6808a61a6490d3c612ce1da235714466fc748fbc4cbbb"
    assert ALICE.node_id.hex() == "648d2ae404bd520218e8f7afad73afda1a27ae5a"
    assert ALICE.peer_id == "msgsvzaexvjaeghi66x2245p3incpls2"
    assert peer_id_of(ALICE.public_key) == ALICE.peer_id
    assert node_id_of(ALICE.public_key) == ALICE.node_id


def test_repr_shows_the_peer_id_and_nothing_of_the_key():
    assert repr(ALICE) == f"<Identity {ALICE.peer_id}>"
    with pytest.raises(TypeError):
        copy.deepcopy(ALICE)


def test_signatures_verify_and_a_changed_byte_does_not():
    signature = ALICE.sign(b"message")
    verify(ALICE.public_key, b"message", signature)
    for key, message, wrong in [
        (ALICE.public_key, b"massage", signature),
        (Identity.generate().public_key, b"message", signature),
        (ALICE.public_key, b"message", bytes(64)),
    ]:
        with pytest.raises(BadSignatureError):
            verify(key, message, wrong)


@given(st.binary(max_size=64), st.binary(max_size=64), st.binary(max_size=128))
def test_verify_raises_only_bad_signature_whatever_the_bytes(key, message, signature):
    with pytest.raises(BadSignatureError):
        verify(key, message, signature)


@posix_only
def test_load_or_create_makes_a_private_file_in_a_new_folder_once(tmp_path):
    path = tmp_path / "deep" / "identity.pem"
    first = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path) == first == Identity.load(path)
    assert [file.name for file in path.parent.iterdir()] == ["identity.pem"]


def test_racing_creators_end_with_one_key(tmp_path):
    path = tmp_path / "identity.pem"
    together = threading.Barrier(8)
    made = []

    def create():
        together.wait(10)
        made.append(Identity.load_or_create(path))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(made) == 8
    assert len(set(made)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["identity.pem"]


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(IdentityError, match="does not exist"):
        Identity.load(tmp_path / "nobody.pem")


@posix_only
def test_a_file_that_others_can_read_is_refused_with_the_command_that_mends_it(tmp_path):
    path = tmp_path / "identity.pem"
    ALICE.save(path)
    path.chmod(0o640)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        Identity.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", b"x" * 9000]
)
def test_wrong_content_is_an_identity_error_that_quotes_nothing(tmp_path, content):
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError) as caught:
        Identity.load(path)
    assert "AAAA" not in str(caught.value)


def test_another_kind_of_key_is_refused(tmp_path):
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = tmp_path / "identity.pem"
    path.write_bytes(X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="Ed25519"):
        Identity.load(path)


def test_a_folder_in_the_place_of_the_file_is_an_identity_error(tmp_path):
    with pytest.raises(IdentityError):
        Identity.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError):
        Identity.load_or_create(tmp_path / "file" / "identity.pem")


def test_save_never_overwrites(tmp_path):
    path = tmp_path / "identity.pem"
    ALICE.save(path)
    with pytest.raises(IdentityError, match="exists already"):
        Identity.generate().save(path)
    assert Identity.load(path) == ALICE


def test_a_seed_has_32_bytes():
    with pytest.raises(IdentityError):
        Identity.from_seed(b"short")
