"""The digest that names a schema, from its JSON. Loads no torch, so that whoever only looks can check it as well."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec


def digest_of_json(forward_schema: Any, outputs_schema: Any) -> str:
    """16 hexadecimal characters of two schemas as `schema_to_json` writes them, or as a peer sent them.

    Raises ValueError for what is no JSON.
    """
    try:
        text = msgspec.json.encode([forward_schema, outputs_schema], order="sorted")
    except (msgspec.MsgspecError, TypeError, RecursionError) as error:
        raise ValueError(f"no schema as JSON: {error}") from error
    return hashlib.sha256(b"p2pmoe-schema-1\0" + text).hexdigest()[:16]
