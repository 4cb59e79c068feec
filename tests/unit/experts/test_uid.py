"""The grammar of uids and patterns."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import InvalidUidError
from p2pmoe.experts.uid import (
    MAX_COORDINATE,
    MAX_EXPANSION,
    ExpertUid,
    UidPattern,
    expand_pattern,
    expand_patterns,
    first_repeated,
    is_valid_uid,
    parse_prefix,
    parse_uid,
    prefix_of,
)

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,20}", fullmatch=True)
coordinates = st.lists(st.integers(0, MAX_COORDINATE), min_size=1, max_size=4).map(tuple)


@given(names, coordinates)
def test_every_uid_is_read_back(name, numbers):
    uid = ExpertUid(name, numbers)
    assert parse_uid(str(uid)) == uid
    assert uid.prefix + str(uid.suffix) == str(uid)
    assert parse_prefix(uid.prefix) == (name, numbers[:-1])


def test_the_parts_of_a_uid():
    uid = parse_uid("ffn.3.17")
    assert (uid.name, uid.coordinates, uid.prefix, uid.suffix, str(uid)) == ("ffn", (3, 17), "ffn.3.", 17, "ffn.3.17")
    assert parse_uid("ffn.0").prefix == "ffn."
    assert prefix_of("ffn", (3,)) == "ffn.3."


WRONG = [
    "",
    "ffn",
    "ffn.",
    ".1",
    "ffn..1",
    "ffn.1.",
    "ffn.-1",
    "ffn.01",
    "ffn.+1",
    "ffn.1e3",
    "ffn.1.2.3.4.5",
    "ffn.٣",
    "1ffn.1",
    "f fn.1",
    "ffn.1\n",
    "../x.1",
    "ffn/.1",
    "ffn.2147483648",
    "a" * 65 + ".1",
    "ffn." + "9" * 500,
    None,
    7,
]


@pytest.mark.parametrize("text", WRONG)
def test_whatever_else_is_no_uid(text):
    assert not is_valid_uid(text)
    with pytest.raises(InvalidUidError) as caught:
        parse_uid(text)
    assert len(str(caught.value)) < 250


@given(st.text(max_size=40))
def test_any_text_is_a_uid_a_pattern_or_an_invalid_uid_error(text):
    for parse in (parse_uid, parse_prefix, UidPattern.parse, expand_pattern):
        try:
            parse(text)
        except InvalidUidError:
            pass


def test_expansion():
    assert expand_pattern("ffn.3.17") == ["ffn.3.17"]
    assert expand_pattern("ffn.[0:2].[3:5]") == ["ffn.0.3", "ffn.0.4", "ffn.1.3", "ffn.1.4"]
    assert len(expand_pattern("ffn.[0:256].[0:256]")) == MAX_EXPANSION


@pytest.mark.parametrize(
    "pattern", ["ffn", "ffn.", "ffn.*", "ffn.[0:4].*", "ffn.[4:4]", "ffn.[4:0]", "ffn.[0:]", "x.[a:b]"]
)
def test_what_names_no_finite_set_is_not_expanded(pattern):
    with pytest.raises(InvalidUidError):
        expand_pattern(pattern)


@pytest.mark.parametrize("pattern", ["ffn.[0:257].[0:256]", "ffn.[0:2147483648].[0:2147483648]"])
def test_expansion_is_bounded_and_says_so(pattern):
    with pytest.raises(InvalidUidError, match="65536"):
        expand_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "root", "matching", "others"),
    [
        ("ffn.3.17", "ffn.3.", ["ffn.3.17"], ["ffn.3.1", "ffn.3", "ffn.3.17.1", "gfn.3.17"]),
        ("ffn.3", "ffn.", ["ffn.3"], ["ffn.3.1"]),
        ("ffn", "ffn.", ["ffn.1", "ffn.1.2.3.4"], ["ffnx.1"]),
        ("ffn.", "ffn.", ["ffn.1", "ffn.1.2.3.4"], ["ffnx.1"]),
        ("ffn.3.", "ffn.3.", ["ffn.3.1", "ffn.3.1.2"], ["ffn.3", "ffn.31.1"]),
        ("ffn.*", "ffn.", ["ffn.1", "ffn.1.2.3.4"], ["ffn"]),
        ("ffn.3.*", "ffn.3.", ["ffn.3.1", "ffn.3.1.2"], ["ffn.3", "ffn.4.1"]),
        ("ffn.*.*", "ffn.", ["ffn.1.2", "ffn.1.2.3"], ["ffn.1"]),
        ("ffn.*.2", "ffn.", ["ffn.1.2"], ["ffn.1.3", "ffn.1.2.3"]),
        ("ffn.[0:4].*", "ffn.", ["ffn.3.9"], ["ffn.4.9", "ffn.3"]),
        ("ffn.3.[2:4]", "ffn.3.", ["ffn.3.3"], ["ffn.3.4"]),
        ("ffn.1.2.3.4", "ffn.1.2.3.", ["ffn.1.2.3.4"], []),
    ],
)
def test_patterns(pattern, root, matching, others):
    parsed = UidPattern.parse(pattern)
    assert str(parsed) == pattern
    assert parsed.root == root
    assert all(map(parsed.matches, matching))
    assert not any(map(parsed.matches, [*others, "", "junk", "ffn.x"]))


@given(
    st.sampled_from(["ffn", "ffn.3.", "ffn.*", "ffn.3.*", "ffn.*.*", "ffn.[0:4].*", "ffn.*.2", "ffn.3.2"]), coordinates
)
def test_whatever_matches_is_reached_from_the_root(pattern, numbers):
    parsed = UidPattern.parse(pattern)
    uid = ExpertUid("ffn", tuple(number % 5 for number in numbers))
    if not parsed.matches(uid):
        return
    _, start = parse_prefix(parsed.root)
    assert uid.coordinates[: len(start)] == start
    for depth in range(len(start) + 1, len(uid.coordinates)):
        assert parsed.may_contain("ffn", uid.coordinates[:depth])


@pytest.mark.parametrize(
    "pattern", ["*", "ffn.**", "ffn.[0:4", "ffn.*.", "ffn.1.2.3.4.*", "ffn.[5:5].*", "ffn.?", "f*n.1"]
)
def test_whatever_else_is_no_pattern(pattern):
    with pytest.raises(InvalidUidError):
        UidPattern.parse(pattern)


def test_patterns_are_bounded_together() -> None:
    assert expand_patterns(["ffn.[0:2]", "x.7"]) == ["ffn.0", "ffn.1", "x.7"]
    with pytest.raises(InvalidUidError, match="over 65536 uids"):
        expand_patterns(f"ffn.{number}.[0:65536]" for number in range(10**9))
    with pytest.raises(InvalidUidError, match="1000000000000 uids"):
        expand_patterns(["ffn.[0:1000000].[0:1000000]"])


def test_a_uid_named_twice_among_forty_thousand_is_found_at_once() -> None:
    uids = [f"ffn.{number}" for number in range(40_000)]
    begin = time.thread_time()
    assert first_repeated([*uids, "ffn.39999"]) == "ffn.39999"
    assert first_repeated(uids) is None
    assert time.thread_time() - begin < 0.5
