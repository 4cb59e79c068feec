"""How deep a JSON text is nested, found before it is parsed. Knows nothing of what the text means."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

from p2pmoe.errors import DecodeError

if TYPE_CHECKING:
    import numpy as np

MAX_JSON_DEPTH: Final = 32
_CHUNK_BYTES: Final = 64 * 1024  # numbers of 4 bytes are made of each byte, so little of it at a time


def check_json_depth(text: bytes | bytearray | memoryview, limit: int = MAX_JSON_DEPTH) -> None:
    """Refuse a text with more than `limit` arrays and objects inside one another.

    A text with no more than `limit` opening brackets, which is every ordinary header, costs half a microsecond;
    others some 15 ms for each MB, whatever is in them.

    Raises:
        DecodeError: it is nested deeper.
    """
    raw = bytes(text) if isinstance(text, memoryview) else text
    if raw.count(b"[") + raw.count(b"{") <= limit:
        return
    import numpy as np  # callers that only look experts up do without it

    steps = _steps()
    # Without its escapes a string ends at the next quote. Outside strings a backslash is no JSON anyway.
    raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    in_string, depth = 0, 0
    for start in range(0, len(raw), _CHUNK_BYTES):
        chunk = np.frombuffer(raw, np.uint8, min(_CHUNK_BYTES, len(raw) - start), start)
        quotes = np.cumsum(chunk == ord('"'), dtype=np.int32) + in_string
        depths = np.cumsum(np.where(quotes & 1, 0, steps[chunk]), dtype=np.int32) + depth
        if depths.max() > limit:
            raise DecodeError(
                f"the JSON is nested more than {limit} levels deep; send tensors as binary data or flat", is_proof=True
            )
        in_string, depth = int(quotes[-1]) & 1, int(depths[-1])


@cache
def _steps() -> np.ndarray[Any, np.dtype[np.int8]]:
    """What each byte adds to the depth."""
    import numpy as np

    steps = np.zeros(256, dtype=np.int8)
    steps[list(b"[{")] = 1
    steps[list(b"]}")] = -1
    return steps
