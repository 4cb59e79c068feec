"""The folder of checkpoints of a node whose keeper named none: beside its key, one for each thing that it hosts."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

import msgspec

from p2pmoe.config import NodeConfig
from p2pmoe.experts.uid import expand_patterns
from p2pmoe.server.checkpoints import parse_name, uid_of

logger = logging.getLogger(__name__)


def with_own_state(settings: NodeConfig) -> NodeConfig:
    """The settings with the folder that they leave open; a node without a key file keeps nothing."""
    if settings.identity_path is None or settings.state.path is not None:
        return settings
    path = own_state_path(Path(settings.identity_path), settings)
    tell_of_others(path, settings)
    return msgspec.structs.replace(settings, state=msgspec.structs.replace(settings.state, path=str(path)))


def own_state_path(identity_path: Path, settings: NodeConfig) -> Path:
    """Whoever tries another width, class, optimizer or swarm finds the experts of before again when he goes back."""
    experts, swarm_id = settings.experts, settings.dht.swarm_id
    hosted = [swarm_id, experts.kind, experts.hidden_dim, experts.options, settings.optimizer.name]
    digest = hashlib.sha256(msgspec.json.encode(hosted, order="deterministic")).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9]+", "-", f"{swarm_id}-{experts.kind}-{experts.hidden_dim}".lower()).strip("-")[:64]
    return identity_path.with_suffix(".state") / f"{readable}-{digest}"


def tell_of_others(path: Path, settings: NodeConfig) -> None:
    """Warn when experts of these uids are kept as something else: they are left alone, and others begin."""
    uids = set(expand_patterns(settings.experts.uids))
    for folder in _siblings(path):
        kept = sorted(uids & _kept(folder))
        if kept and not uids & _kept(path):
            logger.warning(
                "%s (%d in all) was hosted before as another kind, width or for another swarm: its checkpoints in %s "
                "are left as they are, and it begins anew in %s",
                kept[0],
                len(kept),
                folder,
                path,
            )


def _siblings(path: Path) -> list[Path]:
    try:
        return sorted(each for each in path.parent.iterdir() if each.is_dir() and each != path)
    except OSError:
        return []


def _kept(folder: Path) -> set[str]:
    """The uids with checkpoints in a folder."""
    try:
        names = [parse_name(each.name) for each in folder.iterdir()]
    except OSError:
        return set()
    return {uid_of(name.key) for name in names if name is not None and name.is_document}
