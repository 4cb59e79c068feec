"""`train digits` through real nodes while somebody else serves the same name with another width."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarm_kit import make_backend

import p2pmoe
from p2pmoe.cli.main import main
from p2pmoe.errors import SchemaError
from p2pmoe.training.session import SessionOptions, run_session
from p2pmoe.training.tasks import find_task

WIDTH = 16


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """alice serves a grid of 4 × 4; mallory serves ffn.0.0 as well, of another width."""
    grid = {"experts": {"uids": ["ffn.[0:4].[0:4]"], "hidden_dim": WIDTH, "seed": 1}}
    with p2pmoe.background_node(p2pmoe.NodeConfig.from_tree(grid)) as alice:
        joins = {"dht": {"initial_peers": [alice.dht_address]}}
        with p2pmoe.background_node(p2pmoe.NodeConfig.from_tree(joins), [make_backend("ffn.0.0", dim=48)]):
            yield alice.dht_address


@pytest.mark.parametrize("seed", range(5))
def test_a_stranger_ends_no_run(address: str, seed: int) -> None:
    with p2pmoe.Swarm(initial_peers=[address]) as swarm:
        options = SessionOptions("digits", steps=2, batch_size=8, seed=seed, k_best=2)
        result = run_session(swarm, find_task("digits"), options)
    assert len(result.history.losses) == 2
    assert result.history.failed_steps == 0
    assert len(result.experts) == 16


def test_a_width_that_is_said_wins(address: str) -> None:
    with p2pmoe.Swarm(initial_peers=[address]) as swarm:
        options = SessionOptions("digits", steps=1, batch_size=8, k_best=1, hidden_dim=48)
        result = run_session(swarm, find_task("digits"), options)
        assert [each["uid"] for each in result.experts] == ["ffn.0.0"]
        with pytest.raises(SchemaError, match=r"they take FP32\[batch, 16\], and you asked for a width of 7"):
            run_session(swarm, find_task("digits"), SessionOptions("digits", hidden_dim=7))


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--grid", "2x2"], 3, "uids below ffn have 2 coordinates, 4 × 4; you asked for 2 × 2"),
        (["--grid", "4"], 3, "uids below ffn have 2 coordinates, 4 × 4; you asked for 4"),
        (["--grid", "4x4x4"], 3, "uids below ffn have 2 coordinates, 4 × 4; you asked for 4 × 4 × 4"),
        (["--hidden-dim", "7"], 3, "and you asked for a width of 7"),
        (["--k-best", "17"], 3, "k_best=17 is more than the 16 experts of a grid of 4 × 4"),
        (["--uid-prefix", "fnn"], 7, "no expert below fnn. is alive in grid 4 × 4; there are experts below ffn; run"),
        (["--grid", "2x2", "--partial-grid", "--k-best", "2"], 0, ""),
    ],
)
def test_what_does_not_fit_is_said_at_once(
    address: str, flags: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["train", "digits", "--initial-peers", address, "--steps", "1", "--batch-size", "8", "--json"]
    assert main([*arguments, *flags]) == code
    printed = capsys.readouterr()
    assert words in printed.err
    if not code:
        assert json.loads(printed.out)["steps"] == 1
