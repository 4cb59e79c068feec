"""Files of the owner's that register experts: what their imports mean, and to whom."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from p2pmoe import BatchTensorProto, register_expert_class
from p2pmoe.config import BatchingConfig, ExpertsConfig, OptimizerConfig
from p2pmoe.errors import ConfigError
from p2pmoe.server.hosting import make_backends
from p2pmoe.server.layers import expert_classes, make_expert

EXPERT = """
import torch
from p2pmoe import register_expert_class
{imports}
@register_expert_class({kind!r}, lambda batch, hidden: torch.empty(batch, hidden))
class Mine(torch.nn.Linear):
    def __init__(self, hidden):
        super().__init__(hidden, {width})
"""


@pytest.fixture(autouse=True)
def own_register() -> Iterator[None]:
    before = dict(expert_classes)
    yield
    expert_classes.clear()
    expert_classes.update(before)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def width_of(path: Path, kind: str = "mine") -> int:
    config = ExpertsConfig(uids=("ffn.0",), hidden_dim=4, kind=kind, modules=(str(path),))
    (backend,) = make_backends(config, BatchingConfig(), OptimizerConfig(name="sgd"), ["cpu"])
    shape: tuple[Any, ...] = backend.outputs_schema.shape
    return int(shape[0])


def expert(imports: str, width: str, kind: str = "mine") -> str:
    return EXPERT.format(imports=imports, width=width, kind=kind)


@pytest.mark.parametrize(
    ("imports", "width"),
    [
        ("import neighbour", "neighbour.WIDTH"),
        ("import neighbour as n", "n.WIDTH"),
        ("from neighbour import WIDTH", "WIDTH"),
        ("from neighbour import *", "WIDTH"),
        ("import parts.inner", "parts.inner.WIDTH"),
        ("import parts.inner as i", "i.WIDTH"),
        ("from parts import inner", "inner.WIDTH"),
        ("from parts.inner import WIDTH", "WIDTH"),
        ("import plain.inner", "plain.inner.WIDTH"),
        ("def late():\n    import neighbour\n    return neighbour.WIDTH", "late()"),
    ],
)
def test_a_file_finds_its_neighbours(tmp_path: Path, imports: str, width: str) -> None:
    write(tmp_path / "neighbour.py", "import deeper\nWIDTH = deeper.WIDTH\n")
    write(tmp_path / "deeper.py", "WIDTH = 7\n")
    write(tmp_path / "parts" / "__init__.py", "")
    write(tmp_path / "parts" / "inner.py", "from .other import WIDTH\n")
    write(tmp_path / "parts" / "other.py", "import neighbour\nWIDTH = neighbour.WIDTH\n")
    write(tmp_path / "plain" / "inner.py", "WIDTH = 7\n")
    path_before = list(sys.path)
    assert width_of(write(tmp_path / "mine.py", expert(imports, width))) == 7
    assert sys.path == path_before
    assert not {"neighbour", "deeper", "parts", "plain", "mine"} & sys.modules.keys()


def test_two_files_with_neighbours_of_one_name_do_not_mix(tmp_path: Path) -> None:
    """Nor do their imports inside of functions, whichever file came last."""
    imports = "def late():\n    import neighbour\n    return neighbour.WIDTH"
    for folder, width in (("a", 5), ("b", 6)):
        write(tmp_path / folder / "neighbour.py", f"WIDTH = {width}\n")
        write(tmp_path / folder / "mine.py", expert(imports, "late()", kind=folder))
    assert width_of(tmp_path / "a" / "mine.py", "a") == 5
    assert width_of(tmp_path / "b" / "mine.py", "b") == 6
    assert make_expert("a", 4, {})[0].out_features == 5


def test_two_files_of_one_folder_share_their_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "neighbour.py", "COUNT = []\n")
    for kind in ("a", "b"):
        text = expert("import neighbour\nneighbour.COUNT.append(1)", "len(neighbour.COUNT)", kind)
        write(tmp_path / f"{kind}.py", text)
        width_of(tmp_path / f"{kind}.py", kind)
    assert make_expert("a", 4, {})[0].out_features == 2


@pytest.mark.parametrize(
    "imports", ["from . import neighbour", "from .neighbour import WIDTH", "from ..top import WIDTH"]
)
def test_relative_imports_work_in_a_package(tmp_path: Path, imports: str) -> None:
    write(tmp_path / "pack" / "__init__.py", "NAME = __name__\n")
    write(tmp_path / "pack" / "top.py", "WIDTH = 7\n")
    write(tmp_path / "pack" / "sub" / "__init__.py", "from ..top import WIDTH\n")
    write(tmp_path / "pack" / "sub" / "neighbour.py", "from . import WIDTH\n")
    width = "WIDTH" if "WIDTH" in imports else "neighbour.WIDTH"
    assert width_of(write(tmp_path / "pack" / "sub" / "mine.py", expert(imports, width))) == 7


def test_a_relative_import_works_where_the_folder_is_no_package(tmp_path: Path) -> None:
    write(tmp_path / "neighbour.py", "WIDTH = 7\n")
    assert width_of(write(tmp_path / "my-expert.v2.py", expert("from .neighbour import WIDTH", "WIDTH"))) == 7


def test_neighbours_replace_nothing_of_ours_or_pythons(tmp_path: Path) -> None:
    for name in ("random", "torch", "p2pmoe", "numpy"):
        write(tmp_path / f"{name}.py", "raise RuntimeError('the wrong one')\n")
    imports = "import random, numpy, json\nassert random.random and numpy.zeros and json.dumps"
    assert width_of(write(tmp_path / "mine.py", expert(imports, "7"))) == 7


def test_a_neighbour_that_imports_the_file_gets_the_file(tmp_path: Path) -> None:
    write(tmp_path / "neighbour.py", "import mine\nWIDTH = mine.BASE + 1\n")
    assert width_of(write(tmp_path / "mine.py", expert("BASE = 6\nimport neighbour", "neighbour.WIDTH"))) == 7


def test_a_broken_neighbour_is_told_of_and_tried_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", expert("import neighbour", "neighbour.WIDTH"))
    for text in ("1 / 0", "import not_there_at_all"):
        write(tmp_path / "neighbour.py", text)
        with pytest.raises(ConfigError, match=r"mine\.py cannot be imported: (ZeroDivision|ModuleNotFound)Error"):
            width_of(path)
    write(tmp_path / "neighbour.py", "WIDTH = 7  # mended\n")
    assert width_of(path) == 7


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.py"):
        width_of(tmp_path / "nowhere.py")


def test_a_class_that_is_registered_again_replaces_itself_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    def cell(width: int) -> type[nn.Module]:
        @register_expert_class("cell", torch.empty)
        class Mine(nn.Linear):
            def __init__(self, hidden: int) -> None:
                super().__init__(hidden, width)

        return Mine

    with caplog.at_level(logging.INFO, "p2pmoe.server.layers"):
        first, second = cell(5), cell(6)
    assert expert_classes["cell"].make is second
    assert first is not second
    assert [record.message for record in caplog.records] == [
        f"expert class 'cell' was registered before; {second.__module__}.{second.__qualname__} replaces it"
    ]
    with pytest.raises(ConfigError, match=r"already, as .*Mine; choose another name"):
        register_expert_class("cell", torch.empty)(nn.Identity)
    with pytest.raises(ConfigError, match="already"):
        register_expert_class("ffn", torch.empty)(nn.Identity)


def test_experts_without_parameters_are_hosted(tmp_path: Path) -> None:
    text = (
        "import torch\nfrom p2pmoe import register_expert_class\n"
        "@register_expert_class('shift', lambda b, h: torch.empty(b, h))\n"
        "class Shift(torch.nn.Module):\n"
        "    def __init__(self, hidden): super().__init__()\n"
        "    def forward(self, x): return x + 1\n"
    )
    path = write(tmp_path / "shift.py", text)
    config = ExpertsConfig(uids=("ffn.0",), hidden_dim=4, kind="shift", modules=(str(path),))
    with pytest.raises(ConfigError, match=r"set optimizer\.name = 'none'"):
        make_backends(config, BatchingConfig(), OptimizerConfig(), ["cpu"])
    (backend,) = make_backends(config, BatchingConfig(), OptimizerConfig(name="none"), ["cpu:0"])
    assert str(backend.device) == "cpu:0", "the device that it was dealt, not where parameters would be"


def test_lazy_experts_follow_the_seed(tmp_path: Path) -> None:
    @register_expert_class("lazy", torch.empty)
    class Lazy(nn.LazyLinear):
        def __init__(self, hidden: int) -> None:
            super().__init__(2)

    config = ExpertsConfig(uids=("ffn.0", "ffn.1"), hidden_dim=4, kind="lazy", seed=3)
    state = torch.get_rng_state()
    made = [make_backends(config, BatchingConfig(), OptimizerConfig(), ["cpu"]) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [[backend.expert.weight for backend in backends] for backends in made]
    assert torch.equal(weights[0][0], weights[1][0])
    assert not torch.equal(weights[0][0], weights[0][1])
    assert made[0][0].outputs_schema == BatchTensorProto(2)


def test_experts_without_a_seed_do_not_begin_alike() -> None:
    made = make_backends(ExpertsConfig(uids=("ffn.[0:3]",), hidden_dim=4), BatchingConfig(), OptimizerConfig(), ["cpu"])
    weights = [backend.expert.up.weight for backend in made]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
