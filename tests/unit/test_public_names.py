"""The public surface: exactly the names of `__all__`, imported when they are first used."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys

import pytest

import p2pmoe


def test_public_names_equal_all() -> None:
    assert sorted(p2pmoe.__all__) == p2pmoe.__all__ == sorted(p2pmoe._HOMES)
    assert {name for name in dir(p2pmoe) if not name.startswith("_")} == set(p2pmoe.__all__)
    for name in p2pmoe.__all__:
        value = getattr(p2pmoe, name)
        assert value is getattr(importlib.import_module(f"p2pmoe.{p2pmoe._HOMES[name]}"), name)  # noqa: TID251 - our own names


def test_the_names_that_users_were_promised_are_there() -> None:
    promised = """ExpertBackend BatchTensorProto NodeConfig Node background_node Swarm RemoteMixtureOfExperts
        RemoteSwitchMixtureOfExperts nested_flatten nested_pack nested_compare nested_map TaskPool Runtime
        register_expert_class"""
    assert set(promised.split()) <= set(p2pmoe.__all__)


def test_every_public_name_is_documented() -> None:
    for name in p2pmoe.__all__:
        assert inspect.getdoc(getattr(p2pmoe, name)), name


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        p2pmoe.no_such_name  # noqa: B018


def test_the_version_is_one_and_semantic() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\w+)?", p2pmoe.__version__)


def test_importing_the_package_costs_no_torch_and_looking_names_up_does_not_either() -> None:
    code = (
        "import sys, p2pmoe; p2pmoe.NodeConfig, p2pmoe.Endpoint, p2pmoe.Identity, p2pmoe.P2PMoEError;"
        "print(*{'torch', 'aiohttp'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
