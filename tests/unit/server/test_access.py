"""Who may call: nonces, signatures, tokens, lists and the swarm key, without a network."""

from __future__ import annotations

import base64
import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.config import AccessConfig
from p2pmoe.errors import AccessDeniedError, AuthenticationError, OverloadedError
from p2pmoe.identity import Identity, SwarmKey
from p2pmoe.protocol.sessions import SessionNonce, SessionRequest, SessionToken, make_session_request
from p2pmoe.server.access import MAX_REMEMBERED, Access
from p2pmoe.server.sessions import NONCE_LIFETIME_S, Sessions
from p2pmoe.types import Caller

NODE, ALICE, BOB, MALLORY = (Identity.from_seed(name.ljust(32, b"\0")) for name in (b"node", b"alice", b"bob", b"mal"))
SWARM, OTHER_SWARM = SwarmKey(bytes(32)), SwarmKey(bytes(31) + b"\1")
HOME = "192.0.2.7"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock | None = None, *, swarm_key: SwarmKey | None = None, **config: object) -> Access:
    return Access(AccessConfig(**config), NODE.public_key, clock=clock or Clock(), swarm_key=swarm_key)  # type: ignore[arg-type]


def request_of(access: Access, who: Identity, *, node: bytes = NODE.public_key, key: SwarmKey | None = None):
    return make_session_request(who, node, access.make_nonce(HOME), key)


def log_in(access: Access, who: Identity, *, key: SwarmKey | None = None, address: str = HOME) -> str:
    return "Bearer " + access.open_session(request_of(access, who, key=key), address).token


def test_a_session_is_the_key_that_signed() -> None:
    access = make()
    assert access.identify(log_in(access, ALICE), HOME) == Caller(ALICE.peer_id, ALICE.peer_id)
    assert access.identify(log_in(access, BOB), HOME).peer_id == BOB.peer_id


def test_an_open_door_serves_the_anonymous_by_address() -> None:
    access = make()
    assert access.identify(None, HOME) == Caller(HOME)
    assert access.identify(None, "192.0.2.8") != access.identify(None, HOME)


def test_a_nonce_opens_one_session() -> None:
    access = make()
    request = request_of(access, ALICE)
    access.open_session(request, HOME)
    with pytest.raises(AuthenticationError, match="used before"):
        access.open_session(request, HOME)
    with pytest.raises(AuthenticationError, match="used before"):
        access.open_session(make_session_request(BOB, NODE.public_key, SessionNonce(request.nonce, 1.0), None), HOME)


def test_a_nonce_grows_old() -> None:
    clock = Clock()
    access = make(clock)
    request = request_of(access, ALICE)
    clock.now += NONCE_LIFETIME_S
    with pytest.raises(AuthenticationError, match="older than 30 s"):
        access.open_session(request, HOME)


def test_a_spent_nonce_is_remembered_as_long_as_it_lives() -> None:
    clock = Clock()
    sessions = Sessions(lifetime_s=1, clock=clock, max_spent=2)
    nonces = [sessions.make_nonce() for _ in range(4)]
    sessions.spend(nonces[0])
    clock.now += NONCE_LIFETIME_S - 1
    sessions.spend(nonces[1])
    with pytest.raises(OverloadedError) as caught:
        sessions.spend(nonces[2])
    assert caught.value.retry_after_s
    with pytest.raises(AuthenticationError):
        sessions.check_nonce(nonces[0])
    clock.now += 1
    sessions.spend(nonces[2])  # the first one is too old to be used again
    with pytest.raises(AuthenticationError):
        sessions.check_nonce(nonces[0])


@given(st.binary(max_size=40))
def test_a_nonce_that_is_not_ours_is_refused(nonce: bytes) -> None:
    with pytest.raises(AuthenticationError):
        Sessions(lifetime_s=1, clock=Clock()).check_nonce(nonce)


@given(st.integers(0, 31), st.integers(1, 255))
def test_a_changed_nonce_is_refused(place: int, change: int) -> None:
    access = make()
    nonce = bytearray.fromhex(access.make_nonce(HOME).nonce)
    nonce[place] ^= change
    with pytest.raises(AuthenticationError):
        access.open_session(make_session_request(ALICE, NODE.public_key, SessionNonce(nonce.hex(), 1.0), None), HOME)


