"""Settings that cannot work together, told when they are read and not when a call fails. Knows names, no sections.

A rule looks at all settings as plain nested values, and names both keys and what to do. Rules on limits count only
for keys that somebody wrote: whoever lowers one limit need not lower those that it bounds anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final

MAX_TTL_S: Final = 3600.0
"""No node stores a record that lives longer (DHT.md)."""
REFRESH_JITTER: Final = 1.2
"""Experts are declared again after up to this many times `dht.refresh_s`."""

Settings = Mapping[str, Any]
Rule = Callable[[Settings], str | None]


def first_conflict(settings: Settings) -> str | None:
    """What cannot work, whatever wrote it; None when all is well."""
    return next((conflict for rule in _RULES if (conflict := rule(settings))), None)


def first_conflict_of_limits(settings: Settings, written: Mapping[str, Collection[str]]) -> str | None:
    """The same for keys by table that somebody wrote."""
    for table, smaller, larger, why in _NOT_ABOVE:
        values = settings[table]
        if smaller in written.get(table, ()) and values[smaller] > values[larger]:
            return (
                f"{table}.{smaller} = {_number(values[smaller])} is above {table}.{larger} = "
                f"{_number(values[larger])}: {why}; lower the first or raise the second"
            )
    return None


def _lives(settings: Settings) -> str | None:
    ttl_s, refresh_s = settings["dht"]["ttl_s"], settings["dht"]["refresh_s"]
    if ttl_s > MAX_TTL_S:
        return f"dht.ttl_s = {_number(ttl_s)}: no node stores a record for more than {_number(MAX_TTL_S)} s; lower it"
    if refresh_s * REFRESH_JITTER >= ttl_s:
        return (
            f"dht.refresh_s = {_number(refresh_s)} is too long for dht.ttl_s = {_number(ttl_s)}: experts would be gone "
            f"before they are declared again; let ttl_s be three times refresh_s"
        )
    return None


def _batches(settings: Settings) -> str | None:
    batching = settings["batching"]
    smallest, largest = batching["min_batch_size"], batching["max_batch_size"]
    if smallest > largest:
        return (
            f"batching.min_batch_size = {smallest} is above batching.max_batch_size = {largest}: no batch would "
            f"ever be large enough; lower the first or raise the second"
        )
    if smallest > 1 and not batching["max_queue_delay_ms"]:
        return (
            f"batching.min_batch_size = {smallest} with batching.max_queue_delay_ms = 0: a smaller call would wait for "
            f"ever; set the delay, e.g. 5.0"
        )
    return None


def _schedule(settings: Settings) -> str | None:
    optimizer = settings["optimizer"]
    decay, total, warmup = optimizer["decay"], optimizer["total_steps"], optimizer["warmup_steps"]
    if decay != "none" and total is None:
        return f"optimizer.decay = {decay!r} needs optimizer.total_steps: the step at which it has ended"
    if decay != "none" and warmup >= total:
        return (
            f"optimizer.warmup_steps = {warmup} leaves optimizer.total_steps = {total} nothing for "
            f"optimizer.decay = {decay!r}; lower the first or raise the second"
        )
    return None


def _devices(settings: Settings) -> str | None:
    return None if settings["devices"] else "devices = []: experts need one; devices = ['cpu'] always works"


def _access(settings: Settings) -> str | None:
    access = settings["access"]
    if access["allow"] and set(access["allow"]) <= set(access["deny"]):
        return "every peer of access.allow is in access.deny too, so that nobody may call; take one out of access.deny"
    return None


def _files(settings: Settings) -> str | None:
    """One of them would be written over the other, which may be a key."""
    paths: dict[str, str] = {}
    for key, path in _paths(settings):
        other = paths.setdefault(path, key)
        if other != key:
            return f"{other} and {key} are the same file, {path}; give each its own"
    return None


def _paths(settings: Settings, table: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and key != "options":
            yield from _paths(value, f"{table}{key}.")
        elif (key == "path" or key.endswith("_path")) and value is not None:
            yield table + key, value


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_RULES: Final[tuple[Rule, ...]] = (_lives, _batches, _schedule, _devices, _access, _files)
_NOT_ABOVE: Final = (
    ("limits", "max_source_connections", "max_connections", "one source could take all of them"),
    ("limits", "max_source_handshakes_per_s", "max_handshakes_per_s", "one source could take all of them"),
    ("limits", "max_body_bytes", "max_exchange_bytes", "no exchange could carry such a call"),
    ("limits", "max_header_bytes", "max_exchange_bytes", "no exchange could carry such a call"),
)
