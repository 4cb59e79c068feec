"""Experts as a tree of prefixes with counts, for `p2pmoe lookup --tree`. Knows no DHT: records in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from rich.tree import Tree

from p2pmoe.experts.directory import ExpertRecord
from p2pmoe.experts.uid import parse_uid, prefix_of
from p2pmoe.types import PeerId

SHOWN_PEERS: Final = 6
PEER_CHARS: Final = 8


@dataclass
class Branch:
    """What lies below one prefix: longer prefixes, and experts with their records, one for each provider."""

    prefix: str
    branches: dict[int, Branch] = field(default_factory=dict)
    experts: dict[int, list[ExpertRecord]] = field(default_factory=dict)

    @property
    def expert_count(self) -> int:
        return len(self.experts) + sum(branch.expert_count for branch in self.branches.values())

    @property
    def peers(self) -> set[PeerId]:
        """Who provides anything here or below."""
        here = {record.peer_id for records in self.experts.values() for record in records}
        return here.union(*(branch.peers for branch in self.branches.values()))

    def to_json(self) -> dict[str, Any]:
        """Plain values for programs."""
        return {
            "prefix": self.prefix,
            "experts": self.expert_count,
            "peers": len(self.peers),
            "branches": [branch.to_json() for _, branch in sorted(self.branches.items())],
            "uids": {
                f"{self.prefix}{child}": [record.peer_id for record in records]
                for child, records in sorted(self.experts.items())
            },
        }


def make_branches(records: Iterable[ExpertRecord]) -> list[Branch]:
    """The trees of these records, one for each name in front of coordinates."""
    roots: dict[str, Branch] = {}
    for record in records:
        uid = parse_uid(record.uid)
        branch = roots.setdefault(uid.name, Branch(prefix_of(uid.name, ())))
        for depth, coordinate in enumerate(uid.coordinates[:-1], start=1):
            prefix = prefix_of(uid.name, uid.coordinates[:depth])
            branch = branch.branches.setdefault(coordinate, Branch(prefix))
        branch.experts.setdefault(uid.suffix, []).append(record)
    return list(roots.values())


def make_tree(pattern: str, records: Iterable[ExpertRecord]) -> Tree:
    """A line for each prefix with its counts; neighbours with the same providers share one."""
    branches = make_branches(records)
    tree = Tree(f"{pattern}: {_count(sum(branch.expert_count for branch in branches), 'expert')}".replace("[", r"\["))
    for branch in branches:
        _add(tree, branch)
    return tree


def _add(tree: Tree, branch: Branch) -> None:
    node = tree.add(
        f"[bold]{branch.prefix}[/bold]  {_count(branch.expert_count, 'expert')}, {_count(len(branch.peers), 'node')}"
    )
    for _, each in sorted(branch.branches.items()):
        _add(node, each)
    for first, last, peers in _runs(branch):
        uids = f"{branch.prefix}{first}" if first == last else rf"{branch.prefix}\[{first}:{last + 1}]"
        shown = ", ".join(peer[:PEER_CHARS] for peer in peers[:SHOWN_PEERS])
        more = f", … {len(peers)} in all" if len(peers) > SHOWN_PEERS else ""
        node.add(f"{uids}  {shown}{more}")


def _runs(branch: Branch) -> Iterator[tuple[int, int, tuple[PeerId, ...]]]:
    """Neighbouring experts with the same providers: the first, the last, the providers."""
    run: tuple[int, int, tuple[PeerId, ...]] | None = None
    for child, records in sorted(branch.experts.items()):
        peers = tuple(sorted(record.peer_id for record in records))
        if run is not None and run[1] + 1 == child and run[2] == peers:
            run = (run[0], child, peers)
            continue
        if run is not None:
            yield run
        run = (child, child, peers)
    if run is not None:
        yield run


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
