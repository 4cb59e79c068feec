"""Frames: a header and tensor memory, to buffers and back. No socket, no clock, no schema.

    frame    = uint32 header_bytes | uint32 body_bytes | header | body        little-endian
    header   = JSON, see messages.py
    body     = the tensors' bytes, one after the other, in the header's order

Rules:
1. Encoding never joins buffers: tensor memory is handed out as memoryviews.
2. Nothing is allocated for a body before its header was read, checked against the limits, and accepted.
3. The bytes of a tensor are copied once, from the received chunk into the tensor's own (aligned) memory.
4. A bad header spoils its own call only: its lengths are known, so the body is skipped. A bad length prefix
   spoils the stream: nothing after it can be found.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import msgspec
import numpy as np
import torch

from p2pmoe.errors import DecodeError, EncodeError, MemoryRefusedError, is_out_of_memory
from p2pmoe.protocol.depth import MAX_JSON_DEPTH
from p2pmoe.protocol.messages import (
    RequestHeader,
    ResponseHeader,
    TensorHeader,
    TensorParameters,
    decode_header,
    encode_json,
)
from p2pmoe.protocol.schema import DATATYPE_TO_DTYPE, DTYPE_TO_DATATYPE, WIRE_CODECS

assert sys.byteorder == "little", "tensor memory is sent as it lies; a big-endian host would need a byte swap"

Buffer = bytes | bytearray | memoryview
H = TypeVar("H", RequestHeader, ResponseHeader)

PREFIX = struct.Struct("<II")
_SMALL_BYTES = 128 * 1024
_ALIGNMENT = 64  # torch's own, without which a kernel may round otherwise
_NUMPY_DTYPES: dict[torch.dtype, Any] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
}
_MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What one frame may declare."""

    header_bytes: int = 256 * 1024
    body_bytes: int = 256 * 1024 * 1024
    tensors: int = 256
    rank: int = 16
    json_depth: int = MAX_JSON_DEPTH
    elements: int = 2**28
    """Of one tensor."""


# A few of these are made for each call: a frozen dataclass takes five times as long, and is watched for cycles.


class Frame(msgspec.Struct, Generic[H], frozen=True, gc=False):
    """A decoded header with its tensors, on the CPU, in the header's order and dtypes."""

    header: H
    tensors: tuple[torch.Tensor, ...]


class EncodedFrame(msgspec.Struct, frozen=True, gc=False):
    """Buffers that make up one frame on the wire, and their size in bytes."""

    buffers: tuple[Buffer, ...]
    nbytes: int


class HeaderReceived(msgspec.Struct, Generic[H], frozen=True, gc=False):
    """A header was read and its tensors' sizes add up. Call `accept()` or `skip()` on the reader."""

    header: H
    body_bytes: int


class FrameReceived(msgspec.Struct, Generic[H], frozen=True, gc=False):
    """A frame is complete."""

    frame: Frame[H]


class FrameRefused(msgspec.Struct, frozen=True, gc=False):
    """A header was bad in itself; its body is being skipped. `call_id` is empty where it could not be read."""

    call_id: str
    error: DecodeError


@runtime_checkable
class Inspector(Protocol):
    """Looks at headers, and goes on after a frame that is refused."""

    def __call__(self, header: Any, /) -> bool:
        """Whether the body of a frame with this header is wanted."""

    def refuse(self, frame: FrameRefused) -> None:
        """This frame will not come. Raises DecodeError to end the stream."""


# ------------------------------------------------------------------------------------------------ encoding


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor that needs no gradient as a memoryview, without a copy."""
    if not tensor.numel():
        return memoryview(b"")
    if tensor.dtype is torch.bfloat16:  # numpy has none
        tensor = tensor.view(torch.uint16)
    array: Any = tensor.numpy()  # its type does not say that it is a buffer
    return memoryview(array).cast("B")


def describe_tensor(name: str, tensor: torch.Tensor, codec: str = "raw") -> tuple[TensorHeader, memoryview]:
    """Header and memory of one tensor of any device and layout. Raises EncodeError for what cannot travel."""
    datatype = DTYPE_TO_DATATYPE.get(tensor.dtype)
    if datatype is None:
        raise EncodeError(f"tensor {name} has dtype {tensor.dtype}, which has no wire datatype")
    shape = tuple(tensor.shape)
    if codec not in WIRE_CODECS or (codec != "raw" and not tensor.is_floating_point()):
        known = ", ".join(WIRE_CODECS)
        raise EncodeError(f"tensor {name}: unknown codec {codec!r} for {datatype}; use one of {known}")
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise EncodeError(f"tensor {name} is {tensor.layout} on {tensor.device}; only dense tensors can travel")
    wire_dtype = WIRE_CODECS[codec]
    tensor = tensor.detach()
    if wire_dtype is not None:
        tensor = tensor.to(wire_dtype)
    if tensor.device.type != "cpu" or tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.to("cpu").resolve_neg().contiguous()
    memory = tensor_memory(tensor)
    parameters = TensorParameters(binary_data_size=memory.nbytes, codec=None if codec == "raw" else codec)
    return TensorHeader(name=name, datatype=datatype, shape=shape, parameters=parameters), memory


def describe_tensors(
    tensors: Sequence[torch.Tensor], codecs: Sequence[str] | None = None
) -> tuple[tuple[TensorHeader, ...], list[memoryview]]:
    """Headers and memories of a frame's tensors, named "0", "1", … ."""
    if codecs is not None and len(codecs) != len(tensors):
        raise EncodeError(f"there are {len(tensors)} tensors where the schema has {len(codecs)}")
    headers, memories = [], []
    for index, tensor in enumerate(tensors):
        header, memory = describe_tensor(str(index), tensor, codecs[index] if codecs else "raw")
        headers.append(header)
        memories.append(memory)
    return tuple(headers), memories


