"""Flags that take several values, and grids."""

import pytest

from p2pmoe.cli.arguments import parse_grid, spread_values
from p2pmoe.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "spread"),
    [
        ("node --initial-peers a:1 b:2 --json", "node --initial-peers a:1 --initial-peers b:2 --json"),
        ("node --initial-peers a:1,b:2", "node --initial-peers a:1,b:2"),
        ("lookup --initial-peers a:1 b:2 ffn.*", "lookup --initial-peers a:1 --initial-peers b:2 ffn.*"),
        ("lookup ffn.3.1 --initial-peers a:1", "lookup ffn.3.1 --initial-peers a:1"),
        ("train --initial-peers a:1 digits", "train --initial-peers a:1 digits"),
        ("node --experts f.[0:4] g.1 --port 1", "node --experts f.[0:4] --experts g.1 --port 1"),
        ("node --experts f.1 -- --initial-peers a:1 b:2", "node --experts f.1 -- --initial-peers a:1 b:2"),
        ("node --initial-peers", "node --initial-peers"),
        ("", ""),
    ],
)
def test_a_flag_may_be_followed_by_several_values(given: str, spread: str) -> None:
    assert spread_values(given.split()) == spread.split()


@pytest.mark.parametrize(("text", "grid"), [("4x4", (4, 4)), ("16", (16,)), ("2X3×4", (2, 3, 4))])
def test_grids(text: str, grid: tuple[int, ...]) -> None:
    assert parse_grid(text) == grid


@pytest.mark.parametrize("text", ["", "x", "4x", "0x4", "-1x4", "4x4x4x4x4", "4 4", "٤x4", "9999999"])
def test_what_is_no_grid_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no grid"):
        parse_grid(text)
