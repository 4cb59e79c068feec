"""Pages of experts: what may be asked for, and that a node can neither lead a client in a circle nor keep it."""

from __future__ import annotations

from typing import Any

import pytest

from p2pmoe.errors import BadRequestError, DecodeError
from p2pmoe.rpc.expert_pages import MAX_PAGES, ListedExpert, follow_pages, page_of_query, page_path


def test_a_query_says_where_a_page_begins_and_how_long_it_is() -> None:
    assert page_of_query({}) == ("", 100)
    assert page_of_query({"after": "ffn.3", "limit": "7"}) == ("ffn.3", 7)
    assert page_of_query({"limit": "9" * 40}) == ("", 100)
    assert page_path() == "/p2pmoe/v1/experts"
    assert page_path("a b&c") == "/p2pmoe/v1/experts?after=a%20b%26c"


@pytest.mark.parametrize(
    "query", [{"limit": "0"}, {"limit": "-1"}, {"limit": "x"}, {"limit": ""}, {"limit": "٣"}, {"after": "u" * 129}]
)
def test_what_is_no_page_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(BadRequestError, match="after=UID"):
        page_of_query(query)


async def collect(*pages: Any) -> tuple[dict[str, ListedExpert], list[str]]:
    """What a client makes of a node's pages, and which it asked for; the last page comes again and again."""
    asked: list[str] = []

    async def get_json(path: str) -> Any:
        asked.append(path)
        return pages[min(len(asked), len(pages)) - 1]

    experts: dict[str, ListedExpert] = {}
    async for page in follow_pages(get_json):
        experts.update(page)
    return experts, asked


async def test_pages_are_followed_to_the_end() -> None:
    experts, asked = await collect(
        {"experts": {"ffn.0": {"schema_digest": "ab", "updates": 1, "requests": 2}}, "next": "ffn.0", "more": 1},
        {"experts": {"ffn.1": {}}, "next": None},
    )
    assert experts == {"ffn.0": ListedExpert("ab", 1, 2), "ffn.1": ListedExpert()}
    assert asked == ["/p2pmoe/v1/experts", "/p2pmoe/v1/experts?after=ffn.0"]


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([{"experts": {}, "next": "a"}, {"experts": {}, "next": "a"}], "behind"),
        ([{"experts": {}, "next": "b"}, {"experts": {}, "next": "a"}], "behind"),
        ([{"experts": []}], "no.* page"),
        ([{"experts": {"ffn.0": {"updates": -1}}}], "no.* page"),
        ([{"experts": {"ffn.0": {"requests": 2**70}}}], "no.* page"),
        ([{"experts": {"x" * 129: {}}}], "no.* page"),
        ([{"experts": {str(index): {} for index in range(9000)}}], "no.* page"),
        ([None], "no.* page"),
    ],
)
async def test_pages_that_make_no_sense_are_an_error(pages: list[Any], message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        await collect(*pages)


async def test_pages_without_end_end() -> None:
    asked = 0

    async def get_json(path: str) -> Any:
        nonlocal asked
        asked += 1
        return {"experts": {}, "next": f"a{asked:08d}"}

    with pytest.raises(DecodeError, match="more than 1024 pages"):
        async for _ in follow_pages(get_json):
            pass
    assert asked == MAX_PAGES
