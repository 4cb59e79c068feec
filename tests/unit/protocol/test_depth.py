"""Nesting is counted as a parser would, and before one runs."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import DecodeError
from p2pmoe.protocol import depth
from p2pmoe.protocol.depth import check_json_depth
from p2pmoe.protocol.messages import decode_header, request_decoder, response_decoder

LEAVES = st.none() | st.integers() | st.text(st.sampled_from('ab"\\[]{}\n'), max_size=8)
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"[\\', max_size=3), inner, max_size=3),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 0


@given(DOCUMENTS, st.integers(0, 8))
def test_the_limit_is_the_depth_that_a_parser_sees(document: Any, limit: int) -> None:
    text = json.dumps(document).encode()
    if depth_of(document) <= limit:
        check_json_depth(text, limit)
    else:
        with pytest.raises(DecodeError, match=f"more than {limit} levels"):
            check_json_depth(memoryview(text), limit)


def read_slowly(text: bytes) -> tuple[int, bool]:
    """The greatest depth that a parser comes to before what is no JSON, read byte by byte; and whether it gets there.

    A parser gives up at a backslash outside a string and at a bracket that closes nothing.
    """
    depth = deepest = 0
    in_string = escaped = False
    for byte in text:
        if in_string:
            in_string = escaped or byte != ord('"')
            escaped = not escaped and byte == ord("\\")
        elif byte == ord('"'):
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
        if depth < 0 or (byte == ord("\\") and not in_string):
            return deepest, False
    return deepest, True


@given(
    st.lists(st.sampled_from([b"[", b"]", b"{", b"}", b'"', b"\\", b'\\"', b"x", b"[[[["]), max_size=40).map(b"".join),
    st.integers(0, 6),
    st.integers(1, 9) | st.just(1 << 16),
)
def test_no_bytes_get_a_parser_deeper_than_the_limit(text: bytes, limit: int, chunk_bytes: int) -> None:
    deepest, to_its_end = read_slowly(text)
    with mock.patch.object(depth, "_CHUNK_BYTES", chunk_bytes):  # so that depths and strings go over the borders
        try:
            check_json_depth(text, limit)
        except DecodeError:
            assert deepest > limit or not to_its_end
        else:
            assert deepest <= limit


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"x":' + b"[1," * 5_000 + b"1" + b"]" * 5_000 + b"}",
        b'{"a":"' + b"x" * (1 << 20) + b'","b":' + b"[" * 40 + b"]" * 40 + b"}",
    ],
)
@pytest.mark.parametrize("decoder", [request_decoder, response_decoder])
def test_a_deep_header_is_a_decode_error(decoder: Any, text: bytes) -> None:
    with pytest.raises(DecodeError, match="nested"):
        decode_header(decoder, text)


def test_long_flat_texts_are_not_deep() -> None:
    check_json_depth(b"[" + b"[1,2]," * 300_000 + b"[1]]", 2)
    check_json_depth(b'{"a":"' + b"[" * 3_000_000 + b'"}', 1)
