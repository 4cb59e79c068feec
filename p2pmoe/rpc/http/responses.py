"""Answers of the HTTP side: JSON documents and refusals."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import hdrs, web

from p2pmoe.errors import CallError, DecodeError
from p2pmoe.types import WIRE_VERSION


def json_response(document: Any, status: int = 200) -> web.Response:
    """A document of plain values."""
    return web.Response(body=msgspec.json.encode(document), status=status, content_type="application/json")


def error_response(error: CallError | DecodeError) -> web.Response:
    """The refusal of a request as a whole; the connection ends with it."""
    response = json_response({"error": str(error), "code": error.code, "message": str(error)}, error.code)
    if error.code == 426:
        response.headers[hdrs.UPGRADE] = f"p2pmoe/{WIRE_VERSION}"
    if error.code in (429, 503):
        response.headers[hdrs.RETRY_AFTER] = str(max(1, round(getattr(error, "retry_after_s", None) or 1)))
    response.force_close()  # the request's body may be unread
    return response
