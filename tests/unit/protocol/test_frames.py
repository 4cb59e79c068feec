"""Frames: bytes to values and back, whatever the bytes and however they are cut."""

from __future__ import annotations

import gc
import itertools
import struct
import tracemalloc
from typing import Any

import pytest
import torch
from frame_kit import BAD_HEADERS, GOOD, call_bytes, raw_frame
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_kit import same_bits

from p2pmoe.errors import DecodeError, EncodeError, P2PMoEError
from p2pmoe.protocol.frames import (
    PREFIX,
    Frame,
    FrameLimits,
    FrameReader,
    FrameReceived,
    FrameRefused,
    HeaderReceived,
    describe_tensor,
    describe_tensors,
    encode_frame,
    make_room,
    tensor_memory,
)
from p2pmoe.protocol.messages import (
    RequestHeader,
    RequestParameters,
    ResponseHeader,
    request_decoder,
    response_decoder,
)
from p2pmoe.protocol.schema import DTYPE_TO_DATATYPE

DTYPES = list(DTYPE_TO_DATATYPE)
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]
SMALL = FrameLimits(header_bytes=2048, body_bytes=4096, tensors=4, rank=4)


def read(
    data: bytes,
    cuts: list[int] | None = None,
    limits: FrameLimits = SMALL,
    skip: bool = False,
    straight: bool = False,
) -> list[Any]:
    """Events of a request stream that arrives in pieces; the stream's error stands at the end.

    `straight` writes what belongs to a tensor into its memory, as a socket does that receives there.
    """
    reader = FrameReader(request_decoder, limits)
    events: list[Any] = []
    bounds = [0, *sorted(cuts or []), len(data)]

    def collect() -> None:
        while (event := reader.next_event()) is not None:
            events.append(event)
            if skip and isinstance(event, HeaderReceived):
                reader.skip()

    try:
        for start, end in itertools.pairwise(bounds):
            piece = data[start:end]
            while straight and piece and (room := reader.room()):
                count = min(len(room), len(piece))
                room[:count] = piece[:count]
                reader.filled(count)
                piece = piece[count:]
                collect()
            reader.feed(piece)
            collect()
        reader.feed_eof()
    except DecodeError as error:
        events.append(error)
    return events


def frames_of(events: list[Any]) -> list[Frame[Any]]:
    return [event.frame for event in events if isinstance(event, FrameReceived)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits for integers and floats, NaN and infinities among them; 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


# ------------------------------------------------------------------------------------------------- golden

GOLDEN_CALL = (
    b"\x1a\x01\x00\x00\x0e\x00\x00\x00"
    b'{"id":"00112233445566778899aabbccddeeff","model_name":"ffn.3.17","inputs":['
    b'{"name":"0","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}},'
    b'{"name":"1","datatype":"FP32","shape":[1,3],"parameters":{"binary_data_size":6,"codec":"bf16"}}],'
    b'"parameters":{"pass":"backward"}}'
    b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    b"\x80\x3f\x00\x40\x40\x40"
)
GOLDEN_RESULT = (
    b"\x67\x00\x00\x00\x04\x00\x00\x00"
    b'{"id":"ab","model_name":"nop.0","outputs":[{"name":"0","datatype":"INT32","shape":[1],'
    b'"parameters":{"binary_data_size":4}}]}'
    b"\x01\x02\x00\x00"
)
GOLDEN_ERROR = (
    b'\x49\x00\x00\x00\x00\x00\x00\x00{"id":"ab","model_name":"nop.0","code":429,"message":"full","retry_after_s":1.5}'
)


def golden_header_length(golden: bytes) -> int:
    header, body = PREFIX.unpack_from(golden)
    return header + body + PREFIX.size


def test_the_bytes_of_a_call_are_frozen() -> None:
    encoded = call_bytes(
        torch.tensor([[1.0, -2.0]]),
        torch.tensor([[1.0, 2.0, 3.0]]),
        codecs=["raw", "bf16"],
        id="00112233445566778899aabbccddeeff",
        model_name="ffn.3.17",
        parameters=RequestParameters(direction="backward"),
    )
    assert encoded == PREFIX.pack(len(GOLDEN_CALL) - 8 - 14, 14) + GOLDEN_CALL[8:]
    (frame,) = frames_of(read(encoded))
    assert frame.header.parameters.direction == "backward"
    assert torch.equal(frame.tensors[1], torch.tensor([[1.0, 2.0, 3.0]]))


def test_the_bytes_of_a_result_and_of_an_error_are_frozen() -> None:
    headers, memories = describe_tensors([torch.tensor([513], dtype=torch.int32)])
    result = encode_frame(ResponseHeader(id="ab", model_name="nop.0", outputs=headers), memories)
    assert b"".join(result.buffers) == PREFIX.pack(len(GOLDEN_RESULT) - 12, 4) + GOLDEN_RESULT[8:]
    error = encode_frame(ResponseHeader(id="ab", model_name="nop.0", code=429, message="full", retry_after_s=1.5))
    assert b"".join(error.buffers) == PREFIX.pack(len(GOLDEN_ERROR) - 8, 0) + GOLDEN_ERROR[8:]


def test_the_prefix_is_two_little_endian_uint32() -> None:
    assert PREFIX.pack(1, 2**31) == b"\x01\x00\x00\x00\x00\x00\x00\x80"
    assert PREFIX.size == struct.calcsize("<II") == 8


# --------------------------------------------------------------------------------------------- round trips


@settings(max_examples=150)
@given(st.data())
def test_every_dtype_shape_and_codec_survives_any_chunking(data: st.DataObject) -> None:
    shape_of = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)
    calls, tensors = b"", []
    for index in range(data.draw(st.integers(1, 3))):
        row = []
        for _ in range(data.draw(st.integers(0, 3))):
            dtype = data.draw(st.sampled_from(DTYPES))
            row.append(random_tensor(dtype, data.draw(shape_of), data.draw(st.integers(0, 999))))
        calls += call_bytes(*row, id=str(index), model_name="ffn.0")
        tensors.append(row)
    cuts = data.draw(st.lists(st.integers(0, len(calls)), max_size=12))
    received = frames_of(read(calls, cuts, FrameLimits(), straight=data.draw(st.booleans())))
    assert [frame.header.id for frame in received] == [str(index) for index in range(len(tensors))]
    for frame, row in zip(received, tensors, strict=True):
        assert len(frame.tensors) == len(row)
        assert all(map(same_bits, frame.tensors, row))


