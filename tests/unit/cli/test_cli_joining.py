"""The line that others join with: what it says, and that it is one that a second person can run."""

import shlex
import tomllib
from typing import Any

import pytest

from p2pmoe.cli.joining import explain, free_experts, inline_toml, join_line, next_block
from p2pmoe.config import AccessConfig, DHTConfig, ExpertsConfig, NodeConfig
from p2pmoe.errors import BootstrapError
from p2pmoe.experts.uid import expand_pattern, parse_uid

ADDRESS = "127.0.0.1:31337"


class FakeBackend:
    def __init__(self, name: str) -> None:
        self.name = name


class FakeNode:
    """What `free_experts` looks at; the directory knows the first coordinates that are taken."""

    def __init__(self, pattern: str, taken: Any) -> None:
        self.backends = [FakeBackend(uid) for uid in expand_pattern(pattern)] if pattern else []
        self.taken = taken
        self.directory = self

    async def get_prefixes(self, prefixes: list[str]) -> dict[str, dict[int, tuple[()]]]:
        if isinstance(self.taken, Exception):
            raise self.taken
        return {prefix: dict.fromkeys(self.taken, ()) for prefix in prefixes}


@pytest.mark.parametrize(
    ("hosted", "taken", "free"),
    [
        ("ffn.[0:4].[0:4]", (), "ffn.[4:8].[0:4]"),
        ("ffn.[0:4].[0:4]", range(8), "ffn.[8:12].[0:4]"),
        ("ffn.[0:2].[3:5]", (), "ffn.[2:4].[3:5]"),
        ("ffn.0", (), "ffn.1"),
        ("ffn.[0:3]", (7,), "ffn.[8:11]"),
        ("a.2.5.7", (), "a.3.5.7"),
        ("ffn.[0:100].[0:100]", (), "ffn.100.[0:100]"),
        ("ffn.[0:100].[0:8]", (), "ffn.[100:108].[0:8]"),
        ("ffn.2147483647", (), "ffn.0"),
        ("", (), "ffn.[0:4].[0:4]"),
        ("", range(4), "ffn.[4:8].[0:4]"),
        ("ffn.[0:2].0", BootstrapError("nobody"), "ffn.[2:4].0"),
    ],
)
async def test_the_experts_of_the_next_node_are_free(hosted: str, taken: Any, free: str) -> None:
    assert await free_experts(FakeNode(hosted, taken)) == free  # type: ignore[arg-type]
    assert expand_pattern(free)


def test_uids_of_another_depth_do_not_matter() -> None:
    assert next_block([parse_uid("ffn.0.0"), parse_uid("ffn.1.1"), parse_uid("ffn.9")], ()) == "ffn.[10:12].[0:2]"


def test_kind_width_and_options_are_in_the_line() -> None:
    config = NodeConfig(
        experts=ExpertsConfig(
            kind="my_kind",
            hidden_dim=64,
            options={"inner_dim": 128, "bias": False, "names": ["a b", "c"], "scale": 0.5, "deep": {"x": "é'"}},
            modules=("mine.py",),
        )
    )

    words = shlex.split(join_line(ADDRESS, config, "ffn.[4:8].[0:4]"))

    assert words[:6] == ["p2pmoe", "node", "--initial-peers", ADDRESS, "--experts", "ffn.[4:8].[0:4]"]
    assert words[6:12] == ["--modules", "FILE", "--kind", "my_kind", "--hidden-dim", "64"]
    assert words[12] == "--expert-options"
    assert tomllib.loads(f"value = {words[13]}")["value"] == config.experts.options


def test_defaults_are_left_out_but_for_the_width() -> None:
    line = join_line(ADDRESS, NodeConfig(), "ffn.1")
    assert line == f"p2pmoe node --initial-peers {ADDRESS} --experts ffn.1 --hidden-dim 512"
    assert explain(NodeConfig()) is None


def test_capital_letters_are_explained() -> None:
    config = NodeConfig(
        dht=DHTConfig(owner="ab" * 32),
        access=AccessConfig(swarm_key_path="swarm.key"),
        experts=ExpertsConfig(modules=("mine.py",)),
    )
    assert explain(config) == (
        "whoever joins needs --modules FILE: a copy of mine.py; --delegation FILE: what the swarm's owner gives for "
        "the key of KEY_FILE (p2pmoe id new KEY_FILE makes it, p2pmoe id delegate gives); --swarm-key FILE: a copy of "
        "swarm.key"
    )


def test_toml_on_one_line() -> None:
    assert inline_toml({}) == "{}"
    assert inline_toml({"a": (1, True, 1e-3)}) == '{"a" = [1, true, 0.001]}'
