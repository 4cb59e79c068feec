"""What one checkpoint is: a JSON document and a safetensors file beside it, and how both are called. No I/O, no torch.

Names: `expert-ffn.3.17@000000000042.json` and `.safetensors`. Capital letters are written `+f`, for file systems that
know none; the text in front keeps names such as `con.1` off Windows' devices; the number grows by one for each
checkpoint of a uid and is never used again. The document holds the digest of the tensors' file and, around itself, its
own: {"sha256": digest of the bytes of "checkpoint", "checkpoint": {…}}.
"""

from __future__ import annotations

import hashlib
import re
import time
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from p2pmoe.errors import DecodeError, StateError
from p2pmoe.experts.uid import is_valid_uid
from p2pmoe.protocol.depth import check_json_depth

FORMAT: Final = 1
"""A reader refuses a larger one in words."""
MAX_DOCUMENT_BYTES: Final = 32 * 1024 * 1024
"""A longer document is none; it is not read to its end."""
MAX_SEQUENCE: Final = 10**12 - 1
_DEPTH: Final = 64
_NAME_RE: Final = re.compile(r"expert-([a-z0-9_+.-]{3,255})@([0-9]{12})\.(json|safetensors)", re.ASCII)

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]
Incarnation = Annotated[str, Meta(pattern="^[0-9a-f]{32}\\Z")]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Sequence = Annotated[int, Meta(ge=1, le=MAX_SEQUENCE)]


class TensorFile(msgspec.Struct, frozen=True):
    """The file beside the document."""

    nbytes: Count
    sha256: Digest


class Made(msgspec.Struct, frozen=True):
    """What the expert was made as; an expert made as anything else is another one."""

    module: str
    """The class of the module."""
    schema_digest: str
    layout: dict[str, str]
    """Parameters and buffers by name as they were made: `float32[64, 16]`."""
    optimizer: str
    """The class of the optimizer."""
    trained: list[list[str]]
    """The parameters of each of its groups by name, in its order."""
    kind: str | None = None
    """`[experts] kind`, where a config made it, and what follows."""
    hidden_dim: int | None = None
    options: dict[str, Any] = {}


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The document. Unknown keys are ignored, so that a newer version of the same format can be read."""

    format: int = FORMAT
    uid: str
    sequence: Sequence
    swarm: str
    incarnation: Incarnation
    updates: Count
    schedule_step: Count | None = None
    saved_at: float
    """Unix seconds."""
    wire_version: int
    made: Made
    state: dict[str, Any]
    """What is no tensor: see `expert_state.py`."""
    applied: list[tuple[str, float]] = []
    """Ids of the newest backward calls that these parameters have seen, and how many seconds before `saved_at`."""
    tensors: TensorFile


class _Envelope(msgspec.Struct):
    sha256: Digest
    checkpoint: msgspec.Raw


class _Format(msgspec.Struct):
    format: int


_envelopes: Final = msgspec.json.Decoder(_Envelope)
_formats: Final = msgspec.json.Decoder(_Format)
_checkpoints: Final = msgspec.json.Decoder(Checkpoint)


class FileName(NamedTuple):
    """A parsed name of a file."""

    key: str
    """Stands for the uid."""
    sequence: int
    is_document: bool


def key_of(uid: str) -> str:
    """The part of a name that stands for a uid; different uids have different ones on every file system."""
    return re.sub("[A-Z]", lambda match: f"+{match[0].lower()}", uid)


def uid_of(key: str) -> str:
    """The uid that a part of a name stands for."""
    return re.sub(r"\+([a-z])", lambda match: match[1].upper(), key)


def document_name(uid: str, sequence: int) -> str:
    """The name of a checkpoint's document."""
    return f"expert-{key_of(uid)}@{sequence:012d}.json"


def tensors_name(uid: str, sequence: int) -> str:
    """The name of the file with its tensors."""
    return f"expert-{key_of(uid)}@{sequence:012d}.safetensors"


def parse_name(name: str) -> FileName | None:
    """None for whatever is no file of a checkpoint."""
    match = _NAME_RE.fullmatch(name)
    if match is None or not int(match[2]):
        return None
    return FileName(match[1], int(match[2]), match[3] == "json")


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """The bytes of a document. Raises StateError when it would be too long to be read again."""
    inner = msgspec.json.encode(checkpoint)
    content = msgspec.json.encode(_Envelope(hashlib.sha256(inner).hexdigest(), msgspec.Raw(inner)))
    if len(content) > MAX_DOCUMENT_BYTES:
        raise StateError(
            f"{checkpoint.uid}: what is no tensor of it takes {len(content)} bytes, over {MAX_DOCUMENT_BYTES}; keep "
            f"large state in tensors"
        )
    return content


def decode_checkpoint(content: bytes) -> Checkpoint:
    """The document of some bytes. Raises StateError whatever they are."""
    if len(content) > MAX_DOCUMENT_BYTES:
        raise StateError(f"longer than {MAX_DOCUMENT_BYTES} bytes")
    try:
        check_json_depth(content, _DEPTH)
        envelope = _envelopes.decode(content)
        if hashlib.sha256(envelope.checkpoint).hexdigest() != envelope.sha256:
            raise StateError("its content is not what was written: the digest differs")
        written = _formats.decode(envelope.checkpoint).format
        if written != FORMAT:
            raise StateError(
                f"it has format {written}, this version reads format {FORMAT}; use the version that wrote it"
            )
        checkpoint = _checkpoints.decode(envelope.checkpoint)
    except (msgspec.MsgspecError, DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StateError(f"it is no checkpoint: {error}") from error
    if not is_valid_uid(checkpoint.uid):
        raise StateError(f"it names no expert: {checkpoint.uid[:64]!r}")
    return checkpoint


def applied_now(checkpoint: Checkpoint, now: float | None = None) -> list[tuple[str, float]]:
    """Its ids of backward calls with their ages by now; a clock that was put back makes nothing younger."""
    passed = max(0.0, (time.time() if now is None else now) - checkpoint.saved_at)
    return [(call_id, age_s + passed) for call_id, age_s in checkpoint.applied]
