"""Nesting is counted as a parser would, and before one runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import DecodeError
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
