"""Certificates: whose they are, when they hold, and that the key never lies about in the open."""

from __future__ import annotations

import os
import ssl
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import IdentityError, PeerIdentityError
from p2pmoe.identity import Identity
from p2pmoe.identity.certificate import (
    CLOCK_SLACK_S,
    MAX_CERTIFICATE_BYTES,
    VALID_BEFORE_S,
    VALID_FOR_S,
    CertificateSource,
    check_certificate,
    install_certificate,
    make_certificate,
)

ALICE, MALLORY = (Identity.from_seed(name.ljust(32, b"\0")) for name in (b"alice", b"mallory"))
NOW = 1_800_000_000.0


def der_of(identity: Identity, now: float = NOW) -> bytes:
    return make_certificate(identity, now).public_bytes(Encoding.DER)


DER = der_of(ALICE)  # a certificate has a random number: made once, so that a failure can be repeated


def server() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


def test_a_certificate_proves_its_own_key_only() -> None:
    check_certificate(der_of(ALICE), ALICE.public_key, NOW)
    with pytest.raises(PeerIdentityError, match=f"{ALICE.peer_id} was expected, {MALLORY.peer_id} answered"):
        check_certificate(der_of(MALLORY), ALICE.public_key, NOW)


@pytest.mark.parametrize(
    ("now", "fine"),
    [
        (NOW - VALID_BEFORE_S - CLOCK_SLACK_S, True),
        (NOW - VALID_BEFORE_S - CLOCK_SLACK_S - 1, False),
        (NOW + VALID_FOR_S + CLOCK_SLACK_S, True),
        (NOW + VALID_FOR_S + CLOCK_SLACK_S + 1, False),
    ],
)
def test_validity_has_an_hour_of_slack(now: float, fine: bool) -> None:
    if fine:
        check_certificate(der_of(ALICE), ALICE.public_key, now)
    else:
        with pytest.raises(PeerIdentityError, match="check the clocks of both machines"):
            check_certificate(der_of(ALICE), ALICE.public_key, now)


def test_a_certificate_that_its_key_did_not_sign() -> None:
    forged = bytearray(der_of(ALICE))
    forged[-1] ^= 1
    with pytest.raises(PeerIdentityError, match="did not sign"):
        check_certificate(bytes(forged), ALICE.public_key, NOW)


@pytest.mark.parametrize("der", [None, b"", b"\x30", b"\x00" * 100, b"\x30\x82" + b"\xff" * MAX_CERTIFICATE_BYTES])
def test_what_is_no_certificate(der: bytes | None) -> None:
    with pytest.raises(PeerIdentityError, match=ALICE.peer_id):
        check_certificate(der, ALICE.public_key, NOW)


@given(st.data())
def test_no_changed_byte_passes_and_none_breaks_anything(data: Any) -> None:
    der = bytearray(DER)
    signed = len(x509.load_der_x509_certificate(bytes(der)).tbs_certificate_bytes)
    # What lies between is the name of the algorithm and the frame of the signature.
    meaningful = [*range(4, 4 + signed), *range(len(der) - 64, len(der))]
    for index in data.draw(st.lists(st.sampled_from(meaningful), min_size=1, max_size=4, unique=True)):
        der[index] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PeerIdentityError):
        check_certificate(bytes(der), ALICE.public_key, NOW)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_our_own_error(der: bytes) -> None:
    with pytest.raises(PeerIdentityError):
        check_certificate(der, ALICE.public_key, NOW)


@pytest.mark.skipif(os.name != "posix", reason="file modes are a POSIX thing")
def test_the_key_is_written_encrypted_for_its_owner_only_and_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[bytes] = []

    class Watched(ssl.SSLContext):
        def load_cert_chain(self, certfile: Any, keyfile: Any = None, password: Any = None) -> None:
            path = Path(certfile)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            seen.append(path.read_bytes())
            super().load_cert_chain(certfile, keyfile, password)

    install_certificate(Watched(ssl.PROTOCOL_TLS_SERVER), ALICE, make_certificate(ALICE, NOW))
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in seen[0]
    assert list(tmp_path.iterdir()) == []

    class Failing(ssl.SSLContext):
        def load_cert_chain(self, certfile: Any, keyfile: Any = None, password: Any = None) -> None:
            raise ssl.SSLError("no")

    with pytest.raises(IdentityError, match="TMPDIR"):
        install_certificate(Failing(ssl.PROTOCOL_TLS_SERVER), ALICE, make_certificate(ALICE, NOW))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(IdentityError, match="gone"):
        CertificateSource(ALICE, server(), clock=lambda: NOW)


def test_renewal_by_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = NOW
    source = CertificateSource(ALICE, server(), clock=lambda: now)
    for later, due in [(0.0, False), (VALID_FOR_S / 2 - 1, False), (VALID_FOR_S / 2, True)]:
        now = NOW + later
        assert source.renew_if_due() is due
    now = NOW  # the clock was set back: the certificate would lie in the future of others
    assert source.renew_if_due()
    assert not source.renew_if_due()
    now = NOW + VALID_FOR_S
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert not source.renew_if_due()
    monkeypatch.undo()
    assert source.renew_if_due()


def test_a_certificate_names_its_peer_and_is_no_authority() -> None:
    certificate = make_certificate(ALICE, NOW)
    assert certificate.subject.rfc4514_string() == certificate.issuer.rfc4514_string() == f"CN={ALICE.peer_id}"
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
