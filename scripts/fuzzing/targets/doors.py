"""What a stranger shows at the door: messages of the session handshake, `Authorization` headers, certificates."""

from __future__ import annotations

import base64
import binascii
from typing import Final
from unittest import mock

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fuzzing.target import KIB, Target
from fuzzing.targets.kit_loop import StepLoop
from fuzzing.targets.records import ALICE, NOW
from p2pmoe.config import AccessConfig
from p2pmoe.errors import AccessDeniedError, AuthenticationError, DecodeError, P2PMoEError, PeerIdentityError
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.identity.certificate import MAX_CERTIFICATE_BYTES, check_certificate, make_certificate
from p2pmoe.protocol import sessions as s
from p2pmoe.rpc.http.client_sessions import ClientSessions
from p2pmoe.rpc.http.sessions import NONCE_PATH
from p2pmoe.server.access import Access
from p2pmoe.server.sessions import Sessions
from p2pmoe.types import Endpoint

NODE: Final = Identity.from_seed(bytes(31) + b"n")
BOB: Final = Identity.from_seed(bytes(31) + b"b")
SECRET: Final = SwarmKey(bytes(range(32)))
ADMIN: Final = b"an-admin-token-of-enough-characters"
ADDRESS: Final = "192.0.2.1"
ENDPOINT: Final = Endpoint("192.0.2.9", 9, public_key=NODE.public_key)
BEGAN: Final = 1000.0
LIFETIME_S: Final = 600.0

_loop = StepLoop()


class Clock:
    """Seconds, set by hand."""

    def __init__(self) -> None:
        self.now = BEGAN

    def __call__(self) -> float:
        return self.now


def _sessions(clock: Clock) -> Sessions:
    return Sessions(lifetime_s=LIFETIME_S, clock=clock, secret=bytes(range(32, 64)))


def _door(config: AccessConfig, clock: Clock, swarm_key: SwarmKey | None = None) -> Access:
    return Access(
        config, NODE.public_key, clock=clock, swarm_key=swarm_key, admin_token=ADMIN, sessions=_sessions(clock)
    )


def _made_nonce() -> s.SessionNonce:
    with mock.patch("p2pmoe.server.sessions.secrets.token_bytes", bytes):  # the same bytes every time
        return s.SessionNonce(_sessions(Clock()).make_nonce().hex(), 30.0)


NONCE: Final = _made_nonce()
TOKEN: Final = _sessions(Clock()).issue(ALICE.public_key)
SHARED_TOKEN: Final = _sessions(Clock()).issue(ALICE.public_key, b"\x07" * 8)
PLAIN: Final = s.make_session_request(ALICE, NODE.public_key, NONCE, None)
PROVEN: Final = s.make_session_request(ALICE, NODE.public_key, NONCE, SECRET)
_ISSUED: Final = frozenset(base64.urlsafe_b64decode(token) for token in (TOKEN, SHARED_TOKEN))

_nonce_answer: Final = msgspec.json.encode(NONCE)
_token_answer: Final = msgspec.json.encode(s.SessionToken(TOKEN, LIFETIME_S))

# ------------------------------------------------------------------------------------------------ the handshake


def shake_hands(data: bytes) -> str:
    """One JSON text as each message of the handshake: a client's request at three doors, a node's two answers."""
    said: list[str] = []
    refused: list[P2PMoEError] = []
    for attempt in (_open_doors, _hear_nonce, _hear_token):
        try:
            said.append(attempt(data))
        except (DecodeError, AuthenticationError) as error:
            refused.append(error)
    if not said:
        raise refused[0]
    return " ".join(said)


def _open_doors(data: bytes) -> str:
    """A request at an open door, at that of a private swarm, and at one that alice may not pass."""
    request = s.decode(s.request_decoder, data)
    clock = Clock()
    doors = (
        _door(AccessConfig(), clock),
        _door(AccessConfig(), clock, SECRET),
        _door(AccessConfig(allow=(BOB.peer_id,)), clock),
    )
    opened = []
    for number, door in enumerate(doors):
        try:
            token = door.open_session(request, ADDRESS)
        except (AuthenticationError, AccessDeniedError) as error:
            opened.append(f"{type(error).__name__} {str(error)[:20]}")
            continue
        if (request.public_key, request.nonce, request.signature) != (PLAIN.public_key, NONCE.nonce, PLAIN.signature):
            raise AssertionError("a session for a signature that nobody made")
        if number == 2 or (number == 1 and request.proof != PROVEN.proof):
            raise AssertionError(f"door {number} opened to somebody who may not pass")
        if door.identify(f"Bearer {token.token}", ADDRESS).peer_id != ALICE.peer_id:
            raise AssertionError("a session of somebody else")
        try:
            door.open_session(request, ADDRESS)
            raise AssertionError("a nonce that opens twice")
        except AuthenticationError:
            opened.append("open")
    return " ".join(opened)


