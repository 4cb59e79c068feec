"""What a node says of its experts: pages that are bounded in experts and in bytes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from swarm_kit import make_backend
from torch import nn

import p2pmoe
from p2pmoe.errors import SchemaError, UnknownExpertError
from p2pmoe.rpc import expert_pages
from p2pmoe.server import listing as listing_module
from p2pmoe.server.listing import ExpertListing


def make_listing(backends: list[p2pmoe.ExpertBackend]) -> ExpertListing:
    return ExpertListing({each.name: each for each in backends}, "alice", lambda _: 7)


@pytest.fixture(scope="module")
def backends() -> list[p2pmoe.ExpertBackend]:
    return [make_backend(f"ffn.{index}", nn.Linear(4, 4)) for index in range(130)]


def test_pages_hold_a_hundred_experts_and_each_schema_once(backends: list[p2pmoe.ExpertBackend]) -> None:
    listing = make_listing(backends)
    first = listing.page()
    order = sorted(each.name for each in backends)
    assert list(first["experts"]) == order[:100]
    assert (first["next"], first["total"], first["peer_id"]) == (order[99], 130, "alice")
    digest = backends[0].schema_digest
    assert list(first["schemas"]) == [digest]
    assert first["experts"]["ffn.0"] == {"schema_digest": digest, "updates": 0, "requests": 7}
    info = listing.expert("ffn.0")
    assert first["schemas"][digest] == {key: info[key] for key in ("forward_schema", "outputs_schema", "keyword_names")}
    second = listing.page(first["next"])
    assert list(second["experts"]) == order[100:]
    assert second["next"] is None
    assert len(msgspec.json.encode(first)) < 16 * 1024


def test_a_page_may_begin_anywhere(backends: list[p2pmoe.ExpertBackend]) -> None:
    listing = make_listing(backends)
    assert list(listing.page("ffn.99")["experts"]) == []
    assert list(listing.page("zzz")["experts"]) == []
    assert listing.page("zzz")["next"] is None
    assert list(listing.page("ffn.5x", 2)["experts"]) == ["ffn.6", "ffn.60"]
    assert listing.page("ffn.5x", 2)["next"] == "ffn.60"
    assert len(listing.page("", 5000)["experts"]) == 100


def test_a_page_ends_where_schemas_take_much(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = [make_backend(f"ffn.{width}", nn.Linear(width, width), dim=width) for width in range(1, 9)]
    size = len(msgspec.json.encode(next(iter(make_listing(backends).page()["schemas"].values()))))
    monkeypatch.setattr(listing_module, "MAX_PAGE_SCHEMA_BYTES", 4 * size)
    listing = make_listing(backends)
    pages: list[dict[str, Any]] = [listing.page()]
    while pages[-1]["next"]:
        pages.append(listing.page(pages[-1]["next"]))
    assert [uid for page in pages for uid in page["experts"]] == [each.name for each in backends]
    assert len(pages) > 2
    assert all(page["experts"] for page in pages)


class Many(nn.Module):
    """So many inputs that nobody would read their schema."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return inputs[0]


def test_a_schema_that_no_caller_reads_is_refused_in_words() -> None:
    many = make_backend("ffn.0", Many(), args_schema=(p2pmoe.BatchTensorProto(1),) * 3000)
    with pytest.raises(SchemaError, match=r"ffn\.0: its schemas take \d+ bytes"):
        make_listing([many])
    assert expert_pages.MAX_PAGE_SCHEMA_BYTES == 256 * 1024


def test_an_expert_that_is_not_hosted(backends: list[p2pmoe.ExpertBackend]) -> None:
    with pytest.raises(UnknownExpertError, match="look it up"):
        make_listing(backends).expert("ffn.1000")
