"""How the demo shares out experts; its processes are tested as processes."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from p2pmoe.cli import local_swarm
from p2pmoe.cli.local_swarm import grid_uids, node_settings, split_evenly
from p2pmoe.cli.node import join_line
from p2pmoe.config import AccessConfig, DHTConfig, NodeConfig
from p2pmoe.experts.uid import expand_pattern


def test_a_grid_in_order() -> None:
    assert grid_uids("ffn", (2, 3)) == expand_pattern("ffn.[0:2].[0:3]")


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 16, 20])
def test_shares_differ_by_one_at_most_and_leave_nothing_out(parts: int) -> None:
    uids = grid_uids("ffn", (4, 4))

    shares = split_evenly(uids, parts)

    assert [uid for share in shares for uid in share] == uids
    assert len(shares) == parts
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_settings_of_a_node_are_what_a_node_reads() -> None:
    config = NodeConfig.parse(node_settings(64, 7, ["ffn.0.0"], ["127.0.0.1:1"]))

    assert (config.experts.uids, config.experts.hidden_dim, config.experts.seed) == (("ffn.0.0",), 64, 7)
    assert (config.dht.initial_peers, config.torch_threads) == (("127.0.0.1:1",), 1)


def test_the_join_line_can_be_pasted() -> None:
    line = "p2pmoe node --initial-peers 127.0.0.1:31337"
    assert join_line("127.0.0.1:31337", NodeConfig()) == line
    named = NodeConfig(dht=DHTConfig(swarm_id="my swarm"))
    assert join_line("[::1]:1", named) == "p2pmoe node --initial-peers '[::1]:1' --swarm-id 'my swarm'"
    closed = NodeConfig(dht=DHTConfig(owner="ab" * 32), access=AccessConfig(swarm_key_path="secret/place"))
    assert join_line("127.0.0.1:31337", closed) == (
        f"{line} --owner {'ab' * 32} --identity KEY_FILE --delegation FILE --swarm-key FILE"
    )


def test_nodes_speak_utf8_to_the_demo_whatever_the_terminal_wants(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: given.update(options))
    monkeypatch.setenv("PYTHONIOENCODING", "utf-16")
    with (tmp_path / "log").open("wb") as log:
        local_swarm._spawn(["node"], stderr=log)
    assert given["env"]["PYTHONIOENCODING"] == "utf-8"
    assert given["encoding"] == "utf-8"