def _hear_nonce(data: bytes) -> str:
    return "nonce" if _authorize(data, _token_answer) else "none"


def _hear_token(data: bytes) -> str:
    header = _authorize(_nonce_answer, data)
    header.encode("ascii")
    if not header.isprintable() or len(header) > 1024:
        raise AssertionError(f"the header {header[:80]!r} would be sent")
    return "token"


def _authorize(nonce: bytes, token: bytes) -> str:
    """What a client sends to a node that answers so; it signs for nobody but that node."""

    async def post(_endpoint: Endpoint, path: str, body: bytes) -> bytes:
        if path == NONCE_PATH:
            return nonce
        request = s.request_decoder.decode(body)
        signed = s.session_bytes(NODE.public_key, ALICE.public_key, bytes.fromhex(request.nonce))
        if request.signature != ALICE.sign(signed).hex():
            raise AssertionError("the client signed other bytes")
        return token

    async def authorize() -> str | None:
        client = ClientSessions(ALICE, SECRET, post, clock=Clock())
        try:
            return await client.authorize(ENDPOINT)
        finally:
            await client.close()

    header: str | None = _loop.run(authorize())
    if header is None:
        raise AssertionError("no header, and no error")
    return header


# ----------------------------------------------------------------------------------------------------- headers


def read_authorization(data: bytes) -> str:
    """An `Authorization` header, decoded as aiohttp does: alice's tokens are known while they live, nothing else."""
    text = data.decode("utf-8", "surrogateescape")
    clock = Clock()
    door = _door(AccessConfig(mode="identified"), clock)
    if door.is_admin(text):
        if text.removeprefix("Bearer ").encode() != ADMIN:
            raise AssertionError("an admin without the token")
        return "admin"
    caller = door.identify(text, ADDRESS)
    scheme, _, token = text.partition(" ")
    try:
        raw = base64.b64decode(token, altchars=b"-_")
    except (ValueError, binascii.Error):
        raw = b""
    if scheme != "Bearer" or raw not in _ISSUED or caller.peer_id != ALICE.peer_id:
        raise AssertionError("a token that nobody issued")
    if door.identify(text, ADDRESS) != caller:
        raise AssertionError("another caller the second time")
    clock.now += LIFETIME_S + 1
    for late in (door, _door(AccessConfig(), clock)):
        try:
            late.identify(text, ADDRESS)
        except AuthenticationError:
            continue
        raise AssertionError("a session without end")
    return "shared" if caller.key != ALICE.peer_id else "own"


# ------------------------------------------------------------------------------------------------ certificates


def _certificate(**options: float) -> bytes:
    with mock.patch("p2pmoe.identity.certificate.x509.random_serial_number", return_value=0x1234):
        return make_certificate(ALICE, NOW, **options).public_bytes(Encoding.DER)


_CERTIFICATES: Final = {"usual": _certificate(), "short": _certificate(valid_for_s=1.0)}
_SIGNED: Final = frozenset(x509.load_der_x509_certificate(der).tbs_certificate_bytes for der in _CERTIFICATES.values())


def read_certificate(data: bytes) -> str:
    """What a node shows in TLS: taken only when alice signed it."""
    check_certificate(data, ALICE.public_key, NOW)
    if x509.load_der_x509_certificate(data).tbs_certificate_bytes not in _SIGNED:
        raise AssertionError("a certificate that alice did not make")
    return "hers"


# ------------------------------------------------------------------------------------------------------- seeds


def handshake_seeds() -> dict[str, bytes]:
    return {
        "nonce": _nonce_answer,
        "request": msgspec.json.encode(PLAIN),
        "request-with-proof": msgspec.json.encode(PROVEN),
        "token": _token_answer,
    }


def authorization_seeds() -> dict[str, bytes]:
    return {
        "own": b"Bearer " + TOKEN.encode(),
        "shared": b"Bearer " + SHARED_TOKEN.encode(),
        "admin": b"Bearer " + ADMIN,
    }


TARGETS: Final = (
    Target(
        "handshake", shake_hands, (DecodeError, AuthenticationError), s.MAX_SESSION_BYTES, handshake_seeds,
        mutate="json", max_input_bytes=2 * s.MAX_SESSION_BYTES,
    ),
    Target("authorizations", read_authorization, (AuthenticationError,), 8 * KIB, authorization_seeds),
    Target(
        "certificates", read_certificate, (PeerIdentityError,), MAX_CERTIFICATE_BYTES, lambda: _CERTIFICATES,
        max_input_bytes=2 * MAX_CERTIFICATE_BYTES,
    ),
)  # fmt: skip