def encode_frame(header: RequestHeader | ResponseHeader, memories: Iterable[memoryview] = ()) -> EncodedFrame:
    """A frame as buffers for the socket. The memories must be those that the header's tensors describe."""
    raw = encode_json(header)
    bodies = [memory for memory in memories if memory.nbytes]
    body_bytes = sum(memory.nbytes for memory in bodies)
    if len(raw) > _MAX_UINT32 or body_bytes > _MAX_UINT32:
        raise EncodeError(f"a frame of {body_bytes} bytes is over the format's 4 GiB; send fewer rows a call")
    return EncodedFrame((PREFIX.pack(len(raw), body_bytes) + raw, *bodies), PREFIX.size + len(raw) + body_bytes)


# ------------------------------------------------------------------------------------------------ decoding


def wire_size(header: TensorHeader, limits: FrameLimits) -> tuple[torch.dtype, int]:
    """The dtype that travels for a tensor and its exact size in bytes, checked. Raises DecodeError."""
    dtype = DATATYPE_TO_DTYPE.get(header.datatype)
    if dtype is None:
        known = ", ".join(DATATYPE_TO_DTYPE)
        raise DecodeError(f"tensor {header.name!r}: unknown datatype {header.datatype!r}; known: {known}")
    codec = header.parameters.codec
    if codec is None:
        count = math.prod(header.shape)
        size = count * dtype.itemsize
        if 0 < size <= limits.body_bytes and count <= limits.elements and len(header.shape) <= limits.rank:
            return dtype, size  # what nearly every tensor is
    elif codec != "raw":
        if codec not in WIRE_CODECS or not dtype.is_floating_point:
            known = ", ".join(WIRE_CODECS)
            raise DecodeError(f"tensor {header.name!r}: unknown codec {codec!r} for {header.datatype}; known: {known}")
        dtype = WIRE_CODECS[codec] or dtype
    if len(header.shape) > limits.rank:
        raise DecodeError(f"tensor {header.name!r}: rank {len(header.shape)} is over the limit of {limits.rank}")
    count = math.prod(header.shape)
    if count > limits.elements:
        raise DecodeError(
            f"tensor {header.name!r}: {count} elements are over the limit of {limits.elements}; send fewer rows a call",
            code=413,
        )
    size = count * dtype.itemsize
    if size == 0 and math.prod(filter(None, header.shape)) > limits.body_bytes:
        raise DecodeError(
            f"tensor {header.name!r}: shape {list(header.shape)} is over the limit of {limits.body_bytes}"
        )
    grown = decoded_size(header)  # a cast codec's bytes take more memory once they are tensors
    if grown > limits.body_bytes:
        raise DecodeError(
            f"tensor {header.name!r}: {grown} bytes are over the limit of {limits.body_bytes}; send fewer rows a call",
            code=413,
        )
    return dtype, size


def decoded_size(header: TensorHeader) -> int:
    """Bytes of a tensor in the dtype that its header names, which must be known."""
    return math.prod(header.shape) * DATATYPE_TO_DTYPE[header.datatype].itemsize


def make_room(shape: Sequence[int], dtype: torch.dtype, size: int) -> tuple[torch.Tensor, memoryview]:
    """A new tensor whose bytes will be received, and its memory, which is aligned: `size` bytes.

    torch gives up the interpreter's lock to make a tensor, numpy does not: where many threads call, that costs more
    than all the rest that is done for a small frame (docs/benchmarks.md).
    """
    wire_dtype = _NUMPY_DTYPES.get(dtype)
    if wire_dtype is None or not 0 < size <= _SMALL_BYTES:
        # Foreign BOOL bytes may be other than 0 and 1, which torch must never see in a bool tensor.
        tensor = torch.empty(shape, dtype=torch.uint8 if dtype is torch.bool else dtype, device="cpu")
        return tensor, tensor_memory(tensor)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % _ALIGNMENT
    memory: Any = raw  # its type does not say that it is a buffer
    return torch.from_numpy(np.ndarray(shape, wire_dtype, memory, start)), memoryview(memory)[start : start + size]


