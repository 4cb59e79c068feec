"""How experts begin: from their newest checkpoint, or afresh, or not at all. Knows folders and backends; no threads.

Rules (`[experts] fresh`); an expert that has checkpoints here is never silently begun anew:
1. if_vacant: it goes on from its newest whole checkpoint; without any it begins afresh.
2. never: the same, but without any the node does not start.
3. always: it begins afresh whatever there is; the log says what is thrown away.
4. Checkpoints that are of another expert (class, options, shapes, schema, optimizer, swarm), or none of which is whole,
   stop the start with a `StateError`. Nothing is written over: the next number is always higher.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from p2pmoe.config import Fresh
from p2pmoe.errors import StateError
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.checkpoints import applied_now
from p2pmoe.server.expert_state import put_back
from p2pmoe.server.state_folder import Found, StateFolder
from p2pmoe.server.tensor_file import decode_tensors

logger = logging.getLogger(__name__)

_SHOWN: Final = 8
_TOLD: Final = 3


@dataclass(slots=True)
class Restoration:
    """What became of a node's experts when it started."""

    restored: dict[str, int] = field(default_factory=dict)
    """Updates by uid."""
    begun: list[str] = field(default_factory=list)
    """Those that had no checkpoint."""
    thrown_away: dict[str, int] = field(default_factory=dict)
    """Updates by uid, where `fresh = "always"` said so."""
    applied: list[tuple[str, str, float]] = field(default_factory=list)
    """Ids of backward calls that were applied, uids, ages in seconds."""

    def describe(self) -> str:
        """One line."""
        parts = []
        if self.restored:
            parts.append(f"{len(self.restored)} restored ({_listed(self.restored)})")
        if self.thrown_away:
            parts.append(f"{len(self.thrown_away)} thrown away as experts.fresh says ({_listed(self.thrown_away)})")
        if self.begun:
            parts.append(f"{len(self.begun)} begun afresh")
        return ", ".join(parts) or "no experts"


def restore_experts(folder: StateFolder, backends: Iterable[ExpertBackend], *, swarm: str, fresh: Fresh) -> Restoration:
    """Let each go on from its checkpoint, by the rules above.

    Raises StateError when one of them must not be served; then none may be.
    """
    result = Restoration()
    problems: list[str] = []
    for backend in backends:
        try:
            _restore_one(folder, backend, swarm, fresh, result)
        except StateError as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
        raise StateError("; ".join(problems[:_TOLD]) + more)
    return result


def _restore_one(folder: StateFolder, backend: ExpertBackend, swarm: str, fresh: Fresh, result: Restoration) -> None:
    uid = backend.name
    if fresh == "always":
        entries = [entry for entry in folder.entries_of(uid) if not entry.is_bad]
        if entries:
            result.thrown_away[uid] = entries[0].updates
        else:
            result.begun.append(uid)
        return
    found = folder.newest(uid)
    if found is None:
        if fresh == "never":
            raise StateError(
                f"{uid}: there is no checkpoint of it in {folder.path}, and experts.fresh = 'never'; put one there "
                f"(p2pmoe state import), or set experts.fresh = 'if_vacant'"
            )
        result.begun.append(uid)
        return
    _go_on(folder, backend, swarm, found)
    result.restored[uid] = found.checkpoint.updates
    result.applied += [(call_id, uid, age_s) for call_id, age_s in applied_now(found.checkpoint)]


def _go_on(folder: StateFolder, backend: ExpertBackend, swarm: str, found: Found) -> None:
    checkpoint = found.checkpoint
    try:
        _check_swarm(checkpoint.swarm, swarm)
        put_back(backend, checkpoint, decode_tensors(found.tensors_path))
    except StateError as error:
        raise StateError(
            f"{backend.name}: its checkpoint at {checkpoint.updates} updates in {folder.path} does not fit: {error}. "
            f"Nothing was written over; host it as it was, set another state.path, or experts.fresh = 'always' to "
            f"begin anew"
        ) from error


def _check_swarm(then: str, now: str) -> None:
    if then != now:
        raise StateError(f"it is of the swarm {then!r:.80}, and this node is of {now!r:.80}")


def _listed(updates: dict[str, int]) -> str:
    first = [f"{uid} at {count}" for uid, count in list(updates.items())[:_SHOWN]]
    return ", ".join([*first, "…"] if len(updates) > _SHOWN else first)
