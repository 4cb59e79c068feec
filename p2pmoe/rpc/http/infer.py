"""`POST /v2/models/{uid}/infer`: one call as the Open Inference Protocol writes it. Knows a `Service` only.

Source: KServe "Open Inference Protocol v2, HTTP/REST" and the binary tensor data extension: tensors with
`parameters.binary_data_size` follow the JSON as raw bytes, the length of the JSON standing in the header
`Inference-Header-Content-Length`; all others carry row-major (or nested) `data` in the JSON.
"""

from __future__ import annotations

import math

import msgspec
import torch
from aiohttp import hdrs, web

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import BadRequestError, DecodeError, EncodeError, ExpertFailedError, TooLargeError
from p2pmoe.protocol.frames import Frame, FrameLimits, TensorSink, decoded_size, describe_tensor, wire_size
from p2pmoe.protocol.messages import (
    RequestHeader,
    ResponseHeader,
    TensorHeader,
    decode_header,
    encode_json,
    request_decoder,
)
from p2pmoe.rpc.base import Flat, Service
from p2pmoe.rpc.exchange import ByteBudget, check_wire_version
from p2pmoe.rpc.http.pace import PacedBody
from p2pmoe.types import Caller

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"


async def infer(
    request: web.Request,
    caller: Caller,
    service: Service,
    limits: LimitsConfig,
    frame_limits: FrameLimits,
    budget: ByteBudget,
) -> web.Response:
    """Answer one request. Raises CallError or DecodeError for what is refused."""
    body = _Body(request, limits, frame_limits, budget)
    try:
        decoded = decode_header(request_decoder, await body.read_json(), frame_limits.json_depth)
        header = msgspec.structs.replace(decoded, model_name=request.match_info["uid"])
        check_wire_version(header)
        order = _order_of_inputs(header.inputs)
        service.admit(msgspec.structs.replace(header, inputs=tuple(header.inputs[index] for index in order)), caller)
        body.hold(_total_size(header.inputs, body.frame_limits))
        tensors = await body.read_tensors(header.inputs)
        ordered = msgspec.structs.replace(header, inputs=tuple(header.inputs[index] for index in order))
        future = service.submit(Frame(ordered, tuple(tensors[index] for index in order)), caller)
        service.count_wire("in", header.inputs)
        service.flush()
        return _response(header, await future)
    finally:
        budget.give(body.held)


def _total_size(inputs: tuple[TensorHeader, ...], limits: FrameLimits) -> int:
    """Bytes of all tensors. Raises TooLargeError before memory is allocated for any."""
    for tensor in inputs:
        wire_size(tensor, limits)
    total = sum(map(decoded_size, inputs))
    if total > limits.body_bytes:
        raise TooLargeError(f"the inputs take {total} bytes, the limit is {limits.body_bytes}; send fewer rows a call")
    return total


