"""The certificate that carries a node's key over TLS: made, installed into a server's context, checked by a caller.

Rules a caller checks, in this order (`check_certificate`), each ends in PeerIdentityError:

1. The certificate is at most 4 KiB of DER with an Ed25519 key.
2. The key is exactly the one that signed the peer's record in the DHT. Nobody vouches for it, no name is looked at.
3. That key signed the certificate itself.
4. Now lies within its validity, give or take one hour.

TLS 1.3 proves besides that whoever answers holds the private key. A certificate is valid from a day before it was made
until 30 days after, and is made anew when half of that is over (`CertificateSource`), so a caller whose clock is wrong
by less than a day is not locked out. Knows nothing of sockets and endpoints.
"""

from __future__ import annotations

import datetime as dt
import logging
import secrets
import ssl
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from p2pmoe.errors import BadSignatureError, IdentityError, PeerIdentityError
from p2pmoe.identity.keys import Identity, peer_id_of, verify

VALID_BEFORE_S: Final = 86_400.0
VALID_FOR_S: Final = 30 * 86_400.0
CLOCK_SLACK_S: Final = 3_600.0
MAX_CERTIFICATE_BYTES: Final = 4096

logger = logging.getLogger(__name__)


def make_certificate(identity: Identity, now: float, *, valid_for_s: float = VALID_FOR_S) -> x509.Certificate:
    """A self-signed certificate of the identity's own key; `now` in seconds since 1970."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.peer_id)])
    private_key = identity._private  # noqa: SLF001 - of this package
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now - VALID_BEFORE_S))
        .not_valid_after(_moment(now + valid_for_s))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private_key, algorithm=None)
    )


def install_certificate(context: ssl.SSLContext, identity: Identity, certificate: x509.Certificate) -> None:
    """Make `context` answer with this certificate; may be repeated, handshakes from then on use the new one.

    Python's TLS reads keys from files only. The key is therefore written encrypted, under a password that exists for
    this call alone, to a folder that only its owner may open and that is gone when this returns.

    Raises:
        IdentityError: the temporary folder cannot be used.
    """
    password = secrets.token_hex(32)
    private_key = identity._private  # noqa: SLF001 - of this package
    encrypted = private_key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password.encode("ascii"))
    )
    try:
        with tempfile.TemporaryDirectory(prefix="p2pmoe-") as folder:
            path = Path(folder, "node.pem")
            path.touch(mode=0o600)
            path.write_bytes(certificate.public_bytes(Encoding.PEM) + encrypted)
            context.load_cert_chain(path, password=password)
    except OSError as error:  # ssl.SSLError is one
        raise IdentityError(
            f"the node's certificate cannot be loaded by way of {tempfile.gettempdir()}: {error}; "
            f"check that folder, or set TMPDIR to one that can be written"
        ) from error


class CertificateSource:
    """Keeps a certificate in a server's context that never runs out, as long as `renew_if_due` is called now and then.

    Raises IdentityError when the first certificate cannot be loaded.
    """

    def __init__(
        self,
        identity: Identity,
        context: ssl.SSLContext,
        *,
        clock: Callable[[], float] = time.time,
        valid_for_s: float = VALID_FOR_S,
    ) -> None:
        self._identity, self._clock, self._valid_for_s = identity, clock, valid_for_s
        self.context = context
        self._made_at = 0.0
        self._renew()

    def __repr__(self) -> str:
        return f"<CertificateSource of {self._identity.peer_id}>"

    def renew_if_due(self) -> bool:
        """Make a new certificate when half of the old one's life is over, or the clock was set back before its making.

        When that fails the old one stays, and the next call tries again. True when there is a new one.
        """
        if 0.0 <= self._clock() - self._made_at < self._valid_for_s / 2:
            return False
        try:
            self._renew()
        except IdentityError as error:
            logger.warning("the certificate could not be renewed, the old one stays: %s", error)
            return False
        logger.info("the node's certificate was renewed")
        return True

    def _renew(self) -> None:
        now = self._clock()
        install_certificate(
            self.context, self._identity, make_certificate(self._identity, now, valid_for_s=self._valid_for_s)
        )
        self._made_at = now


def check_certificate(der: bytes | None, public_key: bytes, now: float) -> None:
    """Whether a certificate proves the raw Ed25519 key `public_key`. See the rules at the top of this file.

    Raises:
        PeerIdentityError: it does not, whatever the bytes are.
    """
    expected = peer_id_of(public_key)
    if not der or len(der) > MAX_CERTIFICATE_BYTES:
        raise PeerIdentityError(f"peer {expected} was expected, the answer came with no p2pmoe certificate")
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        signed, signature = certificate.tbs_certificate_bytes, certificate.signature
        algorithm = certificate.signature_algorithm_oid
    # The parser warns of odd serial numbers; whoever turns warnings into errors must not see that raised.
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, Warning) as error:
        raise PeerIdentityError(f"peer {expected} was expected, the certificate cannot be read: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise PeerIdentityError(f"peer {expected} was expected, the certificate carries no Ed25519 key")
    if key.public_bytes_raw() != public_key:
        raise PeerIdentityError(
            f"peer {expected} was expected, {peer_id_of(key.public_bytes_raw())} answered: the record is older than "
            f"the peer's present key, or somebody stands in between; wait a minute for a fresh record"
        )
    if algorithm != SignatureAlgorithmOID.ED25519:
        raise PeerIdentityError(f"peer {expected} did not sign its certificate with Ed25519")
    try:
        verify(public_key, signed, signature)
    except BadSignatureError as error:
        raise PeerIdentityError(f"peer {expected} did not sign the certificate that carries its key") from error
    _check_validity(expected, begin, end, now)


def _check_validity(expected: str, begin: dt.datetime, end: dt.datetime, now: float) -> None:
    if not begin.timestamp() - CLOCK_SLACK_S <= now <= end.timestamp() + CLOCK_SLACK_S:
        raise PeerIdentityError(
            f"the certificate of peer {expected} is valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, "
            f"which is not now; check the clocks of both machines"
        )


def _moment(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(max(0.0, seconds), tz=dt.UTC)
