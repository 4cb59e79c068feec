"""What lookup says of a whole swarm, and how it shows many experts."""

import json
from dataclasses import replace
from typing import Any

from test_cli_survey import ALICE, BOB, DIGEST, DOCUMENT, ScriptedDirectory, ScriptedDocuments, make_survey, record

from p2pmoe.cli.lookup import group_neighbours, make_document, make_table
from p2pmoe.cli.output import open_console
from p2pmoe.cli.overview import Summary, overview_document, overview_table, summarize, survey_swarm
from p2pmoe.cli.survey import Sighting
from p2pmoe.errors import PeerUnreachableError
from p2pmoe.types import Endpoint

SCHEMA = {"forward": DOCUMENT["forward_schema"], "outputs": DOCUMENT["outputs_schema"]}


def sighting(uid: str, endpoint: Endpoint = ALICE, peer: str = "a", digest: str = DIGEST) -> Sighting:
    return Sighting(replace(record(uid, endpoint, peer), schema_digest=digest), SCHEMA, 1.5, 104.5)


def grid(rows: int, columns: int, **options: Any) -> list[Sighting]:
    return [sighting(f"ffn.{row}.{column}", **options) for row in range(rows) for column in range(columns)]


def text(view: Any, capsys: Any) -> str:
    open_console().print(view)
    return str(capsys.readouterr().out)


def test_a_summary_counts_experts_replicas_nodes_and_holes() -> None:
    found = [
        *grid(2, 4),
        sighting("ffn.3.3", BOB, "b"),
        sighting("ffn.0.0", BOB, "b"),
        sighting("gate.1", BOB, "b", "ff"),
    ]
    updates = {(ALICE, f"ffn.{row}.{column}"): 10 for row in range(2) for column in range(4)} | {(BOB, "ffn.3.3"): 7}

    ffn, gate = summarize(found, updates)

    assert ffn == Summary("ffn.", (4, 4), 9, 10, 2, 87, {DIGEST: 10})
    assert ffn.coverage == 9 / 16
    assert gate == Summary("gate.", (2,), 1, 1, 1, None, {"ff": 1})


def test_names_with_uids_of_two_lengths_are_two_summaries() -> None:
    one, two = summarize([sighting("ffn.5"), sighting("ffn.0.1")], {})
    assert (one.grid, two.grid) == ((6,), (1, 2))


def test_the_document_has_every_schema_once() -> None:
    found = grid(8, 8)
    document = overview_document("p2pmoe", summarize(found, {}), found)
    assert document == {
        "swarm_id": "p2pmoe",
        "nodes": 1,
        "experts": 64,
        "prefixes": [
            {
                "prefix": "ffn.",
                "grid": [8, 8],
                "experts": 64,
                "replicas": 64,
                "coverage": 1.0,
                "nodes": 1,
                "updates": None,
                "schemas": {DIGEST: 64},
            }
        ],
        "schemas": {DIGEST: SCHEMA},
    }
    assert json.dumps(document).count("datatype") == json.dumps(SCHEMA).count("datatype")


def test_the_table_has_a_line_for_each_name(capsys: Any) -> None:
    found = [*grid(2, 4), sighting("gate.1", digest="ff")]
    shown = text(overview_table("my [swarm]", summarize(found, {(ALICE, "ffn.0.0"): 3}), found), capsys)
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    assert lines[0] == ["swarm", "my", "[swarm]"]
    assert lines[3][:8] == ["ffn.", "2", "×", "4", "8", "100%", "1", "3"]
    assert lines[4][:6] == ["gate.", "2", "1", "50%", "1", "?"]


async def test_everything_is_looked_up_name_by_name_and_silent_nodes_are_counted_without_updates() -> None:
    class Named(ScriptedDirectory):
        async def find_names(self) -> dict[str, tuple[str, ...]]:
            return {"ffn": ("a",), "gone": ("a",)}

        async def find_experts(self, pattern: str) -> Any:
            return [each for each in self.records if each.uid.startswith(pattern)]

    def answer(endpoint: Endpoint, path: str) -> Any:
        if endpoint == BOB:
            raise PeerUnreachableError("silent")
        if path == "/p2pmoe/v1/experts":
            return {"experts": {"ffn.0": {"schema_digest": DIGEST, "updates": 5}}, "next": "ffn.0"}
        if path == "/p2pmoe/v1/experts?after=ffn.0":
            return {"experts": {"ffn.1": {"schema_digest": DIGEST, "updates": 6}}, "next": None}
        return DOCUMENT

    directory = Named(record("ffn.0", ALICE), record("ffn.1", ALICE), record("ffn.2", BOB, "b"))
    documents = ScriptedDocuments(answer)

    (summary,), sightings = await survey_swarm(make_survey(directory, documents), documents, 5.0)  # type: ignore[arg-type]

    assert summary == Summary("ffn.", (3,), 3, 3, 2, 11, {DIGEST: 3})
    assert [each.round_trip_ms is None for each in sightings] == [False, False, True]


def test_a_list_names_a_schema_with_the_first_of_its_digest_only() -> None:
    found = [sighting("ffn.0"), sighting("ffn.1"), sighting("ffn.2", digest="ff"), sighting("ffn.3")]
    document = make_document(found, tree=False)
    assert ["schema" in each for each in document] == [True, False, True, False]
    assert [each["schema_digest"] for each in document] == [DIGEST, DIGEST, "ff", DIGEST]
    silent = [replace(sighting("ffn.0"), schema=None), sighting("ffn.1")]
    assert [each.get("schema") for each in make_document(silent, tree=False)] == [None, SCHEMA]


def test_a_long_table_has_a_row_for_neighbours_of_one_node(capsys: Any) -> None:
    found = sorted(
        [*grid(4, 16), sighting("ffn.1.3", BOB, "b"), sighting("ffn.1.4", BOB, "b"), sighting("ffn.1.6", BOB, "b")],
        key=lambda each: each.record.uid,
    )
    runs = [[each.record.uid for each in run] for run in group_neighbours(sorted(found, key=_place))]
    assert [(run[0], len(run)) for run in runs] == [
        ("ffn.0.0", 16), ("ffn.1.0", 16), ("ffn.1.3", 2), ("ffn.1.6", 1), ("ffn.2.0", 16), ("ffn.3.0", 16),
    ]  # fmt: skip
    shown = text(make_table("ffn", sorted(found, key=_place)), capsys)
    assert "ffn: 67 found" in shown
    assert "ffn.1.[0:16]" in shown
    assert "ffn.1.[3:5]" in shown
    assert make_table("ffn", found[:40]).row_count == 40
    assert make_table("ffn", sorted(found, key=_place)).row_count == 6


def _place(each: Sighting) -> tuple[list[int], str]:
    return [int(part) for part in each.record.uid.split(".")[1:]], each.record.peer_id
