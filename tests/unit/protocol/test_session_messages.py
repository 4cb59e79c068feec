"""The bytes of the session handshake, frozen: two releases must sign and prove the same."""

from __future__ import annotations

import hashlib
import hmac

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import DecodeError
from p2pmoe.identity import Identity, SwarmKey, verify
from p2pmoe.protocol.sessions import (
    SessionNonce,
    decode,
    make_session_request,
    nonce_decoder,
    request_decoder,
    session_bytes,
    token_decoder,
)

NODE, ALICE = (Identity.from_seed(name.ljust(32, b"\0")) for name in (b"node", b"alice"))
NONCE = bytes(range(32))
DECODERS = [nonce_decoder, request_decoder, token_decoder]


def test_what_is_signed_is_frozen() -> None:
    signed = session_bytes(NODE.public_key, ALICE.public_key, NONCE)
    assert signed == b"p2pmoe-session-1\0" + NODE.public_key + ALICE.public_key + NONCE
    assert len(signed) == 113
    secret = bytes(range(32))
    request = make_session_request(ALICE, NODE.public_key, SessionNonce(NONCE.hex(), 30.0), SwarmKey(secret))
    verify(ALICE.public_key, signed, bytes.fromhex(request.signature))
    # HKDF-SHA256 (RFC 5869) by hand: extract with a salt of zeros, expand to one block.
    extracted = hmac.digest(bytes(32), secret, hashlib.sha256)
    key = hmac.digest(extracted, b"p2pmoe-swarm-key-1\0session\x01", hashlib.sha256)
    assert request.proof == hmac.digest(key, signed, hashlib.sha256).hex()
    assert make_session_request(ALICE, NODE.public_key, SessionNonce(NONCE.hex(), 30.0), None).proof is None


@given(st.binary(max_size=300), st.sampled_from(DECODERS))
def test_any_bytes_are_a_message_or_a_decode_error(raw: bytes, decoder: msgspec.json.Decoder[object]) -> None:
    with pytest.raises(DecodeError):
        decode(decoder, raw)


@pytest.mark.parametrize(
    "document",
    [
        {"public_key": "AA" * 32},
        {"public_key": "00" * 31},
        {"nonce": "0" * 65},
        {"signature": "0" * 127},
        {"signature": None},
        {"proof": "zz" * 32},
        {"proof": 5},
    ],
)
def test_a_field_of_another_form_is_refused(document: dict[str, object]) -> None:
    good: dict[str, object] = {"public_key": "00" * 32, "nonce": "00" * 32, "signature": "00" * 64, "more": 1}
    decode(request_decoder, msgspec.json.encode(good))
    with pytest.raises(DecodeError):
        decode(request_decoder, msgspec.json.encode(good | document))


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "a\n", "x" * 513, "ü"])
def test_a_token_that_is_no_header_value_is_refused(token: str) -> None:
    with pytest.raises(DecodeError):
        decode(token_decoder, msgspec.json.encode({"token": token, "expires_in_s": 1.0}))
