"""Answers of the HTTP side: JSON documents and refusals."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict

from p2pmoe.errors import CallError, DecodeError
from p2pmoe.types import WIRE_VERSION

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
    response = json_response({"error": str(error), "code": error.code, "message": str(error)}, error.code)
    if error.code == 426:
        response.headers[hdrs.UPGRADE] = f"p2pmoe/{WIRE_VERSION}"
    if error.code == 401:
        response.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="p2pmoe"'
    if error.code in (429, 503):
        response.headers[hdrs.RETRY_AFTER] = str(max(1, round(getattr(error, "retry_after_s", None) or 1)))
    response.force_close()  # the request's body may be unread
    return response
