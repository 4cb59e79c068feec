"""What is kept and shown of a run: counts of experts, the curve, the document."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from p2pmoe.cli.results import experts_table, finish
from p2pmoe.errors import PeerUnreachableError
from p2pmoe.experts.directory import ExpertRecord
from p2pmoe.training.census import ExpertCount, count_experts
from p2pmoe.training.curve import moving_average
from p2pmoe.training.loop import History
from p2pmoe.training.session import Result, SessionOptions
from p2pmoe.types import Endpoint, PeerId

ALICE, BOB = Endpoint("10.0.0.1", 1), Endpoint("10.0.0.2", 2)
EXPERTS: list[ExpertCount] = [{"uid": "ffn.0", "peer_id": "a" * 32, "updates": 3, "requests": None}]
HISTORY = History(
    steps=[1, 2], losses=[2.0, 1.0], accuracies=[(1, 0.5), (2, 0.75)], failed_steps=1, samples=8, seconds=2.0
)


class ScriptedSwarm:
    """Answers as the two nodes would."""

    def __init__(self, answers: dict[Endpoint, Any]) -> None:
        self.answers = answers
        self.transport = self

    def find_experts(self, pattern: str) -> list[ExpertRecord]:
        peers = {ALICE: "a" * 32, BOB: "b" * 32}
        return [
            ExpertRecord(f"ffn.{number}", PeerId(peers[endpoint]), endpoint, "00", 0.0, 0.0)
            for number, endpoint in enumerate([ALICE, ALICE, BOB])
        ]

    def run(self, coroutine: Any) -> Any:
        import asyncio

        return asyncio.run(coroutine)

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        answer = self.answers[endpoint]
        if isinstance(answer, Exception):
            raise answer
        return answer


def count(answers: dict[Endpoint, Any]) -> list[tuple[int | None, int | None]]:
    counts = count_experts(ScriptedSwarm(answers), "ffn.")  # type: ignore[arg-type]
    assert [each["uid"] for each in counts] == ["ffn.0", "ffn.1", "ffn.2"]
    return [(each["updates"], each["requests"]) for each in counts]


def test_every_node_is_asked_for_its_own_experts() -> None:
    alice = {"experts": {"ffn.0": {"updates": 1, "requests": 2}, "ffn.1": {"updates": 3, "requests": 4}}}
    bob = {"experts": {"ffn.2": {"updates": 5, "requests": 6}}}

    assert count({ALICE: alice, BOB: bob}) == [(1, 2), (3, 4), (5, 6)]


@pytest.mark.parametrize(
    "answer", [PeerUnreachableError("silent"), None, [], {"experts": []}, {"experts": {"ffn.2": 1}}]
)
def test_a_node_that_does_not_say_stays_in_the_list(answer: Any) -> None:
    alice = {"experts": {"ffn.0": {"updates": -1, "requests": "many"}, "ffn.1": {"updates": True, "requests": 2**70}}}

    assert count({ALICE: alice, BOB: answer}) == [(None, None)] * 3


def test_the_moving_average_starts_at_the_first_value() -> None:
    assert moving_average([4.0, 8.0, 8.0], share=0.5) == [4.0, 6.0, 7.0]
    assert moving_average([]) == []


def test_a_run_ends_with_a_document_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Result(SessionOptions("digits", seed=7), HISTORY, EXPERTS)

    finish(result, Console(stderr=True), tmp_path, as_json=True)

    document = json.loads(capsys.readouterr().out)
    assert document == {
        "task": "digits",
        "accuracy": 0.75,
        "loss": 1.0,
        "steps": 2,
        "failed_steps": 1,
        "seconds": 2.0,
        "samples_per_s": 4.0,
        "seed": 7,
        "experts": EXPERTS,
        "run_dir": str(tmp_path),
    }
    assert json.loads((tmp_path / "result.json").read_text()) == document
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_node_is_shown_by_its_name_where_it_has_one() -> None:
    table = experts_table(EXPERTS, {"a" * 32: "node-1"})

    assert list(table.columns[1].cells) == ["node-1 (aaaaaaaa)"]
    assert list(table.columns[3].cells) == ["?"]
