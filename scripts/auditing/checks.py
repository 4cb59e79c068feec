"""The checks that need no network. Each gives the complaints it has, one line each."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT: Final = Path(__file__).parents[2]
ADVISORIES: Final = Path(__file__).with_name("advisories.toml")
_PIN_RE: Final = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)")
_READ_BYTES: Final = 1024 * 1024


def pins(text: str | None = None) -> dict[str, str]:
    """constraints.txt as name -> version. Raises ValueError for a line that pins nothing exactly."""
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines() if text is None else text.splitlines():
        pin = line.partition("#")[0].strip()
        match = _PIN_RE.fullmatch(pin)
        if pin and match is None:
            raise ValueError(f"constraints.txt: {pin!r} pins no exact version")
        if match is not None:
            pinned[canonicalize_name(match[1])] = match[2]
    return pinned


def needed(root: str = "p2pmoe", extras: frozenset[str] = frozenset({"dev", "tasks"})) -> dict[str, str]:
    """Everything that an installed project needs here, with the extras: name -> installed version, or ""."""
    found: dict[str, str] = {}
    waiting = [(root, extras)]
    seen = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            requires = metadata.requires(name) or []
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
            continue
        for text in requires:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (wanted or {""})):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    found.pop(root, None)
    return found


def unpinned(needs: dict[str, str], pinned: dict[str, str]) -> Iterator[str]:
    """Needed and not pinned, not installed, or installed in another version."""
    for name, version in sorted(needs.items()):
        if name not in pinned:
            yield f"{name} is needed and not pinned; add it to constraints.txt"
        elif not version:
            yield f"{name} is not installed; run scripts/setup dev"
        elif Version(version).public != Version(pinned[name]).public:
            yield f"{name} {version} is installed, {pinned[name]} is pinned; run scripts/setup dev in a fresh .venv"


def flawed(versions: dict[str, str]) -> Iterator[str]:
    """Versions that our own list knows a flaw of."""
    for name, flaw in tomllib.loads(ADVISORIES.read_text()).items():
        version = versions.get(name)
        if version and Version(version) < Version(flaw["fixed"]):
            yield f"{name} {version}: {flaw['advisory']}, {flaw['why']}; {flaw['fixed']} is the first without it"


def allowed_by_us() -> Iterator[str]:
    """Lower bounds in pyproject.toml that let a version with a known flaw in."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for texts in project["optional-dependencies"].values() for each in texts]
    advisories = tomllib.loads(ADVISORIES.read_text())
    for text in (*project["dependencies"], *extras):
        requirement = Requirement(text)
        flaw = advisories.get(canonicalize_name(requirement.name))
        lowest = [Version(each.version) for each in requirement.specifier if each.operator in {">=", "=="}]
        if flaw and (not lowest or max(lowest) < Version(flaw["fixed"])):
            yield f"pyproject.toml allows {requirement}: {flaw['advisory']} was fixed in {flaw['fixed']}"


def damaged(names: list[str]) -> Iterator[str]:
    """Installed files that are not what their package's RECORD says: changed since, or gone."""
    for name in names:
        for file in metadata.files(name) or ():
            if file.hash is None or file.hash.mode != "sha256":
                continue
            path = Path(str(file.locate()))
            if not path.exists():
                yield f"{name}: {file} is missing"
            elif base64.urlsafe_b64encode(_sha256(path)).rstrip(b"=").decode() != file.hash.value:
                yield f"{name}: {file} is not what was installed; make a fresh .venv"


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.digest()