class _Body:
    """The request's body: JSON first, then binary tensors."""

    def __init__(
        self, request: web.Request, limits: LimitsConfig, frame_limits: FrameLimits, budget: ByteBudget
    ) -> None:
        self._body = PacedBody(request.content, limits)
        self._limits = limits
        self.frame_limits = frame_limits
        self._json_bytes = _json_length(request)
        self._rest = b""
        self._budget = budget
        self.held = 0
        """Bytes of the budget that this request has taken."""
        if (request.content_length or 0) > limits.max_json_bytes + limits.max_body_bytes:
            raise TooLargeError(
                f"a body of {request.content_length} bytes is over the limit of {limits.max_body_bytes}"
            )

    def hold(self, count: int) -> None:
        """Take bytes of the budget. Raises OverloadedError when there is no room."""
        self._budget.give(self.held)
        wanted, self.held = self.held + count, 0
        self._budget.take(wanted)  # all at once: what is larger than the whole budget goes when nobody else does
        self.held = wanted

    async def read_json(self) -> memoryview:
        limit = self._limits.max_json_bytes
        if (self._json_bytes or 0) > limit:
            raise TooLargeError(f"JSON of {self._json_bytes} bytes is over the limit of {limit}; send binary tensors")
        text = bytearray()
        while self._json_bytes is None or len(text) < self._json_bytes:
            chunk = await self._body.read()
            if not chunk:
                break
            self.hold(len(chunk))
            text += chunk
            if self._json_bytes is None and len(text) > limit:
                raise TooLargeError(f"JSON is over the limit of {limit} bytes; send binary tensors")
        if self._json_bytes is None:
            return memoryview(text)
        if len(text) < self._json_bytes:
            raise BadRequestError(
                f"the body ends before {JSON_LENGTH_HEADER} ({self._json_bytes} bytes); it was cut off"
            )
        self._rest = bytes(text[self._json_bytes :])
        return memoryview(text)[: self._json_bytes]

    async def read_tensors(self, headers: tuple[TensorHeader, ...]) -> list[torch.Tensor]:
        """Tensors in the order of the request."""
        if len(headers) > self.frame_limits.tensors:
            raise BadRequestError(f"{len(headers)} inputs are over the limit of {self.frame_limits.tensors}")
        binary = [header for header in headers if header.parameters.binary_data_size is not None]
        for header in binary:
            _, size = wire_size(header, self.frame_limits)
            declared = header.parameters.binary_data_size
            if size != declared:
                raise BadRequestError(f"input {header.name!r} takes {size} bytes, binary_data_size says {declared}")
        sink = TensorSink(binary, [wire_size(header, self.frame_limits) for header in binary])
        chunk, taken = self._rest, 0
        while not sink.full:
            taken = sink.write(memoryview(chunk))
            if taken < len(chunk):
                break
            if not sink.full and not (chunk := await self._body.read()):
                raise BadRequestError("the body ends before the last tensor; it was truncated")
        await self._expect_end(len(chunk), taken)
        filled = iter(sink.tensors())
        return [
            next(filled)
            if header.parameters.binary_data_size is not None
            else tensor_from_json(header, self.frame_limits)
            for header in headers
        ]

    async def _expect_end(self, available: int, taken: int) -> None:
        if available > taken or await self._body.read():
            raise BadRequestError("the body goes on after the last tensor; check binary_data_size")


def _json_length(request: web.Request) -> int | None:
    text = request.headers.get(JSON_LENGTH_HEADER)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise BadRequestError(f"{JSON_LENGTH_HEADER} must be a number of bytes, got {text[:32]!r}")
    return int(text)


def _order_of_inputs(inputs: tuple[TensorHeader, ...]) -> list[int]:
    """Where inputs "0", "1", … stand in the request; the public protocol names inputs, it does not count them."""
    positions = {tensor.name: index for index, tensor in enumerate(inputs)}
    order = [positions.get(str(index)) for index in range(len(inputs))]
    if not inputs or None in order:
        names = [tensor.name for tensor in inputs]
        raise BadRequestError(f"inputs must be named '0', '1', … as the model's metadata lists them, got {names[:16]}")
    return [position for position in order if position is not None]


# ------------------------------------------------------------------------------------------- JSON tensors


_PIECE_BYTES = 16 * 1024
_PIECE_VALUES = 8 * 1024
_NO_NUMBERS = (b'"', b"{", b"n")  # a text, an object, null
_float_decoder = msgspec.json.Decoder(list[float])
_int_decoder = msgspec.json.Decoder(list[int])
_bool_decoder = msgspec.json.Decoder(list[bool])


