"""The tree of prefixes: counts, runs of neighbours, several providers."""

from __future__ import annotations

from rich.console import Console
from test_cli_survey import ALICE, BOB, ScriptedDirectory, ScriptedDocuments, make_survey, record

from p2pmoe.cli.lookup import make_document, make_table, make_view
from p2pmoe.cli.tree import make_branches, make_tree
from p2pmoe.errors import PeerUnreachableError
from p2pmoe.experts.directory import ExpertRecord


def printed(shown: object) -> str:
    console = Console(width=120, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def records() -> list[ExpertRecord]:
    alice = [record(f"ffn.0.{number}", ALICE, "a") for number in range(4)]
    return [*alice, record("ffn.0.3", BOB, "b"), record("ffn.0.9", BOB, "b"), record("ffn.2.0", BOB, "b")]


def test_every_prefix_has_its_counts_and_neighbours_of_the_same_providers_share_a_line() -> None:
    text = printed(make_tree("ffn.*", records()))
    assert [line.strip("│├└─ ") for line in text.splitlines()] == [
        "ffn.*: 6 experts",
        "ffn.  6 experts, 2 nodes",
        "ffn.0.  5 experts, 2 nodes",
        "ffn.0.[0:3]  aaaaaaaa",
        "ffn.0.3  aaaaaaaa, bbbbbbbb",
        "ffn.0.9  bbbbbbbb",
        "ffn.2.  1 expert, 1 node",
        "ffn.2.0  bbbbbbbb",
    ]


def test_many_providers_are_counted_and_not_all_named() -> None:
    crowd = [record("ffn.0", ALICE, peer) for peer in "abcdefgh"]
    assert "… 8 in all" in printed(make_tree("ffn.0", crowd))


def test_names_are_trees_of_their_own() -> None:
    assert [branch.prefix for branch in make_branches([record("a.0", ALICE), record("b.1.2.3", BOB)])] == ["a.", "b."]


def test_programs_get_nested_prefixes() -> None:
    (root,) = (branch.to_json() for branch in make_branches(records()))
    assert (root["prefix"], root["experts"], root["peers"], root["uids"]) == ("ffn.", 6, 2, {})
    first, second = root["branches"]
    assert first["uids"]["ffn.0.3"] == ["a" * 32, "b" * 32]
    assert second == {"prefix": "ffn.2.", "experts": 1, "peers": 1, "branches": [], "uids": {"ffn.2.0": ["b" * 32]}}


async def test_the_table_names_a_uid_once_and_all_its_providers() -> None:
    def silent(endpoint: object, path: str) -> object:
        raise PeerUnreachableError("nobody is there")

    directory = ScriptedDirectory(record("ffn.0", ALICE, "a"), record("ffn.0", BOB, "b"))
    found = await make_survey(directory, ScriptedDocuments(silent)).look("ffn.*")
    text = printed(make_table("ffn.*", found))
    assert text.count("ffn.0") == 1
    assert "bbbbbbbb" in text
    assert text.count("in 56 s") == text.count("valid") == 2
    assert [each["providers"] for each in make_document(found, tree=False)] == [["a" * 32, "b" * 32]] * 2
    assert make_document(found, tree=True)[0]["experts"] == 1
    assert "1 expert, 2 nodes" in printed(make_view("ffn.*", found, tree=True))