def test_a_forged_signature_is_refused_and_costs_the_nonce_nothing() -> None:
    access = make()
    request = request_of(access, ALICE)
    for wrong in (bytes(64).hex(), request_of(access, ALICE).signature, request_of(access, MALLORY).signature):
        with pytest.raises(AuthenticationError, match="signature"):
            access.open_session(msgspec.structs.replace(request, signature=wrong), HOME)
    with pytest.raises(AuthenticationError, match="signature"):
        access.open_session(msgspec.structs.replace(request, public_key=BOB.public_key.hex()), HOME)
    access.open_session(request, HOME)


def test_a_signature_for_another_node_is_worth_nothing_here() -> None:
    access = make()
    with pytest.raises(AuthenticationError, match="signature"):
        access.open_session(request_of(access, ALICE, node=MALLORY.public_key), HOME)


def test_a_session_ends() -> None:
    clock = Clock()
    access = make(clock, session_lifetime_s=60.0)
    seen, unseen = log_in(access, ALICE), log_in(access, BOB)
    access.identify(seen, HOME)
    clock.now += 59.9
    access.identify(seen, HOME)
    clock.now += 0.2
    for header in (seen, unseen, seen):
        with pytest.raises(AuthenticationError, match="ended"):
            access.identify(header, HOME)


def test_a_token_of_another_node_or_before_a_restart_is_refused() -> None:
    first, second = make(), make()
    with pytest.raises(AuthenticationError, match="not one of this node's"):
        second.identify(log_in(first, ALICE), HOME)


@given(st.text(max_size=200))
def test_a_header_that_is_no_token_is_refused(header: str) -> None:
    with pytest.raises(AuthenticationError):
        make().identify(header, HOME)
    with pytest.raises(AuthenticationError):
        make().identify(f"Bearer {header}", HOME)


@given(place=st.integers(0, 79), change=st.integers(1, 255))
def test_a_changed_token_is_refused(place: int, change: int) -> None:
    access = make()
    raw = bytearray(base64.urlsafe_b64decode(log_in(access, ALICE).removeprefix("Bearer ")))
    assert len(raw) == 80
    raw[place] ^= change
    with pytest.raises(AuthenticationError):
        access.identify("Bearer " + base64.urlsafe_b64encode(raw).decode(), HOME)


@pytest.mark.parametrize("config", [{"mode": "identified"}, {"allow": (ALICE.peer_id,)}])
def test_where_sessions_are_needed_the_refusal_says_how(config: dict[str, object]) -> None:
    access = make(**config)
    with pytest.raises(AuthenticationError, match="/p2pmoe/v1/session/nonce"):
        access.identify(None, HOME)
    assert access.identify(log_in(access, ALICE), HOME).peer_id == ALICE.peer_id


def test_only_the_allowed_may_call() -> None:
    access = make(allow=(ALICE.peer_id,))
    log_in(access, ALICE)
    with pytest.raises(AccessDeniedError, match=BOB.peer_id):
        log_in(access, BOB)


def test_denial_wins() -> None:
    access = make(allow=(ALICE.peer_id, BOB.peer_id), deny=(BOB.peer_id,))
    log_in(access, ALICE)
    with pytest.raises(AccessDeniedError, match="does not serve peer"):
        log_in(access, BOB)
    with pytest.raises(AccessDeniedError):
        log_in(make(deny=(BOB.peer_id,)), BOB)


def test_a_private_swarm_is_for_holders_of_its_key() -> None:
    access = make(swarm_key=SWARM)
    with pytest.raises(AuthenticationError):
        access.identify(None, HOME)
    with pytest.raises(AccessDeniedError, match="--swarm-key"):
        log_in(access, ALICE)
    with pytest.raises(AccessDeniedError, match="not that of"):
        log_in(access, ALICE, key=OTHER_SWARM)
    assert access.identify(log_in(access, ALICE, key=SWARM), HOME).peer_id == ALICE.peer_id
    log_in(make(), ALICE, key=SWARM)  # an open node does not mind


