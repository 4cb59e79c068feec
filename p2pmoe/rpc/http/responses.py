"""Answers of the HTTP side: JSON documents and refusals."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict

from p2pmoe.errors import CallError, DecodeError, message_of
from p2pmoe.types import WIRE_VERSION

_LONGEST_RETRY_S: Final = 3600
SAFE_HEADERS: Final[CIMultiDict[str]] = CIMultiDict(
    {
        # Documents are for programs; a browser that is led here must not run, frame, guess or keep anything.
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        hdrs.CACHE_CONTROL: "no-store",
    }
)


def json_response(document: Any, status: int = 200) -> web.Response:
    """A document of plain values."""
    body = msgspec.json.encode(document)
    return web.Response(body=body, status=status, content_type="application/json", headers=SAFE_HEADERS)


def error_response(error: CallError | DecodeError) -> web.Response:
    """The refusal of a request as a whole; the connection ends with it."""
    message = message_of(error)
    response = json_response({"error": message, "code": error.code, "message": message}, error.code)
    if error.code == 426:
        response.headers[hdrs.UPGRADE] = f"p2pmoe/{WIRE_VERSION}"
    if error.code == 401:
        response.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="p2pmoe"'
    if error.code in (429, 503):
        response.headers[hdrs.RETRY_AFTER] = _retry_after(getattr(error, "retry_after_s", None))
    response.force_close()  # the request's body may be unread
    return response


def _retry_after(seconds: float | None) -> str:
    """Whole seconds, at least one; endless waits and those that are no number become an hour."""
    if seconds is None:
        return "1"
    return str(max(1, round(seconds))) if seconds < _LONGEST_RETRY_S else str(_LONGEST_RETRY_S)
