"""The JSON headers of the wire format, version 1: typed both ways. Knows nothing of tensor memory or sockets.

Source: Open Inference Protocol (KServe v2) "Inference Request/Response JSON Object" and its binary tensor
data extension. Unknown keys are ignored, as the public protocol asks.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from p2pmoe.errors import CallError, DecodeError, call_error, message_of
from p2pmoe.protocol.depth import MAX_JSON_DEPTH, check_json_depth
from p2pmoe.types import WIRE_VERSION

T = TypeVar("T")
MAX_DOCUMENT_BYTES: Final = 4 * 1024 * 1024
"""JSON text of one document that a peer serves."""
MAX_DOCUMENT_VALUES: Final = 128 * 1024
"""Values in it: `[[],[],…]` takes thirty times the memory of its text."""
MAX_DOCUMENT_MEMORY_BYTES: Final = 16 * 1024 * 1024
"""What a document takes at most once it is read, text included."""
ShortText = Annotated[str, Meta(max_length=256)]
Size = Annotated[int, Meta(ge=0, le=2**53)]


class TensorParameters(msgspec.Struct, omit_defaults=True, frozen=True):
    """`parameters` of one tensor. Without `binary_data_size` its values are JSON, in `data`."""

    binary_data_size: Size | None = None
    codec: ShortText | None = None
    binary_data: bool | None = None


_NO_PARAMETERS = TensorParameters()


class TensorHeader(msgspec.Struct, omit_defaults=True, frozen=True):
    """One tensor: `shape` includes the batch dimension."""

    name: ShortText
    datatype: ShortText
    shape: Annotated[tuple[Size, ...], Meta(max_length=64)]
    parameters: TensorParameters = _NO_PARAMETERS
    data: msgspec.Raw | UnsetType = UNSET


class RequestedOutput(msgspec.Struct, omit_defaults=True, frozen=True):
    """An output that the caller names, and whether it wants it binary."""

    name: ShortText
    parameters: TensorParameters = _NO_PARAMETERS


class RequestParameters(msgspec.Struct, omit_defaults=True, frozen=True, rename={"direction": "pass"}):
    """`parameters` of a request."""

    direction: ShortText = "forward"
    timeout_ms: Annotated[float, Meta(ge=0)] | None = None
    """How long the caller will wait, counted from the call's arrival: expired work never reaches the device."""
    wire_version: int | None = None
    binary_data_output: bool | None = None
    mode: ShortText | None = None
    """"train" or "eval"; see `Manner`. Left out it is "eval", in both passes: they are of the same function."""
    seed: int | None = None
    """What the expert draws with, 0 ≤ seed < 2^64; a backward call repeats that of its forward call."""


_FORWARD = RequestParameters()


class RequestHeader(msgspec.Struct, omit_defaults=True, frozen=True):
    """The header of a call."""

    id: ShortText = ""
    model_name: ShortText = ""
    inputs: tuple[TensorHeader, ...] = ()
    parameters: RequestParameters = _FORWARD
    outputs: tuple[RequestedOutput, ...] = ()

    @property
    def tensors(self) -> tuple[TensorHeader, ...]:
        return self.inputs


class ResponseHeader(msgspec.Struct, omit_defaults=True, frozen=True):
    """The header of a result, or of an error when `code` is not 200."""

    id: ShortText = ""
    model_name: ShortText = ""
    outputs: tuple[TensorHeader, ...] = ()
    parameters: dict[str, Any] = {}
    code: int = 200
    message: str = ""
    retry_after_s: float | None = None

    @property
    def tensors(self) -> tuple[TensorHeader, ...]:
        return self.outputs

    def raise_for_error(self) -> None:
        """Raises the CallError that an error frame stands for."""
        if self.code != 200:
            message = self.message or "the node gave no reason"
            raise call_error(self.code, message, self.retry_after_s)


def error_header(call_id: str, model_name: str, error: CallError | DecodeError) -> ResponseHeader:
    """The error frame that answers one failed call. It can be encoded, whatever the error says."""
    return ResponseHeader(
        id=call_id,
        model_name=model_name,
        code=error.code,
        message=message_of(error),
        retry_after_s=getattr(error, "retry_after_s", None),
    )


def new_call_id() -> str:
    """128 random bits in hexadecimal."""
    return secrets.token_hex(16)


def version_mismatch(theirs: object) -> str:
    """The message of a 426."""
    return f"this side speaks wire version {WIRE_VERSION}, the other asked for {theirs}; upgrade the older of the two"


_encoder = msgspec.json.Encoder()
encode_json = _encoder.encode


request_decoder = msgspec.json.Decoder(RequestHeader)
response_decoder = msgspec.json.Decoder(ResponseHeader)


def decode_header(
    decoder: msgspec.json.Decoder[T], raw: bytes | bytearray | memoryview, max_depth: int = MAX_JSON_DEPTH
) -> T:
    """A header from a peer's bytes. Raises DecodeError whatever the bytes are."""
    check_json_depth(raw, max_depth)
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"the JSON header is malformed: {error}", is_proof=True) from error


def decode_document(raw: bytes | bytearray) -> Any:
    """Plain values from a JSON document that a peer serves. Raises DecodeError whatever the bytes are."""
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise DecodeError(f"a document is longer than {MAX_DOCUMENT_BYTES} bytes", code=413)
    # Each value but the first of its list or object follows a comma; commas in texts are counted too, to no harm.
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_DOCUMENT_VALUES:
        raise DecodeError(f"a document has more than {MAX_DOCUMENT_VALUES} values", code=413)
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"not a JSON document: {error}") from error
