"""Every tensor that we make names its dtype and its device: torch's defaults belong to whoever set them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "p2pmoe"
FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
}


def careless(source: str) -> list[str]:
    """`line: call` of each factory that leaves its dtype or its device to torch."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            function, names = node.func, {keyword.arg for keyword in node.keywords}
            of_torch = isinstance(function.value, ast.Name) and function.value.id == "torch"
            if of_torch and function.attr in FACTORIES and not {"dtype", "device"} <= names:
                found.append(f"{node.lineno}: torch.{function.attr}")
            if function.attr in ("make_zeros", "make_empty") and len(node.args) + len(node.keywords) < 2:
                found.append(f"{node.lineno}: {function.attr}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_tensor_is_made_by_torchs_defaults(path: Path) -> None:
    assert careless(path.read_text(encoding="utf-8")) == []


def test_the_reader_sees_what_it_looks_for() -> None:
    source = "torch.zeros(3)\ntorch.empty(2, dtype=d)\nproto.make_zeros(3)\ntorch.ones(2, dtype=d, device='cpu')"
    assert careless(source) == ["1: torch.zeros", "2: torch.empty", "3: make_zeros"]