class TensorSink:
    """Memory for the tensors of one accepted header, filled chunk by chunk; each tensor has aligned memory."""

    def __init__(self, headers: Sequence[TensorHeader], sizes: Sequence[tuple[torch.dtype, int]]) -> None:
        self._headers = headers
        self._tensors: list[torch.Tensor] = []
        self._memories: list[memoryview] = []
        for header, (dtype, size) in zip(headers, sizes, strict=True):
            tensor, memory = make_room(header.shape, dtype, size)
            self._tensors.append(tensor)
            if size:
                self._memories.append(memory)
        if len(self._memories) > 1:
            self._memories.reverse()
        self._offset = 0

    def write(self, data: memoryview) -> int:
        """Copy what fits; the number of bytes taken."""
        taken = 0
        while self._memories and taken < len(data):
            memory = self._memories[-1]
            count = min(len(data) - taken, len(memory) - self._offset)
            if count == len(memory) == len(data):
                memory[:] = data
            else:
                memory[self._offset : self._offset + count] = data[taken : taken + count]
            taken += count
            self.filled(count)
        return taken

    def room(self) -> memoryview:
        """Memory of the tensor that comes next, as far as it is empty; none when all are full."""
        return self._memories[-1][self._offset :] if self._memories else memoryview(b"")

    def filled(self, count: int) -> None:
        """`count` bytes were written to the `room`."""
        self._offset += count
        if self._offset == len(self._memories[-1]):
            self._memories.pop()
            self._offset = 0

    @property
    def full(self) -> bool:
        return not self._memories

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors in the dtypes that the headers name."""
        return tuple(
            tensor if tensor.dtype is DATATYPE_TO_DTYPE[header.datatype] else _from_wire(tensor, header.datatype)
            for tensor, header in zip(self._tensors, self._headers, strict=True)
        )


def _from_wire(tensor: torch.Tensor, datatype: str) -> torch.Tensor:
    return tensor.ne(0) if datatype == "BOOL" else tensor.to(DATATYPE_TO_DTYPE[datatype])


class FrameReader(Generic[H]):
    """Turns received chunks into events. Synchronous; the owner of the socket feeds it and asks `next_event`.

        for chunk in chunks:
            reader.feed(chunk)
            while (event := reader.next_event()) is not None: ...
        reader.feed_eof()

    After `HeaderReceived` the owner may call `skip()`; otherwise the body is read into fresh tensors.
    """

    def __init__(self, decoder: msgspec.json.Decoder[H], limits: FrameLimits) -> None:
        self._decoder: msgspec.json.Decoder[H] = decoder
        self._limits = limits
        self._chunk = memoryview(b"")
        self._carry = bytearray()  # a prefix or header that began in an earlier chunk
        self._lengths: tuple[int, int] | None = None
        self._header: H | None = None
        self._sizes: list[tuple[torch.dtype, int]] = []
        self._sink: TensorSink | None = None
        self._skip_bytes = 0

    def __repr__(self) -> str:
        return f"<FrameReader: {len(self._chunk)} bytes unread, {self._skip_bytes} to skip>"

    def feed(self, data: Buffer) -> None:
        """Hand over a received chunk. The previous one must have been used up (`next_event` gave None)."""
        assert not self._chunk, "feed() before the previous chunk was used up"
        self._chunk = memoryview(data)

    def room(self) -> memoryview:
        """Where the next bytes belong when they are those of a tensor, else nothing.

        Whoever can receive straight into memory writes there and says how much it was with `filled`, in the place of
        `feed`. Both once `next_event` gave None.
        """
        return self._sink.room() if self._sink is not None else memoryview(b"")

    def filled(self, count: int) -> None:
        """`count` bytes, more than none, were written to the `room`."""
        assert self._sink is not None and not self._chunk
        self._sink.filled(count)

    def feed_eof(self) -> None:
        """The stream ended. Raises DecodeError when it ended inside a frame."""
        if self._carry or self._lengths is not None or self._header is not None or self._skip_bytes:
            raise DecodeError("the stream ended inside a frame; the body was truncated")

    def next_event(self) -> HeaderReceived[H] | FrameReceived[H] | FrameRefused | None:
        """The next event, or None when more data is needed.

        Raises:
            DecodeError: the stream is spoilt.
            MemoryRefusedError: there is no memory for the accepted frame; it is skipped, those behind it are read.
        """
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(self._chunk))
            self._chunk = self._chunk[skipped:]
            self._skip_bytes -= skipped
            if self._skip_bytes:
                return None
        if self._header is not None:
            return self._next_of_body(self._header)
        return self._next_header()

    def accepted_frames(self, inspect: Callable[[H], bool]) -> Iterator[Frame[H]]:
        """Frames that the fed chunk completes, of those whose header `inspect` accepts. Raises DecodeError.

        A frame that is wrong in itself, or over a limit of ours, need not spoil those behind it: an `Inspector` is told
        of it, and its body is skipped.
        """
        while (event := self.next_event()) is not None:
            if isinstance(event, FrameReceived):
                yield event.frame
            elif isinstance(event, FrameRefused):
                if not event.call_id or not isinstance(inspect, Inspector):
                    raise event.error
                inspect.refuse(event)
            elif not inspect(event.header):
                self.skip()

    def skip(self) -> None:
        """Do not keep the body of the header that was just received."""
        assert self._header is not None and self._lengths is not None and self._sink is None
        self._skip_bytes = self._lengths[1]
        self._header = self._lengths = None

    # -- private

    def _take(self, count: int) -> bytes | bytearray | memoryview | None:
        """`count` contiguous bytes, or None when they have not all arrived."""
        if not self._carry and len(self._chunk) >= count:
            taken, self._chunk = self._chunk[:count], self._chunk[count:]
            return taken
        missing = count - len(self._carry)
        self._carry += self._chunk[:missing]
        self._chunk = self._chunk[missing:]
        if len(self._carry) < count:
            return None
        whole, self._carry = self._carry, bytearray()
        return whole

    def _next_header(self) -> HeaderReceived[H] | FrameRefused | None:
        if self._lengths is None:
            prefix = self._take(PREFIX.size)
            if prefix is None:
                return None
            header_bytes, body_bytes = PREFIX.unpack(prefix)
            if not 0 < header_bytes <= self._limits.header_bytes:
                raise DecodeError(
                    f"a frame declares a header of {header_bytes} bytes; allowed are 1 to {self._limits.header_bytes}",
                    code=413 if header_bytes else 400,
                    is_proof=not header_bytes,  # too long a one is over a limit of our own
                )
            self._lengths = header_bytes, body_bytes
        raw = self._take(self._lengths[0])
        if raw is None:
            return None
        return self._check_header(raw, self._lengths[1])

    def _check_header(self, raw: Buffer, body_bytes: int) -> HeaderReceived[H] | FrameRefused:
        call_id = ""
        try:
            header = decode_header(self._decoder, raw, self._limits.json_depth)
            call_id = header.id
            self._sizes = check_sizes(header.tensors, body_bytes, self._limits)
        except DecodeError as error:
            self._lengths = None
            self._skip_bytes = body_bytes
            return FrameRefused(call_id, error)
        self._header = header
        return HeaderReceived(header, body_bytes)

    def _next_of_body(self, header: H) -> FrameReceived[H] | None:
        if self._sink is None:
            self._sink = self._make_sink(header)
        if self._chunk:
            self._chunk = self._chunk[self._sink.write(self._chunk) :]
        if not self._sink.full:
            return None
        frame = Frame(header, self._sink.tensors())
        self._sink = self._header = self._lengths = None
        return FrameReceived(frame)

    def _make_sink(self, header: H) -> TensorSink:
        try:
            return TensorSink(header.tensors, self._sizes)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            count = sum(size for _, size in self._sizes)
            self.skip()  # the frame is done with; those behind it may be smaller
            raise MemoryRefusedError(f"the system gives no memory for {count} bytes of tensors") from error


def check_sizes(tensors: Sequence[TensorHeader], body_bytes: int, limits: FrameLimits) -> list[tuple[torch.dtype, int]]:
    """The `wire_size` of each of a header's tensors, which must fill the body exactly. Raises DecodeError."""
    if body_bytes > limits.body_bytes:
        raise DecodeError(
            f"a body of {body_bytes} bytes is over the limit of {limits.body_bytes}; send fewer rows a call",
            code=413,
        )
    if len(tensors) > limits.tensors:
        raise DecodeError(f"{len(tensors)} tensors are over the limit of {limits.tensors}")
    total = grown = 0
    sizes = []
    for tensor in tensors:
        dtype, size = wire_size(tensor, limits)
        sizes.append((dtype, size))
        declared = tensor.parameters.binary_data_size
        if declared != size:
            shape = list(tensor.shape)
            raise DecodeError(
                f"tensor {tensor.name!r}: {tensor.datatype}{shape} takes {size} bytes, binary_data_size says {declared}"
            )
        total += size
        grown += size if tensor.parameters.codec is None else decoded_size(tensor)
    if grown > limits.body_bytes:
        raise DecodeError(f"{grown} bytes of tensors are over the limit of {limits.body_bytes}", code=413)
    if total != body_bytes:
        raise DecodeError(f"the tensors take {total} bytes, the frame's body has {body_bytes}")
    return sizes
