"""Every command and flag that a message, a docstring or a page names exists."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from p2pmoe.cli.main import app

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", ROOT / "node.toml", *ROOT.glob("docs/*.md")]
SOURCES = [*ROOT.glob("p2pmoe/**/*.py"), *ROOT.glob("scripts/**/*.py")]
# What introduces a command: a code span, bold type, "run: ", "with: ", a line of its own.
COMMAND = re.compile(r"(?:(?<=`)|(?<=\[bold\])|(?<=: )|(?<=; )|(?<=\()|^ *)p2pmoe((?: +[^\s`]+)+)", re.MULTILINE)
PROSE = {"X", "is", "trains", "uses", "at", "and", "for", "as", "key;", "shares", "Documentation"}


@functools.cache
def root_command() -> object:
    return typer.main.get_command(app)


def texts_of(path: Path) -> Iterator[str]:
    """A page as it stands; of a module every string, its parts joined, with X for what is filled in."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield source
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)


def words_of(text: str) -> list[str]:
    bare = re.sub(r"\[/?bold\].*|\\(?=\[)", "", text)
    try:
        return shlex.split(bare)
    except ValueError:
        return bare.split()


def fault_of(words: list[str]) -> str | None:
    """What is wrong with a command line: a command or a flag that is not there."""
    command = root_command()
    for word in words:
        if word.startswith("--") or re.fullmatch(r"-[a-z]", word):
            flag = word.partition("=")[0].rstrip(".,;:)`")
            known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}  # type: ignore[attr-defined]
            known |= {"--help", "-h", "--install-completion", "--show-completion"}
            if flag not in known:
                return f"{command.name} has no {flag}"  # type: ignore[attr-defined]
        elif word in ("|", "<", ">", "&&", "…"):
            break
        elif subcommands := getattr(command, "commands", None):
            name = word.rstrip(".,;:)`")
            if name not in subcommands:
                return f"{command.name} has no command {name}"  # type: ignore[attr-defined]
            command = subcommands[name]
            if word != name:
                break
    return None


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_a_text_names_exist(path: Path) -> None:
    faults = []
    for text in texts_of(path):
        for match in COMMAND.finditer(text):
            words = words_of(match[1])
            if words and words[0] not in PROSE and (fault := fault_of(words)):
                faults.append(f"p2pmoe {' '.join(words)}: {fault}")
    assert faults == []


def test_the_check_finds_what_is_not_there() -> None:
    assert fault_of(words_of(" doctor")) == "p2pmoe has no command doctor"
    assert fault_of(words_of(" node --bogus 1")) == "node has no --bogus"
    assert fault_of(words_of(" id delegate OWNER --scope ffn. --days 30")) is None
    assert fault_of(words_of(" id swarm-key bogus")) == "swarm-key has no command bogus"
