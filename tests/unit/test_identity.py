"""Keys: made once, kept private, never shown."""

from __future__ import annotations

import copy
import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.dht.state_file import read_state
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
def small_order_keys() -> list[bytes]:
    """Every encoding of a point P with 8 P = 0, found on the curve -x² + y² = 1 + d x² y² itself."""
    p = 2**255 - 19
    d = -121665 * pow(121666, -1, p) % p

    def add(first, second):
        (x1, y1), (x2, y2) = first, second
        product = d * x1 * x2 * y1 * y2 % p
        x = (x1 * y2 + x2 * y1) * pow(1 + product, -1, p) % p
        return x, (y1 * y2 + x1 * x2) * pow(1 - product, -1, p) % p

    def root(square):
        candidate = pow(square, (p + 3) // 8, p)
        if candidate * candidate % p != square:
            candidate = candidate * pow(2, (p - 1) // 4, p) % p
        return candidate if candidate * candidate % p == square else None

    # Twice a point of order 8 has y = 0: x² + y² = 0, and so d y⁴ + 2 y² - 1 = 0.
    points = {(0, 1)}
    for sign in (1, -1):
        y = root((-1 + sign * (root(1 + d) or 0)) * pow(d, -1, p) % p)
        x = None if y is None else root(-y * y % p)
        if x is not None:
            points |= {(each, other) for each in (x, -x % p) for other in (y, -y % p)}
    for point in list(points):
        double = add(point, point)
        points |= {double, add(double, double)}
    assert len(points) == 8
    encodings = []
    for _, y in points:
        for number in (y, y + p):  # a number over p is another spelling of the same
            if number < 2**255:
                encodings += [(number | sign << 255).to_bytes(32, "little") for sign in (0, 1)]
    return sorted(set(encodings))


@pytest.mark.parametrize("public_key", small_order_keys(), ids=bytes.hex)
def test_a_key_of_small_order_signs_nothing(public_key):
    for signature in (bytes(64), b"\1" + bytes(63), public_key + bytes(32)):
        for message in (b"", b"any", bytes(100)):
            with pytest.raises(BadSignatureError):
                verify(public_key, message, signature)


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


@posix_only
@pytest.mark.parametrize(
    ("mode", "owner", "accepted"),
    [
        (0o600, 1000, True),
        (0o400, 0, True),
        (0o440, 0, True),  # a secret mounted into a container
        (0o440, 1000, False),
        (0o640, 0, False),
        (0o444, 0, False),
        (0o460, 0, False),
        (0o450, 0, False),
        (0o604, 0, False),
    ],
)
def test_the_group_may_read_what_root_mounts_as_a_secret(tmp_path, monkeypatch, mode, owner, accepted):
    path = tmp_path / "identity.pem"
    ALICE.save(path)
    true_status = os.fstat

    def status(descriptor):
        fields = list(true_status(descriptor))
        fields[0] = stat.S_IFREG | mode
        fields[4] = owner
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", status)
    if accepted:
        assert Identity.load(path) == ALICE
    else:
        with pytest.raises(IdentityError, match=rf"mode 0{mode:o}.*chmod 600 "):
            Identity.load(path)


def test_a_secret_is_read_through_links_and_nothing_beside_it_is_written(tmp_path):
    (tmp_path / "..2026").mkdir()
    ALICE.save(tmp_path / "..2026" / "identity.pem")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "identity.pem").symlink_to("..data/identity.pem")
    before = sorted(tmp_path.rglob("*"))
    assert Identity.load_or_create(tmp_path / "identity.pem") == ALICE
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.decode().encode("utf-16"),
        lambda text: b"\xfe\xff" + text.decode().encode("utf-16-be"),
        lambda text: text.replace(b"\n", b"\r\n"),
    ],
)
def test_a_key_that_went_through_an_editor(tmp_path, encode):
    content = encode(ALICE.export_pem())
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    assert Identity.load(path) == Identity.from_pem(content) == ALICE


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_that_nobody_writes_to_is_no_key_file_and_nobody_waits_for_it(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    os.mkfifo(path, 0o600)
    with pytest.raises(IdentityError, match=r"key\.pem is no regular file"):
        Identity.load(path)
    assert read_state(path) is None
