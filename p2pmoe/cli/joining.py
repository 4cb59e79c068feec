"""The line with which somebody else joins: where the swarm is, and experts that nobody serves yet. Starts nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from p2pmoe.config import NodeConfig
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.uid import MAX_COORDINATE, ExpertUid, parse_uid, prefix_of

if TYPE_CHECKING:
    from p2pmoe.node import Node

logger = logging.getLogger(__name__)

FILE: Final = "FILE"
"""Stands for what the keeper of the other node has to be given."""
NO_EXPERTS: Final = (
    "this node hosts no experts, it only helps others to find each other; to host some: p2pmoe node --experts "
    "'ffn.[0:4].[0:4]' --hidden-dim 512, or [experts] uids in node.toml"
)
_EXAMPLE: Final = tuple(ExpertUid("ffn", (first, second)) for first in range(4) for second in range(4))
_MOST: Final = 64
_LOOK_S: Final = 2.0


def join_line(dht_address: str, config: NodeConfig, experts: str | None = None) -> str:
    """The command that starts another node of the same swarm, one that hosts `experts` like ours.

    FILE and KEY_FILE stand for files that its keeper has to be given; see `explain`.
    """
    words = ["p2pmoe", "node", "--initial-peers", dht_address]
    if experts is not None:
        words += ["--experts", experts, *_class_of(config)]
    if config.dht.swarm_id != NodeConfig().dht.swarm_id:
        words += ["--swarm-id", config.dht.swarm_id]
    if config.dht.owner is not None:
        words += ["--owner", config.dht.owner, "--identity", "KEY_FILE", "--delegation", FILE]
    if config.access.swarm_key_path is not None:
        words += ["--swarm-key", FILE]
    return shlex.join(words)


def explain(config: NodeConfig) -> str | None:
    """What the capital letters of the line stand for; None where there are none."""
    missing = []
    if config.experts.modules:
        missing.append(f"--modules {FILE}: a copy of {', '.join(config.experts.modules)}")
    if config.dht.owner is not None:
        missing.append(
            f"--delegation {FILE}: what the swarm's owner gives for the key of KEY_FILE (p2pmoe id new KEY_FILE makes "
            f"it, p2pmoe id delegate gives)"
        )
    if config.access.swarm_key_path is not None:
        missing.append(f"--swarm-key {FILE}: a copy of {config.access.swarm_key_path}")
    return f"whoever joins needs {'; '.join(missing)}" if missing else None


async def free_experts(node: Node) -> str:
    """A block of uids like those that the node hosts, behind all that the swarm has now."""
    hosted = [parse_uid(backend.name) for backend in node.backends] or list(_EXAMPLE)
    first = hosted[0]
    taken = await _taken(node, prefix_of(first.name, ()))
    return next_block([uid for uid in hosted if uid.name == first.name], taken, hosts_them=bool(node.backends))


def next_block(hosted: Sequence[ExpertUid], taken: Iterable[int], *, hosts_them: bool = True) -> str:
    """The pattern of a block with the extent of `hosted`, at most 64 experts, whose first coordinate is free."""
    depth = len(hosted[0].coordinates)
    columns = list(zip(*(uid.coordinates for uid in hosted if len(uid.coordinates) == depth), strict=True))
    lows, highs = [min(column) for column in columns], [max(column) for column in columns]
    used = [*taken, *(uid.coordinates[0] for uid in hosted)] if hosts_them else list(taken)
    start = max(used, default=-1) + 1
    across = math.prod(high - low + 1 for low, high in zip(lows[1:], highs[1:], strict=True))
    extent = max(1, min(highs[0] - lows[0] + 1, _MOST // across))
    if start + extent > MAX_COORDINATE:
        start = 0
    ranges = [(start, start + extent), *((low, high + 1) for low, high in zip(lows[1:], highs[1:], strict=True))]
    return ".".join([hosted[0].name, *(str(a) if b - a == 1 else f"[{a}:{b}]" for a, b in ranges)])


async def _taken(node: Node, prefix: str) -> set[int]:
    """First coordinates that somebody serves; none where the swarm cannot be asked."""
    if node.directory is None:
        return set()
    try:
        async with asyncio.timeout(_LOOK_S):
            return set((await node.directory.get_prefixes([prefix]))[prefix])
    except (P2PMoEError, TimeoutError) as error:
        logger.debug("which experts are taken cannot be looked up: %s", error)
        return set()


def _class_of(config: NodeConfig) -> list[str]:
    experts, words = config.experts, []
    if experts.modules:
        words += ["--modules", FILE]
    if experts.kind != NodeConfig().experts.kind:
        words += ["--kind", experts.kind]
    words += ["--hidden-dim", str(experts.hidden_dim)]
    if experts.options:
        words += ["--expert-options", inline_toml(experts.options)]
    return words


def inline_toml(value: Any) -> str:
    """A value of a config as TOML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {inline_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(inline_toml, value)) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value)
    return repr(value)
