"""The inputs kept in the repository: `tests/corpus/<target>/` bad ones, `tests/corpus/seeds/<target>/` valid ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fuzzing.guard import Finding

CORPUS: Final = Path(__file__).parents[2] / "tests" / "corpus"
SEEDS: Final = "seeds"


def bad_inputs(target: str) -> list[Path]:
    """Every bad input ever found, in a fixed order."""
    return sorted((CORPUS / target).glob("*.bin"))


def seed_inputs(target: str) -> list[Path]:
    """Valid inputs, from which the fuzzer sets out."""
    return sorted((CORPUS / SEEDS / target).glob("*.bin"))


def all_inputs(target: str) -> list[bytes]:
    """The content of both folders."""
    return [path.read_bytes() for path in (*seed_inputs(target), *bad_inputs(target))]


def keep(target: str, finding: Finding, folder: Path | None = None) -> Path:
    """Write a finding's bytes to the corpus; the tests run them from then on."""
    kind = "".join(each for each in finding.kind.lower() if each.isalnum())
    path = (folder or CORPUS) / target / f"found-{kind}-{finding.digest}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(finding.data)
    return path


def write_seeds(target: str, seeds: Mapping[str, bytes]) -> None:
    """Replace the target's seed files."""
    folder = CORPUS / SEEDS / target
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.bin"):
        path.unlink()
    for name, data in seeds.items():
        (folder / f"{name}.bin").write_bytes(data)