@pytest.mark.parametrize("cut_everywhere", [True, False])
def test_one_byte_at_a_time_is_as_good_as_all_at_once(cut_everywhere: bool) -> None:
    sent = [torch.arange(6.0).view(2, 3), torch.tensor([[True], [False]])]
    data = call_bytes(*sent, id="a") + call_bytes(id="empty") + call_bytes(torch.zeros(0, 3), id="no rows")
    events = read(data, list(range(len(data))) if cut_everywhere else None)
    received = frames_of(events)
    assert [frame.header.id for frame in received] == ["a", "empty", "no rows"]
    assert all(map(same_bits, received[0].tensors, sent))
    assert received[2].tensors[0].shape == (0, 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_a_cast_codec_rounds_once_and_comes_back_in_the_tensors_own_dtype(dtype: torch.dtype, codec: str) -> None:
    wire = {"fp16": torch.float16, "bf16": torch.bfloat16}[codec]
    tensor = torch.randn(3, 5).to(dtype)
    data = call_bytes(tensor, codecs=[codec])
    (frame,) = frames_of(read(data))
    assert same_bits(frame.tensors[0], tensor.to(wire).to(dtype))
    assert frame.header.inputs[0].parameters.binary_data_size == 30


def test_non_contiguous_and_strange_layouts_are_sent_by_value() -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    views = [base.transpose(0, 2), base[:, ::2], base[:1].expand(3, 3, 4), base[..., 1], torch.zeros(()).expand(2, 2)]
    for view in views:
        (frame,) = frames_of(read(call_bytes(view), limits=FrameLimits()))
        assert torch.equal(frame.tensors[0], view)
        assert frame.tensors[0].is_contiguous()


def test_lazily_negated_and_parameter_tensors_are_sent_by_value() -> None:
    imaginary = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert imaginary.is_neg()
    (frame,) = frames_of(read(call_bytes(imaginary, torch.nn.Parameter(torch.ones(2)))))
    assert frame.tensors[0].tolist() == [-2.0, 4.0]
    assert frame.tensors[1].tolist() == [1.0, 1.0]


def test_encoding_a_contiguous_tensor_copies_nothing() -> None:
    tensor = torch.zeros(4, 4)
    _, memory = describe_tensor("0", tensor)
    tensor[0, 0] = 1.0
    assert bytes(memory[:4]) == struct.pack("<f", 1.0)
    frame = encode_frame(RequestHeader(), [tensor_memory(tensor)])
    assert [len(buffer) for buffer in frame.buffers[1:]] == [64]


def test_received_tensors_do_not_share_the_chunk() -> None:
    data = bytearray(call_bytes(torch.ones(4)))
    reader = FrameReader(request_decoder, SMALL)
    reader.feed(data)  # type: ignore[arg-type]
    reader.next_event()
    event = reader.next_event()
    assert isinstance(event, FrameReceived)
    data[-4:] = b"\xff\xff\xff\xff"
    event.frame.tensors[0].add_(1)  # writable, aligned memory of its own
    assert event.frame.tensors[0].tolist() == [2.0] * 4


# ------------------------------------------------------------------------------------- our own bad values


@pytest.mark.parametrize(
    ("tensor", "codec"),
    [
        (torch.zeros(2, dtype=torch.complex64), "raw"),
        (torch.zeros(2), "zip"),
        (torch.zeros(2).to_sparse(), "raw"),
        (torch.zeros(2, dtype=torch.int64), "fp16"),
        (torch.zeros(2, device="meta"), "raw"),
    ],
)
def test_what_cannot_travel_is_a_local_error(tensor: torch.Tensor, codec: str) -> None:
    with pytest.raises(EncodeError, match="0"):
        describe_tensor("0", tensor, codec)


# ------------------------------------------------------------------------------------------ foreign bytes


@pytest.mark.parametrize("codec", ["raw", "fp16"])
def test_elements_are_limited_apart_from_bytes(codec: str) -> None:
    limits = FrameLimits(elements=15)
    data = call_bytes(torch.ones(3, 5), codecs=[codec]) + call_bytes(torch.ones(4, 4), codecs=[codec], id="over")
    first, refused = [event for event in read(data, limits=limits) if not isinstance(event, HeaderReceived)]
    assert isinstance(first, FrameReceived)
    assert isinstance(refused, FrameRefused)
    assert refused.call_id == "over"
    assert refused.error.code == 413
    assert "16 elements are over the limit of 15" in str(refused.error)


@pytest.mark.parametrize("name", BAD_HEADERS)
@pytest.mark.parametrize("every", [1, 7, 10**6])
def test_a_bad_header_spoils_its_own_call_only(name: str, every: int) -> None:
    data = GOOD + BAD_HEADERS[name] + GOOD
    events = read(data, list(range(0, len(data), every)))
    refused = [event for event in events if isinstance(event, FrameRefused)]
    assert len(refused) == 1, events
    assert isinstance(refused[0].error, DecodeError)
    assert refused[0].error.code in (400, 413)
    assert [frame.header.id for frame in frames_of(events)] == ["good", "good"]


def test_a_refused_call_that_could_be_read_is_named() -> None:
    (event,) = read(BAD_HEADERS["unknown datatype"])
    assert event.call_id == "bad"
    assert "FP8" in str(event.error)
    assert "FP32" in str(event.error)
    (event,) = read(BAD_HEADERS["body over the limit"])
    assert (event.call_id, event.error.code) == ("bad", 413)


@pytest.mark.parametrize("length", [0, 2049, 2**31, 2**32 - 1])
def test_a_bad_length_spoils_the_stream(length: int) -> None:
    events = read(GOOD + PREFIX.pack(length, 0) + b"x" * 64)
    assert [type(event) for event in events] == [HeaderReceived, FrameReceived, DecodeError]
    assert events[-1].code == (413 if length else 400)


def test_a_truncated_stream_is_an_error_at_every_byte() -> None:
    for end in range(len(GOOD)):
        events = read(GOOD[:end])
        assert not frames_of(events)
        assert end == 0 or isinstance(events[-1], DecodeError), end
    bad = BAD_HEADERS["body larger than the shape"]
    assert isinstance(read(bad[:-1])[-1], DecodeError), "ended inside a body that is being skipped"


def test_skipped_bodies_are_never_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", None)
    data = call_bytes(torch.ones(8, 8), id="skipped") * 3
    events = read(data, list(range(0, len(data), 13)), skip=True)
    assert [type(event) for event in events] == [HeaderReceived] * 3


def test_bool_bytes_other_than_one_are_true() -> None:
    tensor = {"name": "0", "datatype": "BOOL", "shape": [4], "parameters": {"binary_data_size": 4}}
    (frame,) = frames_of(read(raw_frame({"inputs": [tensor]}, b"\x00\x01\x02\xff")))
    assert frame.tensors[0].dtype is torch.bool
    assert bytes(frame.tensors[0].view(torch.uint8).tolist()) == b"\x00\x01\x01\x01"


def test_a_cast_codec_cannot_grow_a_tensor_beyond_the_limit() -> None:
    """2,048 bytes of fp16 would be 8,192 bytes of FP64."""
    tensor = {"name": "0", "datatype": "FP64", "shape": [1024], "parameters": {"binary_data_size": 2048}}
    tensor["parameters"]["codec"] = "fp16"  # type: ignore[index]
    (event,) = read(raw_frame({"id": "bad", "inputs": [tensor]}, b"\0" * 2048))
    assert isinstance(event, FrameRefused)
    assert event.error.code == 413


class Allocations:
    """Sees what `torch.empty` is asked for."""

    def __init__(self) -> None:
        self.largest = self.total = 0
        self._empty = torch.empty

    def __call__(self, *size: Any, **options: Any) -> torch.Tensor:
        tensor = self._empty(*size, **options)
        self.largest = max(self.largest, tensor.nbytes)
        self.total += tensor.nbytes
        return tensor


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Garbage; good and bad frames; good frames with a few bytes changed, cut out or put in."""
    parts = draw(
        st.lists(
            st.one_of(
                st.binary(max_size=64),
                st.just(GOOD),
                st.sampled_from(list(BAD_HEADERS.values())),
                st.builds(
                    raw_frame,
                    st.binary(max_size=80),
                    st.binary(max_size=80),
                    st.one_of(st.none(), st.integers(0, 2**32 - 1)),
                ),
            ),
            max_size=4,
        )
    )
    data = bytearray(b"".join(parts))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


@settings(max_examples=300)
@given(stream=streams(), cuts=st.lists(st.integers(0, 600), max_size=10), skip=st.booleans(), straight=st.booleans())
def test_any_bytes_give_values_or_a_typed_error(stream: bytes, cuts: list[int], skip: bool, straight: bool) -> None:
    spy = Allocations()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", spy)
        events = read(stream, [min(cut, len(stream)) for cut in cuts], skip=skip, straight=straight)
    assert spy.largest <= SMALL.body_bytes
    headers = sum(isinstance(event, HeaderReceived) for event in events)
    assert spy.total <= headers * SMALL.body_bytes
    for event in events[:-1]:
        assert isinstance(event, (HeaderReceived, FrameReceived, FrameRefused))
    for frame in frames_of(events):
        assert sum(tensor.nbytes for tensor in frame.tensors) <= SMALL.body_bytes
        assert [tuple(tensor.shape) for tensor in frame.tensors] == [each.shape for each in frame.header.inputs]


@settings(max_examples=100)
@given(st.binary(max_size=300), st.integers(1, 50))
def test_the_chunking_never_changes_what_is_read(garbage: bytes, every: int) -> None:
    data = GOOD + garbage
    whole = read(data)
    for straight in (False, True):
        pieces = read(data, list(range(0, len(data), every)), straight=straight)
        assert [type(event) for event in whole] == [type(event) for event in pieces]
        assert [str(event) for event in whole if isinstance(event, P2PMoEError)] == [
            str(event) for event in pieces if isinstance(event, P2PMoEError)
        ]


@pytest.mark.parametrize(
    "data",
    [
        PREFIX.pack(2048, 2**32 - 1) + b"[" * 2048,
        PREFIX.pack(2**32 - 1, 2**32 - 1),
        BAD_HEADERS["huge shape"],
        BAD_HEADERS["huge empty shape"],
        raw_frame({"id": "x"}, body_bytes=2**32 - 1) + b"\0" * 65536,
        raw_frame({"inputs": [{"name": "", "datatype": "", "shape": [2**53] * 60}]}),
    ],
)
def test_hostile_lengths_cost_no_memory(data: bytes) -> None:
    read(GOOD)
    tracemalloc.start()
    try:
        read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * 1024


def test_a_response_reader_holds_the_same_rules() -> None:
    reader = FrameReader(response_decoder, SMALL)
    reader.feed(GOLDEN_RESULT[:3])
    assert reader.next_event() is None
    with pytest.raises(DecodeError, match="truncated"):
        reader.feed_eof()
    assert "unread" in repr(reader)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3, 1000, 200_000])
def test_memory_for_what_is_received_is_aligned_and_the_tensors_own(dtype: torch.dtype, count: int) -> None:
    size = count * dtype.itemsize
    tensor, memory = make_room((count,), dtype, size)
    assert tensor.dtype is (torch.uint8 if dtype is torch.bool else dtype)
    assert (tuple(tensor.shape), memory.nbytes) == ((count,), size)
    if count:
        assert tensor.data_ptr() % 64 == 0
        memory[:] = bytes([1]) * size
        del memory
        gc.collect()
        assert tensor.view(torch.uint8).eq(1).all()
