"""The registry of fuzz targets: name -> the module whose `TARGETS` has it. Imports none of them."""

from __future__ import annotations

import importlib
from typing import Final

from fuzzing.target import Target

_HOMES: Final = {
    "request_frames": "frames",
    "response_frames": "frames",
    "infer_bodies": "infer",
    "connections": "connections",
    "records": "records",
    "bundles": "records",
    "datagrams": "datagrams",
    "uids": "texts",
    "node_toml": "texts",
    "environment": "texts",
    "key_files": "files",
    "secrets_files": "files",
    "dht_state": "files",
    "documents": "documents",
    "schemas": "documents",
    "nested": "documents",
    "handshake": "doors",
    "authorizations": "doors",
    "certificates": "doors",
    "delegations": "swarms",
    "delegation_files": "swarms",
    "sealed_datagrams": "swarms",
}
"""A new target: one line here, one `Target` in its module."""

NAMES: Final = tuple(_HOMES)


def load(name: str) -> Target:
    """The target of that name."""
    module = importlib.import_module(f"fuzzing.targets.{_HOMES[name]}")  # noqa: TID251 - from the table above
    targets: dict[str, Target] = {target.name: target for target in module.TARGETS}
    return targets[name]
