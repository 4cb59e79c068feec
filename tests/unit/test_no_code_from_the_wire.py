"""That nothing turns bytes into code: the lint rules and contracts that say so bite, and the DHT's pickle is shut."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kademlia
import pytest
import rpcudp

from p2pmoe.dht.server import SwarmServer

ROOT = Path(__file__).parents[2]

SNIPPETS = {
    "import pickle": "TID251",
    "from pickle import loads": "TID251",
    "import _pickle": "TID251",
    "import marshal": "TID251",
    "import shelve": "TID251",
    "import dill": "TID251",
    "import cloudpickle": "TID251",
    "from joblib import load": "TID251",
    "import multiprocessing": "TID251",
    "import yaml": "TID251",
    "import torch\ntorch.load('x')": "TID251",
    "import torch\ntorch.save({}, 'x')": "TID251",
    "import torch as t\nt.load('x')": "TID251",
    "from torch import load": "TID251",
    "import torch\ntorch.jit.load('x')": "TID251",
    "import torch\ntorch.hub.load('a', 'b')": "TID251",
    "import torch\ntorch.package.PackageImporter('x')": "TID251",
    "import numpy as np\nnp.load('x', allow_pickle=True)": "TID251",
    "from kademlia.network import Server\nServer.load_state('x', 1)": "TID251",
    "from importlib import import_module": "TID251",
    "import importlib\nimportlib.import_module('x')": "TID251",
    "import importlib.util\nimportlib.util.spec_from_file_location('x', 'y')": "TID251",
    "import runpy": "TID251",
    "import builtins\nbuiltins.eval('1')": "TID251",
    "eval('1')": "S307",
    "exec('1')": "S102",
    "import subprocess\nsubprocess.run('ls', shell=True)": "S602",
    "import os\nos.system('ls')": "S605",
    "import ssl\nssl._create_unverified_context()": "S323",
    "import hashlib\nhashlib.md5(b'')": "S324",
    "import tempfile\ntempfile.mktemp()": "S306",
    "import xml.etree.ElementTree as tree\ntree.fromstring('')": "S314",
}


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> list[set[str]]:
    """The rules that ruff finds broken in each snippet, with the project's own settings."""
    folder = tmp_path_factory.mktemp("snippets")
    for index, text in enumerate(SNIPPETS):
        (folder / f"s{index}.py").write_text(text + "\n")
    command = [_tool("ruff"), "check", "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, "--output-format", "json", str(folder)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1, done.stderr
    found: list[set[str]] = [set() for _ in SNIPPETS]
    for each in json.loads(done.stdout):
        found[int(Path(each["filename"]).stem[1:])].add(each["code"])
    return found


@pytest.mark.parametrize("index", range(len(SNIPPETS)), ids=lambda index: list(SNIPPETS)[index].replace("\n", "; "))
def test_the_linter_refuses(complaints: list[set[str]], index: int) -> None:
    assert list(SNIPPETS.values())[index] in complaints[index]


def test_nothing_in_the_package_calls_what_runs_text() -> None:
    """TID251 does not see a builtin that is called by its bare name; S307 and S102 see two of the four."""
    for path in (ROOT / "p2pmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert name not in {"eval", "exec", "compile", "__import__"}, f"{path}:{node.lineno} calls {name}"


def test_nobody_switches_the_rules_off_without_a_reason() -> None:
    """Every `noqa` of these rules in the package says why."""
    for path in (ROOT / "p2pmoe").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for rule in ("TID251", "S301", "S302", "S307", "S102"):
                if "noqa" in line and rule in line:
                    assert " - " in line.partition("noqa")[2], f"{path}:{number}: {line.strip()}"


@pytest.mark.parametrize(
    ("text", "contract"),
    [
        ("import pickle\n", "No code from the wire: no pickle"),
        ("from multiprocessing.connection import Client\n", "No code from the wire: no pickle"),
        ("import importlib.util\n", "No code from the wire: no module by name"),
        ("from ctypes import CDLL\n", "No code from the wire: no module by name"),
    ],
)
def test_the_contracts_refuse_such_an_import_anywhere(tmp_path: Path, text: str, contract: str) -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    _, _, contracts = settings.partition("[tool.importlinter]")
    only = [each for each in contracts.split("[[tool.importlinter.contracts]]")[1:] if "No code from the wire" in each]
    head = '[tool.importlinter]\nroot_package = "p2pmoe"\ninclude_external_packages = true\n'
    joined = "".join(f"[[tool.importlinter.contracts]]{each}" for each in only)
    (tmp_path / "pyproject.toml").write_text(head + joined)
    # The few modules that the contracts name, each: an exception of a module that is not there is an error.
    named = {name for each in only for name in re.findall(r'"(p2pmoe[\w.]*) -> ', each)}
    for module in named:
        *folders, name = module.split(".")
        for depth in range(len(folders)):
            _copy(tmp_path, "/".join([*folders[1 : depth + 1], "__init__.py"]))
        _copy(tmp_path, "/".join([*folders[1:], f"{name}.py"]) if folders else "__init__.py")
    assert _lint_imports(tmp_path)[0] == 0
    (tmp_path / "p2pmoe" / "server" / "evil.py").write_text(text)
    code, output = _lint_imports(tmp_path)
    assert code == 1, output
    assert [line for line in output.splitlines() if line.startswith(contract) and "BROKEN" in line], output


def _copy(folder: Path, name: str) -> None:
    target = folder / "p2pmoe" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "p2pmoe" / name, target)


def _lint_imports(folder: Path) -> tuple[int, str]:
    environ = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [_tool("lint-imports"), "--no-cache"], cwd=folder, env=environ, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def _tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed; run scripts/setup dev"
    return found


# ----------------------------------------------------------------------------------------- the DHT's engine


def _uses_of_pickle() -> set[tuple[str, str]]:
    """(class, method) in the packages below our DHT that name pickle or another way from bytes to code."""
    found = set()
    for package in (kademlia, rpcudp):
        for path in Path(package.__file__).parent.rglob("*.py"):
            if "tests" in path.parts:
                continue
            for kind in ast.walk(ast.parse(path.read_text())):
                for function in getattr(kind, "body", []) if isinstance(kind, ast.ClassDef | ast.Module) else []:
                    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                        names = {each.id for each in ast.walk(function) if isinstance(each, ast.Name)}
                        if names & {"pickle", "marshal", "eval", "exec", "__import__"}:
                            found.add((getattr(kind, "name", path.stem), function.name))
    return found


def test_what_the_engine_pickles_is_known_and_shut() -> None:
    assert _uses_of_pickle() == {("Server", "save_state"), ("Server", "load_state")}
    for name in ("save_state", "load_state", "save_state_regularly"):
        assert name in vars(SwarmServer), f"SwarmServer must override {name}"


async def test_a_file_of_the_engine_is_neither_read_nor_written(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    before = path.read_bytes()
    server = SwarmServer(bytes(20), "test")
    with pytest.raises(NotImplementedError):
        await SwarmServer.load_state(str(path), 0)
    with pytest.raises(NotImplementedError):
        server.save_state(str(path))
    with pytest.raises(NotImplementedError):
        server.save_state_regularly(str(path))
    assert path.read_bytes() == before
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------------------------------- a running swarm

WATCHED_SWARM = """
import sys
events = []
sys.addaudithook(lambda event, _: events.append(event) if event.startswith("pickle.") else None)
import torch, p2pmoe
module = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
backend = p2pmoe.ExpertBackend("ffn.0", module, optimizer, args_schema=(p2pmoe.BatchTensorProto(4),))
with p2pmoe.background_node(p2pmoe.NodeConfig(), backends=[backend]) as node:
    with p2pmoe.Swarm(initial_peers=[node.dht_address]) as swarm:
        swarm.expert("ffn.0")(torch.ones(2, 4, requires_grad=True)).sum().backward()
        assert swarm.find_experts("ffn.*")
print(sorted(set(events)))
import pickle, fractions
pickle.loads(pickle.dumps(fractions.Fraction(1)))
print(sorted(set(events)))
"""


def test_a_node_and_a_trainer_never_unpickle() -> None:
    """Python itself reports every name that is unpickled (PEP 578)."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED_SWARM], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "['pickle.find_class']"], "the second line shows that the watch works"
