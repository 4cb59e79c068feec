"""Nested values: flattened in wire order, packed again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe import nested_compare, nested_flatten, nested_map, nested_pack
from p2pmoe.errors import SchemaError

trees = st.recursive(
    st.integers() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(trees)
def test_packing_undoes_flattening(tree: Any) -> None:
    flat = nested_flatten(tree)
    assert isinstance(flat, tuple)
    assert nested_pack(flat, tree) == tree
    assert nested_pack(iter(flat), tree) == tree


def test_sequences_go_by_position_and_dicts_by_key() -> None:
    assert nested_flatten(([1, (2,)], {"b": 4, "a": 3}, 5)) == (1, 2, 3, 4, 5)
    assert nested_flatten({"x10": 1, "x2": 2}) == (1, 2)
    assert nested_flatten(7) == (7,)
    assert nested_flatten(((), [], {})) == ()
    assert nested_flatten((None, 1)) == (None, 1)


def test_both_ends_agree_whatever_the_order_of_insertion() -> None:
    structure = {"b": 0, "a": 0}
    assert nested_pack([1, 2], structure) == {"a": 1, "b": 2}
    assert nested_flatten(nested_pack([1, 2], {"a": 0, "b": 0})) == (1, 2)


@pytest.mark.parametrize("flat", [(), (1,), (1, 2, 3)])
def test_a_wrong_number_of_values_is_refused(flat: tuple[int, ...]) -> None:
    with pytest.raises(SchemaError, match=str(len(flat))):
        nested_pack(flat, (0, {"a": 0}))


@given(trees, trees)
def test_equal_structures_compare_equal(first: Any, second: Any) -> None:
    assert nested_compare(first, first)
    assert nested_compare(first, second) == nested_compare(second, first)
    if nested_compare(first, second):
        assert len(nested_flatten(first)) == len(nested_flatten(second))


def test_a_list_and_a_tuple_count_as_the_same() -> None:
    assert nested_compare([1, (2, 3)], (4, [5, 6]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, (1,)),
        ((1,), (1, 2)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, (1,)),
        ({"a": (1,)}, {"a": 1}),
        ((), {}),
        ((1, ()), (1, 2)),
    ],
)
def test_different_structures_compare_unequal(first: Any, second: Any) -> None:
    assert not nested_compare(first, second)
    assert not nested_compare(second, first)


def test_map_keeps_the_structure() -> None:
    assert nested_map(lambda x: x + 1, {"a": [1, (2,)]}) == {"a": [2, (3,)]}
    assert nested_map(lambda x, y: x * y, (2, {"k": 3}), (5, {"k": 7})) == (10, {"k": 21})


def test_map_over_different_structures_is_refused() -> None:
    with pytest.raises(SchemaError, match="structure"):
        nested_map(lambda x, y: x, (1, 2), (1, (2,)))


def test_an_ordered_dict_flattens_as_a_dict_does() -> None:
    """A module may return one; both ends must agree on the order all the same."""
    tree = OrderedDict([("b", 1), ("a", {"z": 3, "y": (4,)})])
    assert nested_flatten(tree) == nested_flatten(dict(tree)) == (4, 3, 1)
    assert nested_compare(tree, {"a": {"y": [0], "z": 0}, "b": 0})
    assert nested_pack((1, 2, 3), tree) == {"a": {"y": (1,), "z": 2}, "b": 3}