def tensor_from_json(header: TensorHeader, limits: FrameLimits) -> torch.Tensor:
    """A tensor from row-major or nested JSON values. Raises BadRequestError or DecodeError.

    The values are counted before one is decoded, and decoded piece by piece: as Python objects numbers take ten
    times the memory of their text, and empty lists thirty times.
    """
    if header.data is msgspec.UNSET:
        raise BadRequestError(f"input {header.name!r} has neither data nor parameters.binary_data_size")
    if header.parameters.codec not in (None, "raw"):
        raise BadRequestError(f"input {header.name!r}: codec {header.parameters.codec!r} needs binary data")
    dtype, _ = wire_size(header, limits)
    text = bytes(header.data)
    if any(map(text.__contains__, _NO_NUMBERS)):
        raise BadRequestError(
            f"input {header.name!r}: values do not fit {header.datatype}; write numbers or true, false"
        )
    count = math.prod(header.shape)
    # Nested lists hold one comma less than numbers, all together, unless some are empty; then their text says so.
    found = text.count(b",") + 1 if text.strip(b"[], \t\r\n") else 0
    if found != count:
        raise BadRequestError(
            f"input {header.name!r}: shape {list(header.shape)} needs {count} values, data has {found}"
        )
    return _from_pieces(text.translate(None, b"[]"), count, dtype, header).reshape(header.shape)


def _from_pieces(text: bytes, count: int, dtype: torch.dtype, header: TensorHeader) -> torch.Tensor:
    """`text` is numbers with commas between them, those of nested lists without the lists."""
    decoder = _float_decoder if dtype.is_floating_point else _bool_decoder if dtype is torch.bool else _int_decoder
    tensor = torch.empty(count, dtype=dtype, device="cpu")
    start = filled = 0
    try:
        while start < len(text) and count:
            end = text.find(b",", start + _PIECE_BYTES)
            end = len(text) if end < 0 else end
            values = decoder.decode(b"[%b]" % text[start:end])
            tensor[filled : filled + len(values)] = torch.tensor(values, dtype=dtype, device="cpu")
            start, filled = end + 1, filled + len(values)
    except (msgspec.DecodeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise DecodeError(f"input {header.name!r}: data cannot be {header.datatype}: {error}") from error
    if filled != count:
        raise BadRequestError(f"input {header.name!r} needs {count} values, data has {filled}")
    return tensor


# ----------------------------------------------------------------------------------------------- response


def _response(request: RequestHeader, tensors: Flat) -> web.Response:
    wanted = _wanted_outputs(request, len(tensors))
    headers, memories = [], []
    for index, binary in wanted:
        try:
            header, memory = describe_tensor(str(index), tensors[index])
        except EncodeError as error:  # the expert gave something else than its schema says
            raise ExpertFailedError(f"the result cannot be sent: {error}") from error
        if binary:
            memories.append(memory)
        else:
            header = TensorHeader(header.name, header.datatype, header.shape, data=_json_values(tensors[index]))
        headers.append(header)
    text = encode_json(ResponseHeader(id=request.id, model_name=request.model_name, outputs=tuple(headers)))
    if not memories:
        return web.Response(body=text, content_type="application/json")
    return web.Response(
        body=b"".join((text, *memories)),
        headers={hdrs.CONTENT_TYPE: "application/octet-stream", JSON_LENGTH_HEADER: str(len(text))},
    )


def _json_values(tensor: torch.Tensor) -> msgspec.Raw:
    """The numbers as a flat list, written piece by piece, as `tensor_from_json` reads them."""
    pieces = (encode_json(piece.tolist())[1:-1] for piece in tensor.flatten().split(_PIECE_VALUES))
    return msgspec.Raw(b"[%b]" % b",".join(pieces))


def _wanted_outputs(request: RequestHeader, count: int) -> list[tuple[int, bool]]:
    default = request.parameters.binary_data_output is True
    if not request.outputs:
        return [(index, default) for index in range(count)]
    wanted: list[tuple[int, bool]] = []
    for output in request.outputs:
        if output.name not in map(str, range(count)):
            raise BadRequestError(f"there is no output {output.name!r}; the model has '0' to '{count - 1}'")
        binary = output.parameters.binary_data
        wanted.append((int(output.name), default if binary is None else binary))
    if len(dict(wanted)) < len(wanted):
        # A few bytes of request would be megabytes of reply.
        raise BadRequestError(f"an output is asked for twice; the model has {count}, each is given once")
    return wanted
