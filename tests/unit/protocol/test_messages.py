"""JSON headers: what they look like, and that no bytes get past the types."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import MAX_MESSAGE_CHARS, DecodeError, OverloadedError, UnknownExpertError
from p2pmoe.protocol.messages import (
    RequestHeader,
    RequestParameters,
    ResponseHeader,
    TensorHeader,
    TensorParameters,
    decode_header,
    encode_json,
    error_header,
    new_call_id,
    request_decoder,
    response_decoder,
    version_mismatch,
)
from p2pmoe.types import WIRE_VERSION


def test_defaults_stay_off_the_wire() -> None:
    header = RequestHeader(id="a", inputs=(TensorHeader("0", "FP32", (1,), TensorParameters(4)),))
    assert encode_json(header) == (
        b'{"id":"a","inputs":[{"name":"0","datatype":"FP32","shape":[1],"parameters":{"binary_data_size":4}}]}'
    )


def test_direction_travels_as_pass() -> None:
    encoded = encode_json(RequestHeader(parameters=RequestParameters(direction="backward", timeout_ms=5.0)))
    assert encoded == b'{"parameters":{"pass":"backward","timeout_ms":5.0}}'
    assert decode_header(request_decoder, encoded).parameters.direction == "backward"


def test_unknown_keys_are_ignored_as_the_public_protocol_asks() -> None:
    header = decode_header(request_decoder, b'{"id":"a","new":{"x":[1]},"parameters":{"sequence_id":7,"priority":1}}')
    assert header == RequestHeader(id="a")


def test_an_error_frame_raises_its_class_with_its_message() -> None:
    error = OverloadedError("the queue is full")
    error.retry_after_s = 2.5
    sent = encode_json(error_header("a", "ffn.0", error))
    header = decode_header(response_decoder, sent)
    with pytest.raises(OverloadedError, match="the queue is full") as caught:
        header.raise_for_error()
    assert caught.value.retry_after_s == 2.5
    assert header.id == "a"


def test_a_decode_error_becomes_a_frame_with_its_code() -> None:
    assert error_header("", "", DecodeError("too long", code=413)).code == 413
    assert error_header("", "", UnknownExpertError("who?")).code == 404


def test_a_result_raises_nothing_and_a_silent_error_says_so() -> None:
    ResponseHeader(id="a").raise_for_error()
    with pytest.raises(UnknownExpertError, match="no reason"):
        ResponseHeader(code=404).raise_for_error()


def test_a_peers_words_are_short_and_harmless_to_a_terminal() -> None:
    with pytest.raises(UnknownExpertError) as caught:
        ResponseHeader(code=404, message="\x1b]0;owned\x07 gone\nsecond line\u202e" + "x" * 9999).raise_for_error()
    message = str(caught.value)
    assert message.startswith("\ufffd]0;owned\ufffd gone\ufffdsecond line\ufffdxxx")
    assert len(message) == MAX_MESSAGE_CHARS


def test_call_ids_are_128_random_bits() -> None:
    ids = {new_call_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(each) == 32 and int(each, 16) >= 0 for each in ids)


def test_a_version_mismatch_names_both() -> None:
    message = version_mismatch(WIRE_VERSION + 1)
    assert f"version {WIRE_VERSION}" in message
    assert str(WIRE_VERSION + 1) in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ["id", "model_name", "inputs", "outputs", "parameters", "code", "message", "retry_after_s"]
shaped = st.dictionaries(st.sampled_from(KEYS), json_values)


@given(st.one_of(st.binary(max_size=64), (shaped | json_values).map(msgspec.json.encode)))
def test_any_bytes_give_a_header_or_a_decode_error(raw: bytes) -> None:
    for decoder in (request_decoder, response_decoder):
        try:
            header = decode_header(decoder, raw)
        except DecodeError:
            continue
        assert isinstance(header, (RequestHeader, ResponseHeader))
        assert decode_header(decoder, encode_json(header)) == header
