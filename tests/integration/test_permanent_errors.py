"""What can never work is told at the start in words, and nothing stays behind; nobody tries it for ever."""

from __future__ import annotations

import time

import pytest
from swarm_kit import make_backend
from torch import nn

import p2pmoe
from p2pmoe.errors import ConfigError, DelegationError, InvalidUidError
from p2pmoe.identity import Identity


def start(config: p2pmoe.NodeConfig | None = None, *uids: str, **options: object) -> None:
    backends = [make_backend(uid, nn.Linear(4, 4), **options) for uid in uids]  # type: ignore[arg-type]
    with p2pmoe.background_node(config, backends):
        raise AssertionError("it started")


def test_more_experts_below_a_prefix_than_a_node_may_announce_are_refused_before_they_are_made() -> None:
    begin = time.monotonic()
    config = p2pmoe.NodeConfig.from_tree({"experts": {"uids": ["ffn.[0:4000]"], "hidden_dim": 4096}})
    with pytest.raises(ConfigError, match=r"below ffn\. .* 4000 children .* ffn\.\[0:64\]\.\[0:64\]"):
        start(config)
    assert time.monotonic() - begin < 5.0


def test_uids_that_break_the_grammar_or_repeat_are_refused() -> None:
    with pytest.raises(InvalidUidError, match="no uid"):
        start(None, "no uid")
    with pytest.raises(ConfigError, match=r"the same uid: ffn\.0$"):
        start(None, *(f"ffn.{index}" for index in range(20)), "ffn.0")


def test_an_expert_that_no_call_fits_is_refused() -> None:
    config = p2pmoe.NodeConfig.from_tree({"limits": {"max_body_bytes": 8, "max_exchange_bytes": 1 << 20}})
    with pytest.raises(ConfigError, match=r"one row has 32 bytes, limits\.max_body_bytes = 8"):
        start(config, "ffn.0")


def test_a_node_without_the_owners_leave_is_refused() -> None:
    owner = Identity.generate().public_key.hex()
    config = p2pmoe.NodeConfig.from_tree({"dht": {"owner": owner}})
    with pytest.raises(DelegationError, match="p2pmoe id delegate"):
        start(config, "ffn.0")
