"""Pages of the experts that a node hosts: how one is asked for, and how a client follows them. No I/O of its own.

    GET /p2pmoe/v1/experts?after=ffn.3.17&limit=100

    {"peer_id": …, "total": 10000,
     "experts": {uid: {"schema_digest": …, "updates": 12, "requests": 34}, …},      in the order of the uids as texts
     "schemas": {digest: {"forward_schema": …, "outputs_schema": …, "keyword_names": […]}, …},
     "next": uid}                                                                   what to put behind `after`, or null

Rules:
1. A page has at most 100 experts, and ends before 256 KiB of schemas; it has one expert at least.
2. A schema stands once in a page, under its digest.
3. A client takes `next` only if it lies behind what it asked for, and follows 1,024 pages at most: a node can
   neither lead it in a circle nor keep it for ever.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Annotated, Any, Final
from urllib.parse import quote

import msgspec
from msgspec import Meta

from p2pmoe.errors import BadRequestError, DecodeError
from p2pmoe.types import WIRE_VERSION

EXPERTS_PATH: Final = f"/p2pmoe/v{WIRE_VERSION}/experts"
MAX_PAGE_EXPERTS: Final = 100
MAX_PAGE_SCHEMA_BYTES: Final = 256 * 1024
MAX_PAGES: Final = 1024
_MAX_LISTED: Final = 8192
"""Of one page of a peer, whose own limit need not be ours."""
_MAX_UID_CHARS: Final = 128

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class ListedExpert(msgspec.Struct, frozen=True):
    """What a page says of one expert."""

    schema_digest: Annotated[str, Meta(max_length=64)] = ""
    updates: Count | None = None
    requests: Count | None = None


class ExpertPage(msgspec.Struct, frozen=True):
    """A page, as far as a client reads it."""

    experts: Annotated[
        dict[Annotated[str, Meta(max_length=_MAX_UID_CHARS)], ListedExpert], Meta(max_length=_MAX_LISTED)
    ]
    next: Annotated[str, Meta(max_length=_MAX_UID_CHARS)] | None = None


def page_of_query(query: Mapping[str, str]) -> tuple[str, int]:
    """`after` and `limit` of a request; more than 100 experts are never given. Raises BadRequestError."""
    after, text = query.get("after", ""), query.get("limit", str(MAX_PAGE_EXPERTS))
    if not (text.isascii() and text.isdigit()) or int(text[:9]) == 0 or len(after) > _MAX_UID_CHARS:
        raise BadRequestError(
            "a page of experts is asked for by ?after=UID&limit=N, with N from 1 to 100; `next` of a page is the UID"
        )
    return after, min(int(text[:9]), MAX_PAGE_EXPERTS)


def page_path(after: str = "") -> str:
    """The path of the page behind a uid; of the first one without it."""
    return f"{EXPERTS_PATH}?after={quote(after, safe='')}" if after else EXPERTS_PATH


def read_page(document: Any) -> ExpertPage:
    """Raises DecodeError for what is no page."""
    try:
        return msgspec.convert(document, ExpertPage)
    except msgspec.ValidationError as error:
        raise DecodeError(f"not a page of experts: {error}") from error


async def follow_pages(get_json: Callable[[str], Awaitable[Any]]) -> AsyncGenerator[dict[str, ListedExpert], None]:
    """The experts of a node, page by page; `get_json` reads a document of it by path.

    Raises:
        DecodeError: what came is no page, or the pages do not end.
    """
    after = ""
    for _ in range(MAX_PAGES):
        page = read_page(await get_json(page_path(after)))
        yield page.experts
        if not page.next:
            return
        if page.next <= after:
            raise DecodeError("not a page of experts: the next one does not lie behind it")
        after = page.next
    raise DecodeError(f"a node's experts take more than {MAX_PAGES} pages; the rest is not read")