def test_a_proof_is_for_one_nonce_and_peer() -> None:
    access = make(swarm_key=SWARM)
    proof = request_of(access, ALICE, key=SWARM).proof
    for request in (request_of(access, ALICE), request_of(access, MALLORY)):
        with pytest.raises(AccessDeniedError):
            access.open_session(msgspec.structs.replace(request, proof=proof), HOME)


def test_with_swarm_key_and_list_both_are_asked_for() -> None:
    access = make(swarm_key=SWARM, allow=(ALICE.peer_id,))
    log_in(access, ALICE, key=SWARM)
    for who, key in ((ALICE, None), (BOB, SWARM)):
        with pytest.raises(AccessDeniedError):
            log_in(access, who, key=key)


def test_handshakes_of_one_address_are_bounded_before_signatures_cost_anything() -> None:
    clock = Clock()
    access = make(clock, sessions_per_s=0.2)
    bad = msgspec.structs.replace(request_of(access, ALICE), signature=bytes(64).hex())
    for _ in range(2):
        with pytest.raises(AuthenticationError):
            access.open_session(bad, HOME)
    with pytest.raises(OverloadedError, match="handshakes a second") as caught:
        access.open_session(bad, HOME)
    assert caught.value.retry_after_s == pytest.approx(5.0)
    log_in(access, ALICE, address="192.0.2.99")
    clock.now += 5.1
    log_in(access, ALICE)


def test_more_keys_give_an_address_no_more_shares() -> None:
    clock = Clock()
    access = make(clock, max_peers_per_address=2, session_lifetime_s=60.0)
    callers = [access.identify(log_in(access, Identity.generate()), HOME) for _ in range(6)]
    assert len({caller.key for caller in callers}) == 3
    assert len({caller.peer_id for caller in callers}) == 6
    assert len({caller.key for caller in callers[2:]}) == 1
    assert access.identify(log_in(access, ALICE, address="192.0.2.8"), HOME).key == ALICE.peer_id
    clock.now += 61
    assert access.identify(log_in(access, BOB), HOME).key == BOB.peer_id


def test_tables_are_bounded() -> None:
    access = make(sessions_per_s=float("inf"))
    for index in range(MAX_REMEMBERED + 10):
        access._source(f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}")
        access.identify(f"Bearer {access._sessions.issue(index.to_bytes(32, 'big'))}", HOME)
    assert len(access._addresses) == len(access._known) == MAX_REMEMBERED


def test_an_admin_knows_the_token_and_without_one_nobody_is() -> None:
    token = os.urandom(16).hex().encode()
    access = Access(AccessConfig(), NODE.public_key, clock=Clock(), admin_token=token)
    assert access.is_admin(f"Bearer {token.decode()}")
    for header in (
        None,
        "",
        "Bearer ",
        f"Bearer {token.decode()}x",
        f"Bearer {token.decode()[:-1]}",
        "Bearer \udcff\xe9",
    ):
        assert not access.is_admin(header)
    for header in (None, "", "Bearer ", "Bearer None"):
        assert not make().is_admin(header)
    assert not access.is_admin(log_in(access, ALICE))


def test_secrets_are_in_no_repr() -> None:
    token = os.urandom(16).hex()
    secret = os.urandom(32)
    clock = Clock()
    sessions = Sessions(lifetime_s=60, clock=clock, secret=secret)
    access = Access(
        AccessConfig(), NODE.public_key, clock=clock, swarm_key=SWARM, admin_token=token.encode(), sessions=sessions
    )
    request = request_of(access, ALICE, key=SWARM)
    session = access.open_session(request, HOME)
    access.identify(f"Bearer {session.token}", HOME)
    assert isinstance(request, SessionRequest)
    assert isinstance(session, SessionToken)
    shown = " ".join(map(repr, (access, sessions, request, session, SWARM)))
    for hidden in (token, secret.hex(), repr(secret), session.token, request.signature, request.proof or "?"):
        assert hidden not in shown
