"""BatchTensorProto and schemas as JSON."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe import BatchTensorProto
from p2pmoe.errors import DecodeError, EncodeError, SchemaError
from p2pmoe.protocol.schema import (
    DTYPE_TO_DATATYPE,
    format_schema,
    schema_digest,
    schema_from_json,
    schema_to_json,
)


def test_the_batch_dimension_is_left_out() -> None:
    proto = BatchTensorProto(3, 4, dtype=torch.float16, requires_grad=True, codec="bf16")
    assert (proto.shape, proto.dtype, proto.requires_grad, proto.codec) == ((3, 4), torch.float16, True, "bf16")
    assert proto.make_zeros(2).shape == proto.make_empty(2).shape == (2, 3, 4)
    assert proto.make_zeros(2).dtype is torch.float16
    assert str(proto) == "FP16[batch, 3, 4]"


def test_the_defaults_are_those_of_the_seed() -> None:
    assert BatchTensorProto(5) == BatchTensorProto(5, dtype=torch.float32, requires_grad=False, codec=None)
    assert BatchTensorProto().make_zeros(3).shape == (3,)


def test_from_tensor_and_hash() -> None:
    proto = BatchTensorProto.from_tensor(torch.zeros(7, 2, dtype=torch.int8))
    assert proto == BatchTensorProto(2, dtype=torch.int8)
    assert len({proto, BatchTensorProto(2, dtype=torch.int8)}) == 1
    with pytest.raises(SchemaError, match="batch dimension"):
        BatchTensorProto.from_tensor(torch.zeros(()))


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((-1,), {}, "sizes"),
        ((2.5,), {}, "sizes"),
        (("3",), {}, "sizes"),
        ((None, -3), {}, "sizes"),
        ((2,), {"dtype": torch.complex64}, "datatype"),
        ((2,), {"codec": "zip"}, "codec"),
        ((2,), {"dtype": torch.int64, "codec": "fp16"}, "codec"),
    ],
)
def test_a_bad_proto_is_refused(shape: tuple[Any, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        BatchTensorProto(*shape, **options)


protos = st.builds(
    lambda shape, dtype, grad: BatchTensorProto(*shape, dtype=dtype, requires_grad=grad),
    st.lists(st.none() | st.integers(0, 9), max_size=4),
    st.sampled_from(list(DTYPE_TO_DATATYPE)),
    st.booleans(),
)
schemas = st.recursive(
    protos,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(schemas)
def test_schemas_survive_json(schema: Any) -> None:
    document = msgspec.json.decode(msgspec.json.encode(schema_to_json(schema)))
    assert schema_from_json(document) == schema
    assert schema_digest(schema_from_json(document), ()) == schema_digest(schema, ())


def test_the_digest_is_frozen_and_does_not_hang_on_the_order_of_keys() -> None:
    first = ((BatchTensorProto(4),), {"a": BatchTensorProto(), "b": BatchTensorProto(2)})
    second = ((BatchTensorProto(4),), {"b": BatchTensorProto(2), "a": BatchTensorProto()})
    assert schema_digest(first, BatchTensorProto(4)) == schema_digest(second, BatchTensorProto(4))
    assert schema_digest(((BatchTensorProto(4),), {}), BatchTensorProto(4)) == "71c361530afcd997"


@pytest.mark.parametrize(
    "other",
    [
        BatchTensorProto(5),
        BatchTensorProto(4, 1),
        BatchTensorProto(4, dtype=torch.float64),
        BatchTensorProto(4, codec="fp16"),
        (BatchTensorProto(4),),
        [BatchTensorProto(4)],
    ],
)
def test_other_schemas_have_other_digests(other: Any) -> None:
    assert schema_digest(other, ()) != schema_digest(BatchTensorProto(4), ())


def test_what_is_no_schema_cannot_be_written() -> None:
    with pytest.raises(EncodeError, match="int"):
        schema_to_json((3,))


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"type": "tensor"},
        {"type": "tensor", "shape": [1], "datatype": "FP8"},
        {"type": "tensor", "shape": [1], "datatype": ["FP32"]},
        {"type": "tensor", "shape": [-1], "datatype": "FP32"},
        {"type": "tensor", "shape": [True], "datatype": "FP32"},
        {"type": "tensor", "shape": [2**60], "datatype": "FP32"},
        {"type": "tensor", "shape": [1] * 65, "datatype": "FP32"},
        {"type": "tensor", "shape": [1], "datatype": "FP32", "codec": "zip"},
        {"type": "tensor", "shape": [1], "datatype": "INT8", "codec": "fp16"},
        {"type": "tensor", "shape": [1], "datatype": "FP32", "codec": ["raw"]},
        {"type": "tuple", "items": {}},
        {"type": "dict", "items": []},
        {"type": "set", "items": []},
        {"type": ["tuple"], "items": []},
    ],
)
def test_a_peers_bad_schema_is_a_decode_error(document: Any) -> None:
    with pytest.raises(DecodeError):
        schema_from_json(document)


def test_a_peers_deep_schema_is_a_decode_error() -> None:
    document: Any = {"type": "tensor", "shape": [], "datatype": "FP32"}
    for _ in range(500):
        document = {"type": "list", "items": [document]}
    with pytest.raises(DecodeError, match="deep"):
        schema_from_json(document)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(["tensor", "tuple", "dict", "FP32"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "items", "shape", "datatype", "codec", "requires_grad"]), inner, max_size=5
            )
        ),
    )
)
def test_any_document_gives_a_schema_or_a_decode_error(document: Any) -> None:
    try:
        schema = schema_from_json(document)
    except DecodeError:
        return
    assert schema_from_json(schema_to_json(schema)) == schema


def test_messages_show_tensors_in_wire_order() -> None:
    schema = ((BatchTensorProto(4),), {"mask": BatchTensorProto(dtype=torch.bool)})
    assert format_schema(schema) == "(FP32[batch, 4], BOOL[batch])"
