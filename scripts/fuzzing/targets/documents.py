"""JSON documents that nodes serve, the schemas in them, and nested values."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import torch

from fuzzing.target import KIB, MIB, Target
from p2pmoe.cli.survey import format_schema
from p2pmoe.client.arguments import check_arguments
from p2pmoe.client.directory import ExpertInfo
from p2pmoe.errors import DecodeError, SchemaError
from p2pmoe.protocol.messages import MAX_DOCUMENT_MEMORY_BYTES, decode_document
from p2pmoe.protocol.nested import nested_compare, nested_flatten, nested_map, nested_pack
from p2pmoe.protocol.schema import BatchTensorProto, schema_digest, schema_from_json, schema_to_json
from p2pmoe.rpc.expert_pages import read_page
from p2pmoe.training.census import _count

from fuzzing.targets.records import ALICE  # isort: skip
from p2pmoe.experts.directory import ExpertRecord
from p2pmoe.types import Endpoint


def read_document(data: bytes) -> str:
    """A document of a node, as `p2pmoe lookup` and the census of a training read it."""
    document = decode_document(data)
    record = ExpertRecord("ffn.0", ALICE.peer_id, Endpoint("192.0.2.1", 1), "00", 1.0, 1.0)
    try:
        count = _count(record, read_page(document).experts)
    except DecodeError:  # another kind of document
        count = _count(record, {})
    shown = ""
    if isinstance(document, dict):
        shown = format_schema({"forward": document.get("forward_schema"), "outputs": document.get("outputs_schema")})
    if not shown.replace("→", "").replace("…", "").isascii() or len(shown) > 4096:
        raise AssertionError(f"a stranger's text is shown: {shown[:80]!r}")
    return f"{type(document).__name__} {count['updates'] is None} {len(shown) > 20}"


def read_schema(data: bytes) -> str:
    """A schema that a provider states under the digest that it announced; its arguments are then checked by it."""
    document = decode_document(data)
    try:
        schemas = [schema_from_json(document.get(side)) for side in ("forward_schema", "outputs_schema")]
        digest = schema_digest(*schemas)  # what a hostile provider would announce
    except (AttributeError, DecodeError):
        digest = "00"
    info = ExpertInfo.from_json(document, expected_digest=digest)
    if schema_from_json(schema_to_json(info.forward_schema)) != info.forward_schema:
        raise AssertionError("a schema that changes when it is passed on")
    info.pack_outputs(range(len(info.outputs)))
    for arguments in ((), (torch.zeros(1, 2),), (1,)):
        try:
            check_arguments("ffn.0", info, arguments, {})
        except SchemaError:
            continue
    return f"{min(len(info.inputs), 4)} {min(len(info.outputs), 4)} {info.takes_plain_args}"


def read_nested(data: bytes) -> str:
    """Nested values: flattened, packed, mapped and compared, nothing is lost."""
    try:
        tree = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return "no json"
    flat = nested_flatten(tree)
    packed = nested_pack(flat, tree)
    if packed != tree or not nested_compare(tree, packed) or nested_map(lambda leaf: leaf, tree) != tree:
        raise AssertionError("another tree after a round trip")
    return f"{type(tree).__name__} {min(len(flat), 4)}"


def _info(forward: Any, outputs: Any) -> bytes:
    document = {
        "uid": "ffn.0", "peer_id": ALICE.peer_id, "updates": 3, "requests": 4,
        "forward_schema": schema_to_json(forward), "outputs_schema": schema_to_json(outputs),
    }  # fmt: skip
    return msgspec.json.encode(document)


def document_seeds() -> dict[str, bytes]:
    plain = _info(((BatchTensorProto(64),), {}), BatchTensorProto(64))
    return {
        "expert": plain,
        "experts": b'{"experts":{"ffn.0":' + plain + b'},"next":"ffn.0"}',
        "live": b'{"live":true}',
    }


def schema_seeds() -> dict[str, bytes]:
    mask = BatchTensorProto(4, dtype=torch.bool)
    return {
        "plain": _info(((BatchTensorProto(2),), {}), BatchTensorProto(2)),
        "nested": _info((([BatchTensorProto(2, codec="bf16"), (mask,)],), {"mask": mask}), [BatchTensorProto()]),
    }


def nested_seeds() -> dict[str, bytes]:
    return {"tree": b'[1,{"b":[2,null],"a":{"c":3}},[[]]]', "leaf": b"7", "dict": b'{"x":1}'}


TARGETS: Final = (
    Target(
        "documents", read_document, (DecodeError,), MAX_DOCUMENT_MEMORY_BYTES, document_seeds,
        mutate="json", max_input_bytes=512 * KIB,
    ),
    Target("schemas", read_schema, (DecodeError,), MIB, schema_seeds, mutate="json", max_input_bytes=16 * KIB),
    Target("nested", read_nested, (SchemaError,), MIB, nested_seeds, mutate="json", max_input_bytes=8 * KIB),
)  # fmt: skip
