"""The list of attacks: a name, a theme, the refusal that is expected, and what to do. Knows no node.

An attack is `async def (ctx: Context) -> str`; it returns what it saw in the words of `expects`, where " or " parts
several outcomes that are right. The runner repeats it, a little apart, until its window of time is over; a flood
(`once=True`) paces itself with `ctx.paced`.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attacks.context import Context

Run = Callable[["Context"], Awaitable[str]]

THEMES: tuple[str, ...] = (
    "http_framing",
    "http_sizes",
    "http_limits",
    "paths",
    "oip",
    "replay",
    "gradients",
    "tls",
    "sessions",
    "private",
    "dht_records",
    "dht_datagrams",
    "dht_peers",
    "floods",
)


@dataclass(frozen=True, slots=True)
class Attack:
    """One named attack."""

    name: str
    theme: str
    expects: str
    run: Run
    per_s: float
    """Repetitions in a second, at most."""
    once: bool
    limit_s: float
    """Longer than this and the node is said to hang."""
    needs: str
    """A feature of the target without which the attack makes no sense, e.g. "tls"."""

    @property
    def summary(self) -> str:
        return " ".join((self.run.__doc__ or "").split())

    def is_refused(self, seen: str) -> bool:
        return seen in self.expects.split(" or ")


_attacks: dict[str, Attack] = {}


def attack(
    name: str, *, expects: str, per_s: float = 20.0, once: bool = False, limit_s: float = 10.0, needs: str = ""
) -> Callable[[Run], Run]:
    """Put a function on the list."""

    def register(run: Run) -> Run:
        assert name not in _attacks, f"two attacks are called {name}"
        theme = run.__module__.rpartition(".")[2]
        _attacks[name] = Attack(name, theme, expects, run, per_s, once, limit_s, needs)
        return run

    return register


def all_attacks() -> list[Attack]:
    """Every attack, theme by theme."""
    for theme in THEMES:
        importlib.import_module(f"attacks.{theme}")  # noqa: TID251 - from the table above
    return sorted(_attacks.values(), key=lambda each: THEMES.index(each.theme))
