"""What lookup finds out, from a directory and documents that are scripted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from p2pmoe.cli.lookup import make_table
from p2pmoe.cli.survey import Survey, format_schema
from p2pmoe.errors import PeerUnreachableError
from p2pmoe.experts.directory import ExpertRecord
from p2pmoe.protocol.schema_digest import digest_of_json
from p2pmoe.types import Endpoint, PeerId

ALICE, BOB = Endpoint("10.0.0.1", 1, public_key=bytes([7]) * 32), Endpoint("10.0.0.2", 2)
DIGEST = "00" * 8
TENSOR = {"type": "tensor", "shape": [64], "datatype": "FP32", "requires_grad": False, "codec": "raw"}
FORWARD = {
    "type": "tuple",
    "items": [{"type": "tuple", "items": [TENSOR]}, {"type": "dict", "items": {"mask": TENSOR | {"datatype": "BOOL"}}}],
}
DOCUMENT = {"schema_digest": DIGEST, "forward_schema": FORWARD, "outputs_schema": TENSOR}


def record(uid: str, endpoint: Endpoint, peer: str = "a") -> ExpertRecord:
    return ExpertRecord(uid, PeerId(peer * 32), endpoint, DIGEST, 160.0, declared_at=100.0, signature="valid")


class ScriptedDirectory:
    def __init__(self, *records: ExpertRecord) -> None:
        self.records = list(records)

    def invalidate(self) -> None:
        pass

    async def find_experts(self, pattern: str) -> list[ExpertRecord]:
        return self.records


class ScriptedDocuments:
    def __init__(self, answer: Callable[[Endpoint, str], Any]) -> None:
        self.asked: list[tuple[Endpoint, str]] = []
        self._answer = answer

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        self.asked.append((endpoint, path))
        return self._answer(endpoint, path)


def make_survey(directory: ScriptedDirectory, documents: ScriptedDocuments) -> Survey:
    return Survey(directory, documents, clock=lambda: 104.5)  # type: ignore[arg-type]


async def test_every_expert_comes_with_schema_age_and_round_trip() -> None:
    documents = ScriptedDocuments(lambda endpoint, path: DOCUMENT)
    survey = make_survey(ScriptedDirectory(record("ffn.0", ALICE), record("ffn.1", ALICE)), documents)

    first, second = await survey.look("ffn.*")

    assert first.round_trip_ms is not None
    assert first.to_json() | {"round_trip_ms": 1.0} == {
        "uid": "ffn.0",
        "peer_id": "a" * 32,
        "endpoint": "http://10.0.0.1:1",
        "schema_digest": DIGEST,
        "schema": {"forward": FORWARD, "outputs": TENSOR},
        "age_s": 4.5,
        "expires_at": 160.0,
        "expires_in_s": 55.5,
        "signature": "valid",
        "delegated_scope": None,
        "public_key": "07" * 32,
        "providers": ["a" * 32],
        "round_trip_ms": 1.0,
    }
    assert second.round_trip_ms == first.round_trip_ms
    assert [path for _, path in documents.asked].count("/p2pmoe/v1/experts/ffn.0") == 1
    assert len(documents.asked) == 3


async def test_a_node_that_does_not_answer_is_listed_all_the_same() -> None:
    def answer(endpoint: Endpoint, path: str) -> Any:
        if endpoint == BOB:
            raise PeerUnreachableError("bob is silent")
        return DOCUMENT

    survey = make_survey(ScriptedDirectory(record("ffn.0", ALICE), record("ffn.1", BOB)), ScriptedDocuments(answer))

    alice, bob = await survey.look("ffn.*")

    assert alice.round_trip_ms is not None
    assert (bob.round_trip_ms, bob.schema) == (None, alice.schema)
    assert make_table("ffn.*", [alice, bob]).row_count == 2


@pytest.mark.parametrize("document", [[], None, {"schema_digest": "ff"}, {}])
async def test_a_schema_of_another_digest_is_not_believed(document: Any) -> None:
    survey = make_survey(ScriptedDirectory(record("ffn.0", ALICE)), ScriptedDocuments(lambda endpoint, path: document))

    (found,) = await survey.look("ffn.*")

    assert found.schema is None


def test_a_schema_is_shown_in_wire_order() -> None:
    assert format_schema({"forward": FORWARD, "outputs": TENSOR}) == "FP32[64], BOOL[64] → FP32[64]"
    assert format_schema(None) == "?"


@pytest.mark.parametrize(
    "junk",
    [
        None,
        3,
        "text",
        {"type": "tensor", "datatype": "\x1b[31m", "shape": [1]},
        {"type": "tensor", "datatype": "FP32", "shape": "\x1b"},
        {"type": "tensor", "datatype": "FP32", "shape": ["\x1b", None]},
        {"type": "tuple", "items": "\x1b"},
        {"type": "dict", "items": {"\x1b": {"type": "\x1b"}}},
    ],
)
def test_a_strangers_words_never_reach_the_terminal(junk: Any) -> None:
    assert "\x1b" not in format_schema({"forward": junk, "outputs": junk})


def test_a_deeply_nested_schema_is_cut() -> None:
    node: Any = TENSOR
    for _ in range(100):
        node = {"type": "tuple", "items": [node]}

    assert format_schema({"forward": node, "outputs": TENSOR}) == "nothing → FP32[64]"


@pytest.mark.parametrize("liar_first", [True, False])
async def test_a_false_schema_stands_for_the_node_that_states_it_alone(liar_first: bool) -> None:
    digest = digest_of_json(FORWARD, TENSOR)
    false = TENSOR | {"shape": [7]}
    honest = {"schema_digest": digest, "forward_schema": FORWARD, "outputs_schema": TENSOR}

    def answer(endpoint: Endpoint, path: str) -> Any:
        return honest | {"outputs_schema": false} if endpoint == BOB else honest

    records = [
        replace(record("ffn.0", ALICE), schema_digest=digest),
        replace(record("ffn.1", BOB), schema_digest=digest),
    ]
    survey = make_survey(ScriptedDirectory(*(records[::-1] if liar_first else records)), ScriptedDocuments(answer))

    by_node = {each.record.endpoint: each.schema for each in await survey.look("ffn.*")}

    assert by_node[ALICE] == {"forward": FORWARD, "outputs": TENSOR}
    assert by_node[BOB] == {"forward": FORWARD, "outputs": TENSOR}, "the digest that it announced is proof enough"
