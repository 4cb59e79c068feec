"""Nested tuples, lists and dicts of tensors, flattened and packed. Thin over optree; knows nothing of tensors.

Leaves come in a fixed order: sequences by position, dicts by sorted key, so both ends of a wire agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import optree

from p2pmoe.errors import SchemaError

MAX_DEPTH: Final = 64
"""Twice what a schema may have, so that a pair of schemas fits."""
_SEQUENCES = (list, tuple)


def nested_flatten(tree: Any) -> tuple[Any, ...]:
    """The leaves of `tree` in wire order. None is a leaf. Raises SchemaError when it is nested too deep."""
    return tuple(optree.tree_leaves(_plain(tree), none_is_leaf=True))


def nested_pack(flat: Iterable[Any], structure: Any) -> Any:
    """Leaves put back into the shape of `structure`; the inverse of `nested_flatten`.

    Raises:
        SchemaError: there are more or fewer leaves than places.
    """
    return nested_packer(structure)(flat)


def nested_packer(structure: Any) -> Callable[[Iterable[Any]], Any]:
    """`nested_pack` for one structure, which is taken apart only once."""
    spec = _structure(structure)
    if spec.is_leaf():
        return _only

    def pack(flat: Iterable[Any]) -> Any:
        leaves = tuple(flat)
        if len(leaves) != spec.num_leaves:
            raise SchemaError(f"{len(leaves)} values cannot fill a structure of {spec.num_leaves}")
        return spec.unflatten(leaves)

    return pack


def _only(flat: Iterable[Any]) -> Any:
    leaves = tuple(flat)
    if len(leaves) != 1:
        raise SchemaError(f"{len(leaves)} values cannot fill a structure of 1")
    return leaves[0]


def nested_compare(first: Any, second: Any) -> bool:
    """Whether two values have the same structure. A list and a tuple of the same length count as the same."""
    return _same(_plain(first), _plain(second))


def nested_map(function: Callable[..., Any], tree: Any, *more: Any) -> Any:
    """`function` applied leaf by leaf, over one tree or several of the same structure.

    Raises:
        SchemaError: the structures differ.
    """
    for other in more:
        if not nested_compare(tree, other):
            raise SchemaError("nested values of different structure cannot be mapped together")
    spec = _structure(tree)
    columns = [nested_flatten(each) for each in (tree, *more)]
    return optree.tree_unflatten(spec, map(function, *columns))


def _plain(tree: Any, depth: int = 0) -> Any:
    """Subclasses of dict as dicts: optree keeps the order of an OrderedDict, and the two ends would disagree."""
    if depth > MAX_DEPTH:
        raise SchemaError(f"values are nested deeper than {MAX_DEPTH} levels; flatten them")
    kind = type(tree)
    if isinstance(tree, dict):
        return {key: _plain(value, depth + 1) for key, value in tree.items()}
    return kind([_plain(value, depth + 1) for value in tree]) if kind in _SEQUENCES else tree


def _structure(tree: Any) -> optree.PyTreeSpec:
    return optree.tree_structure(_plain(tree), none_is_leaf=True)


def _same(a: Any, b: Any) -> bool:
    """Level by level over the values: the children of an optree spec are copies of all that is below them."""
    leaves = [optree.tree_is_leaf(each, none_is_leaf=True) for each in (a, b)]
    if any(leaves):
        return all(leaves)
    if type(a) is not type(b) and not (type(a) in _SEQUENCES and type(b) in _SEQUENCES):
        return False
    (children, _, entries, _), (others, _, their_entries, _) = map(_one_level, (a, b))
    return tuple(entries) == tuple(their_entries) and all(map(_same, children, others))


def _one_level(node: Any) -> Any:
    return optree.tree_flatten_one_level(node, none_is_leaf=True)
