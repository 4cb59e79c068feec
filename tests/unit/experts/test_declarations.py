"""What is published after declaring and withdrawing. Time is a number."""

from __future__ import annotations

import pytest

from p2pmoe.errors import ConfigError, EncodeError, InvalidUidError
from p2pmoe.experts.bundles import decode_bundle
from p2pmoe.experts.declarations import Declarations, by_prefix, check_announceable
from p2pmoe.experts.uid import parse_uid
from p2pmoe.types import Endpoint

HERE = Endpoint("127.0.0.1", 8080)
A, B = "aa", "bb"


def shown(values):
    """`{prefix: {part: (digest, children)}}`."""
    return {
        prefix: {
            part: (bundle.schema_digest, bundle.children)
            for part, value in parts.items()
            for bundle in [decode_bundle(value, bytes(32))]
        }
        for prefix, parts in values.items()
    }


def test_experts_and_all_prefixes_above_them_are_published():
    values = Declarations().add(by_prefix({"ffn.3.17.0": A, "ffn.3.18.0": A, "nop.1": B}), HERE, now=0, ttl_s=60)
    assert shown(values) == {
        "ffn.3.17.": {0: (A, (0,))},
        "ffn.3.18.": {0: (A, (0,))},
        "ffn.3.": {0: ("", (17, 18))},
        "ffn.": {0: ("", (3,))},
        "nop.": {0: (B, (1,))},
    }


def test_what_was_declared_before_stays_until_it_expires():
    ours = Declarations()
    ours.add(by_prefix({"x.1": A}), HERE, now=0, ttl_s=60)
    assert shown(ours.add(by_prefix({"x.2": A}), HERE, now=30, ttl_s=60)) == {"x.": {0: (A, (1, 2))}}
    assert ours.uids(59) == ["x.1", "x.2"]
    assert shown(ours.add(by_prefix({"x.2": A}), HERE, now=61, ttl_s=60)) == {"x.": {0: (A, (2,))}}
    assert "1 children" in repr(ours)


def test_a_part_that_is_no_longer_needed_becomes_a_tombstone():
    ours = Declarations()
    ours.add(by_prefix({"x.1": A, "x.2": B}), HERE, now=0, ttl_s=60)
    values = ours.add(by_prefix({"x.1": A, "x.2": A}), HERE, now=1, ttl_s=60)
    assert shown(values) == {"x.": {0: (A, (1, 2)), 1: ("", ())}}


def test_withdrawing_publishes_what_is_left_and_empties_prefixes_with_nothing_below():
    ours = Declarations()
    ours.add(by_prefix({"ffn.3.1": A, "ffn.3.2": A, "ffn.4.1": A}), HERE, now=0, ttl_s=60)
    values, _ = ours.remove([parse_uid("ffn.3.1"), parse_uid("ffn.9.9")], now=1, ttl_s=60)
    assert shown(values) == {"ffn.3.": {0: (A, (2,))}}
    values, _ = ours.remove([parse_uid("ffn.3.2")], now=1, ttl_s=60)
    assert shown(values) == {"ffn.3.": {0: ("", ())}, "ffn.": {0: ("", (4,))}}
    assert ours.remove([parse_uid("ffn.3.2")], now=1, ttl_s=60) == ({}, 60)


def test_a_withdrawal_outlives_the_declaration():
    ours = Declarations()
    ours.add(by_prefix({"x.1": A}), HERE, now=0, ttl_s=600)
    _, ttl_s = ours.remove([parse_uid("x.1")], now=100, ttl_s=60)
    assert ttl_s == 500


def test_a_refused_declaration_leaves_everything_as_it_was():
    ours = Declarations()
    ours.add(by_prefix({"x.0": A}), HERE, now=0, ttl_s=60)
    with pytest.raises(EncodeError):
        ours.add(by_prefix({f"x.{number}": f"{number:02x}" for number in range(20)}), HERE, now=1, ttl_s=60)
    with pytest.raises(EncodeError):
        by_prefix({"x.1": ""})
    assert ours.uids(1) == ["x.0"]


def test_what_can_never_be_announced_is_told_before_anybody_is_asked() -> None:
    check_announceable({f"ffn.{number}": A for number in range(3200)}, HERE)
    with pytest.raises(ConfigError, match=r"below ffn\. cannot be announced: 3201 children .* 8 .*one more dim"):
        check_announceable({f"ffn.{number}": A for number in range(3201)}, HERE)
    with pytest.raises(ConfigError, match=r"below ffn\. cannot be announced"):  # the prefixes above them, too
        check_announceable({f"ffn.{number}.0": A for number in range(3201)}, HERE)
    with pytest.raises(ConfigError, match=r"below x\. cannot be announced: .*10 schemas"):
        check_announceable({f"x.{number}": f"{number:02x}" for number in range(10)}, HERE)
    with pytest.raises(ConfigError, match="cannot announce"):
        check_announceable({"x.0": A}, Endpoint("a..b", 1))
    with pytest.raises(ConfigError, match="cannot announce"):
        check_announceable({"x.0": A}, Endpoint("127.0.0.1", 0))
    with pytest.raises(InvalidUidError):
        check_announceable({"no uid": A}, HERE)
    check_announceable({}, Endpoint("a..b", 1))


def test_a_closed_swarms_shorter_values_count() -> None:
    sparse = {f"x.{number * 100_003}": A for number in range(1200)}
    check_announceable(sparse, HERE)
    with pytest.raises(ConfigError, match="parts"):
        check_announceable(sparse, HERE, 400)
