"""Refusals over HTTP: whatever an error says or asks for, they can be written."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from raising_kit import HOSTILE

from p2pmoe.errors import ExpertFailedError, OverloadedError
from p2pmoe.protocol.messages import encode_json, error_header
from p2pmoe.rpc.http.responses import error_response


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "1"), (0.0, "1"), (0.4, "1"), (7.6, "8"), (math.inf, "3600"), (math.nan, "3600"), (1e9, "3600"), (-5, "1")],
)
def test_any_wait_becomes_a_header(seconds: float | None, text: str) -> None:
    error = OverloadedError("full")
    error.retry_after_s = seconds
    assert error_response(error).headers["Retry-After"] == text
    assert json.loads(encode_json(error_header("1", "ffn.0", error)))["code"] == 429


@pytest.mark.parametrize("text", ["a\ud800b", "line\nline", "x" * 10**6, "\x00\x1b[2J", ""])
def test_any_text_goes_into_a_document_and_a_frame(text: str) -> None:
    error = ExpertFailedError(text)
    response: Any = error_response(error)
    document = json.loads(response.body)
    header = json.loads(encode_json(error_header("1", "ffn.0", error)))
    assert document["code"] == header["code"] == 500
    assert document["error"] == document["message"] == header.get("message", "")
    assert document["error"].isprintable()
    assert len(document["error"]) <= 1000


class OddError(ExpertFailedError):
    def __str__(self) -> str:
        raise HOSTILE["leaving"][0]


def test_an_error_of_ours_that_cannot_speak_is_answered_too() -> None:
    response: Any = error_response(OddError())
    assert json.loads(response.body)["error"] == "an error whose text cannot be had"
