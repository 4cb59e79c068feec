"""The Open Inference Protocol (KServe v2, HTTP/REST, with the binary tensor data extension).

The client below is written from the public specification alone: it knows JSON, HTTP and `struct`, nothing of p2pmoe.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from swarm_kit import Failing, Peer, make_backend, open_world
from torch import nn

from p2pmoe import BatchTensorProto as P
from p2pmoe.config import LimitsConfig

# ------------------------------------------------------------------------- a client from the specification

FORMATS = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
DTYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}


class Client:
    def __init__(self, host: str, port: int) -> None:
        self.connection = http.client.HTTPConnection(host, port, timeout=10)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        self.connection.request(method, path, body, headers or {})
        response = self.connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def get(self, path: str) -> tuple[int, Any]:
        status, _, body = self.request("GET", path)
        return status, json.loads(body) if body else None

    def infer(self, model: str, document: Any, *binary: bytes, length: Any = None) -> tuple[int, Any, list[Any]]:
        """Status, JSON, and the binary outputs as lists of numbers, in the order of the answer."""
        text = document if isinstance(document, bytes) else json.dumps(document).encode()
        headers = {"Content-Type": "application/json"}
        if binary or length is not None:
            headers = {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(len(text) if length is None else length),
            }
        status, answered, body = self.request("POST", f"/v2/models/{model}/infer", text + b"".join(binary), headers)
        header_length = int(answered.get("inference-header-content-length", len(body)))
        reply, rest = json.loads(body[:header_length]), body[header_length:]
        outputs = []
        for output in reply.get("outputs", ()):
            size = output.get("parameters", {}).get("binary_data_size")
            if size is not None:
                code = FORMATS[output["datatype"]]
                outputs.append(list(struct.unpack(f"<{size // struct.calcsize(code)}{code}", rest[:size])))
                rest = rest[size:]
        assert not rest
        return status, reply, outputs


def tensor(name: str, shape: Sequence[int], datatype: str, data: Any = None, **parameters: Any) -> dict[str, Any]:
    document = {"name": name, "shape": list(shape), "datatype": datatype}
    if data is not None:
        document["data"] = data
    if parameters:
        document["parameters"] = parameters
    return document


# -------------------------------------------------------------------------------------------------- models


class Echo(nn.Module):
    """Gives back what it gets."""

    def forward(self, *tensors: torch.Tensor) -> Any:
        return tuple(each.clone() for each in tensors)


class Linear(nn.Module):
    """Two inputs, two outputs with known values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> Any:
        return x * self.weight, index + 1


LIMITS = LimitsConfig(max_json_bytes=4096, max_body_bytes=1024, max_tensors=8, idle_read_timeout_s=0.3)


@pytest.fixture
def alice() -> Iterator[Peer]:
    backends = [
        make_backend("linear.0", Linear(), args_schema=(P(2), P(dtype=torch.int64))),
        make_backend("bad.0", Failing()),
        *(
            make_backend(f"echo_{name}.0", Echo(), args_schema=(P(3, dtype=dtype), P(dtype=dtype)))
            for name, dtype in DTYPES.items()
        ),
    ]
    with open_world({"alice": backends}, carrier="http", limits=LIMITS) as world:
        yield world.alice


@pytest.fixture
def client(alice: Peer) -> Iterator[Client]:
    client = Client(alice.endpoint.host, alice.endpoint.port)
    yield client
    status, reply, _ = client.infer("linear.0", {"inputs": GOOD})
    assert (status, reply["outputs"][0]["data"]) == (200, [3, 6]), "an honest call works after each"
    client.connection.close()


GOOD = [tensor("0", (1, 2), "FP32", [1, 2]), tensor("1", (1,), "INT64", [5])]
X = struct.pack("<2f", 1, 2)
I = struct.pack("<q", 5)  # noqa: E741


# --------------------------------------------------------------------------------------- metadata and health


def test_server_metadata_and_health(client: Client) -> None:
    status, document = client.get("/v2")
    assert status == 200
    assert document["name"]
    assert isinstance(document["version"], str)
    assert "binary_tensor_data" in document["extensions"]
    assert client.get("/v2/health/live")[0] == 200
    assert client.get("/v2/health/ready")[0] == 200
    assert client.get("/v2/models/linear.0/ready")[0] == 200


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_model_metadata(client: Client, version: str) -> None:
    status, document = client.get(f"/v2/models/linear.0{version}")
    assert status == 200
    assert document["name"] == "linear.0"
    assert document["versions"] == ["1"]
    assert isinstance(document["platform"], str)
    assert document["inputs"] == [
        {"name": "0", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "1", "datatype": "INT64", "shape": [-1]},
    ]
    assert document["outputs"] == document["inputs"]
    assert client.get(f"/v2/models/linear.0{version}/ready")[0] == 200
    client.connection.request("POST", f"/v2/models/linear.0{version}/infer", json.dumps({"inputs": GOOD}))
    response = client.connection.getresponse()
    assert (response.status, json.loads(response.read())["model_name"]) == (200, "linear.0")


@pytest.mark.parametrize(
    "path", ["/v2/models/no.0", "/v2/models/no.0/ready", "/v2/models/linear.0/versions/2", "/v2/models/", "/v2/nothing"]
)
def test_what_is_not_there_is_404_with_an_error(client: Client, path: str) -> None:
    status, document = client.get(path)
    assert status == 404
    assert isinstance(document["error"], str)


def test_an_unknown_model_cannot_infer(client: Client) -> None:
    status, document, _ = client.infer("no.0", {"inputs": GOOD})
    assert status == 404
    assert "no.0" in document["error"]


# ---------------------------------------------------------------------------------------------------- JSON


def test_json_data(client: Client) -> None:
    status, reply, _ = client.infer("linear.0", {"id": "my id", "inputs": GOOD})
    assert status == 200
    assert reply == {
        "id": "my id",
        "model_name": "linear.0",
        "outputs": [tensor("0", (1, 2), "FP32", [3.0, 6.0]), tensor("1", (1,), "INT64", [6])],
    }


def test_without_an_id_none_is_made_up(client: Client) -> None:
    assert "id" not in client.infer("linear.0", {"inputs": GOOD})[1]


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]], [[1.0, 2], [3e0, 4]], [[[1], [2]], [3, [4]]]])
def test_data_may_be_flat_or_nested(client: Client, data: Any) -> None:
    inputs = [tensor("0", (2, 2), "FP32", data), tensor("1", (2,), "INT64", [5, 6])]
    status, reply, _ = client.infer("linear.0", {"inputs": inputs})
    assert status == 200
    assert reply["outputs"][0]["data"] == [3, 6, 9, 12]
    assert reply["outputs"][0]["shape"] == [2, 2]


def test_inputs_may_come_in_another_order(client: Client) -> None:
    status, reply, _ = client.infer("linear.0", {"inputs": GOOD[::-1]})
    assert (status, [output["data"] for output in reply["outputs"]]) == (200, [[3, 6], [6]])


def test_requested_outputs(client: Client) -> None:
    status, reply, _ = client.infer("linear.0", {"inputs": GOOD, "outputs": [{"name": "1"}]})
    assert (status, [output["name"] for output in reply["outputs"]]) == (200, ["1"])
    status, reply, _ = client.infer("linear.0", {"inputs": GOOD, "outputs": [{"name": "1"}, {"name": "0"}]})
    assert [output["name"] for output in reply["outputs"]] == ["1", "0"]
    status, reply, _ = client.infer("linear.0", {"inputs": GOOD, "outputs": [{"name": "9"}]})
    assert status == 400
    assert "9" in reply["error"]


def test_an_output_is_given_once(client: Client) -> None:
    for outputs in ([{"name": "0"}] * 3, [{"name": "1"}, {"name": "1"}], [{"name": "0"}] * 100):
        status, reply, _ = client.infer("linear.0", {"inputs": GOOD, "outputs": outputs})
        assert status == 400, reply
        assert "once" in reply["error"]


def test_unknown_parameters_are_ignored(client: Client) -> None:
    document = {
        "inputs": [{**GOOD[0], "parameters": {"classification": 3}}, GOOD[1]],
        "parameters": {"sequence_id": 1, "priority": 0, "custom": {"a": [1]}},
        "other": None,
    }
    assert client.infer("linear.0", document)[0] == 200


EXTREMES: dict[str, list[Any]] = {
    "BOOL": [True, False, True],
    "UINT8": [0, 1, 255],
    "UINT16": [0, 1, 65535],
    "UINT32": [0, 1, 2**32 - 1],
    "UINT64": [0, 1, 2**64 - 1],
    "INT8": [-128, 0, 127],
    "INT16": [-(2**15), 0, 2**15 - 1],
    "INT32": [-(2**31), 0, 2**31 - 1],
    "INT64": [-(2**63), 0, 2**63 - 1],
    "FP16": [-65504.0, 0.5, 1.0],
    "BF16": [-2.0, 0.5, 1.0],
    "FP32": [-1.5, 3.0000000e-38, 3.0],
    "FP64": [-1.5, 1e-300, 1e300],
}


@pytest.mark.parametrize("datatype", EXTREMES)
def test_every_datatype_as_json(client: Client, datatype: str) -> None:
    values = EXTREMES[datatype]
    inputs = [tensor("0", (1, 3), datatype, values), tensor("1", (1,), datatype, values[:1])]
    status, reply, _ = client.infer(f"echo_{datatype}.0", {"inputs": inputs})
    assert status == 200, reply
    echoed = reply["outputs"][0]
    assert echoed["datatype"] == datatype
    if datatype == "FP32":
        assert echoed["data"] == pytest.approx(values)
    else:
        assert echoed["data"] == values
    if datatype == "BOOL":
        assert all(isinstance(value, bool) for value in echoed["data"])


@pytest.mark.parametrize("datatype", FORMATS)
def test_every_datatype_as_bytes(client: Client, datatype: str) -> None:
    values = EXTREMES[datatype]
    packed = struct.pack(f"<3{FORMATS[datatype]}", *values)
    one = struct.pack(f"<{FORMATS[datatype]}", values[0])
    inputs = [
        tensor("0", (1, 3), datatype, binary_data_size=len(packed)),
        tensor("1", (1,), datatype, binary_data_size=len(one)),
    ]
    document = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    status, reply, outputs = client.infer(f"echo_{datatype}.0", document, packed, one)
    assert status == 200
    assert [output["parameters"]["binary_data_size"] for output in reply["outputs"]] == [len(packed), len(one)]
    assert "data" not in reply["outputs"][0]
    assert outputs[0] == pytest.approx(values)


# -------------------------------------------------------------------------------------------------- binary


def binary_inputs() -> list[dict[str, Any]]:
    return [tensor("0", (1, 2), "FP32", binary_data_size=8), tensor("1", (1,), "INT64", binary_data_size=8)]


def test_binary_inputs_and_json_outputs(client: Client) -> None:
    status, reply, outputs = client.infer("linear.0", {"inputs": binary_inputs()}, X, I)
    assert (status, reply["outputs"][0]["data"], reply["outputs"][1]["data"], outputs) == (200, [3, 6], [6], [])


def test_mixed_inputs_and_mixed_outputs(client: Client) -> None:
    document = {
        "id": "mixed",
        "inputs": [binary_inputs()[0], GOOD[1]],
        "outputs": [{"name": "0"}, {"name": "1", "parameters": {"binary_data": True}}],
    }
    status, reply, outputs = client.infer("linear.0", document, X)
    assert status == 200
    assert reply["id"] == "mixed"
    assert reply["outputs"][0]["data"] == [3, 6]
    assert outputs == [[6]]


def test_binary_inputs_in_another_order_follow_the_order_of_the_request(client: Client) -> None:
    status, reply, _ = client.infer("linear.0", {"inputs": binary_inputs()[::-1]}, I, X)
    assert (status, reply["outputs"][0]["data"]) == (200, [3, 6])


def test_one_output_may_overrule_the_default(client: Client) -> None:
    document = {
        "inputs": GOOD,
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "0", "parameters": {"binary_data": False}}, {"name": "1"}],
    }
    _, reply, outputs = client.infer("linear.0", document)
    assert (reply["outputs"][0]["data"], outputs) == ([3, 6], [[6]])


def test_a_json_body_may_state_its_length_too(client: Client) -> None:
    document = json.dumps({"inputs": GOOD}).encode()
    assert client.infer("linear.0", document, length=len(document))[0] == 200


def test_bool_bytes_other_than_one_are_true(client: Client) -> None:
    inputs = [tensor("0", (1, 3), "BOOL", binary_data_size=3), tensor("1", (1,), "BOOL", [True])]
    _, reply, _ = client.infer("echo_BOOL.0", {"inputs": inputs}, b"\x00\x02\xff")
    assert reply["outputs"][0]["data"] == [False, True, True]


def test_numbers_that_json_has_not(client: Client) -> None:
    """NaN and infinities cannot be JSON numbers; the answer must stay JSON."""
    packed = struct.pack("<4f", math.nan, math.inf, -math.inf, 1.0)
    inputs = [tensor("0", (1, 3), "FP32", binary_data_size=12), tensor("1", (1,), "FP32", binary_data_size=4)]
    status, reply, _ = client.infer("echo_FP32.0", {"inputs": inputs}, packed)
    assert (status, reply["outputs"][0]["data"]) == (200, [None, None, None])
    document = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    outputs = client.infer("echo_FP32.0", document, packed)[2]
    assert math.isnan(outputs[0][0])
    assert outputs[0][1:] == [math.inf, -math.inf]


# -------------------------------------------------------------------------------------------------- errors

BAD: dict[str, tuple[Any, tuple[bytes, ...], Any, int]] = {
    "no json": (b"{", (), None, 400),
    "an array": ([], (), None, 400),
    "no inputs": ({}, (), None, 400),
    "empty inputs": ({"inputs": []}, (), None, 400),
    "one input too few": ({"inputs": GOOD[:1]}, (), None, 400),
    "one input twice": ({"inputs": [GOOD[0], GOOD[0]]}, (), None, 400),
    "unknown input": ({"inputs": [GOOD[0], tensor("2", (1,), "INT64", [5])]}, (), None, 400),
    "wrong datatype": ({"inputs": [tensor("0", (1, 2), "FP64", [1, 2]), GOOD[1]]}, (), None, 400),
    "unknown datatype": ({"inputs": [tensor("0", (1, 2), "BYTES", ["a", "b"]), GOOD[1]]}, (), None, 400),
    "wrong shape": ({"inputs": [tensor("0", (1, 3), "FP32", [1, 2, 3]), GOOD[1]]}, (), None, 400),
    "different rows": ({"inputs": [tensor("0", (2, 2), "FP32", [1, 2, 3, 4]), GOOD[1]]}, (), None, 400),
    "no rows": ({"inputs": [tensor("0", (0, 2), "FP32", []), tensor("1", (0,), "INT64", [])]}, (), None, 400),
    "too few values": ({"inputs": [tensor("0", (1, 2), "FP32", [1]), GOOD[1]]}, (), None, 400),
    "too many values": ({"inputs": [tensor("0", (1, 2), "FP32", [1, 2, 3]), GOOD[1]]}, (), None, 400),
    "text as number": ({"inputs": [tensor("0", (1, 2), "FP32", ["1", "2"]), GOOD[1]]}, (), None, 400),
    "null as number": ({"inputs": [tensor("0", (1, 2), "FP32", [None, 1]), GOOD[1]]}, (), None, 400),
    "true as number": ({"inputs": [tensor("0", (1, 2), "FP32", [True, 1]), GOOD[1]]}, (), None, 400),
    "fraction as integer": ({"inputs": [GOOD[0], tensor("1", (1,), "INT64", [5.5])]}, (), None, 400),
    "integer out of range": ({"inputs": [GOOD[0], tensor("1", (1,), "INT64", [2**63])]}, (), None, 400),
    "data is no array": ({"inputs": [tensor("0", (1, 2), "FP32", {"a": 1}), GOOD[1]]}, (), None, 400),
    "no data at all": ({"inputs": [tensor("0", (1, 2), "FP32"), GOOD[1]]}, (), None, 400),
    "deep data": (
        b'{"inputs":[{"name":"0","shape":[1,2],"datatype":"FP32","data":' + b"[" * 1500 + b"]" * 1500 + b"}]}",
        (),
        None,
        400,
    ),
    "negative shape": ({"inputs": [tensor("0", (-1, 2), "FP32", [1, 2]), GOOD[1]]}, (), None, 400),
    "huge shape": ({"inputs": [tensor("0", (2**40, 2), "FP32", [1, 2]), GOOD[1]]}, (), None, 400),
    "huge rows": (
        {"inputs": [tensor("0", (2**40, 2), "FP32", [1]), tensor("1", (2**40,), "INT64", [1])]},
        (),
        None,
        413,
    ),
    "rank too high": ({"inputs": [tensor("0", [1] * 70, "FP32", [1]), GOOD[1]]}, (), None, 400),
    "wrong binary size": (
        {"inputs": [tensor("0", (1, 2), "FP32", binary_data_size=4), GOOD[1]]},
        (X,),
        None,
        400,
    ),
    "body too short": ({"inputs": binary_inputs()}, (X, I[:-1]), None, 400),
    "body too long": ({"inputs": binary_inputs()}, (X, I, b"\0"), None, 400),
    "no binary where some is declared": ({"inputs": binary_inputs()}, (), None, 400),
    "binary where none is declared": ({"inputs": GOOD}, (X,), None, 400),
    "codec unknown": (
        {"inputs": [tensor("0", (1, 2), "FP32", binary_data_size=8, codec="zip"), GOOD[1]]},
        (X,),
        None,
        400,
    ),
    "length is no number": ({"inputs": GOOD}, (X,), "many", 400),
    "length is negative": ({"inputs": GOOD}, (X,), "-1", 400),
    "length is larger than the body": ({"inputs": GOOD}, (X,), 4000, 400),
    "length is huge": ({"inputs": GOOD}, (X,), 10**14, 413),
    "length cuts the json": ({"inputs": GOOD}, (X,), 20, 400),
    "json too large": (b" " * 5000, (), None, 413),
    "unknown pass": ({"inputs": GOOD, "parameters": {"pass": "sideways"}}, (), None, 400),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_json_errors(client: Client, name: str) -> None:
    document, binary, length, expected = BAD[name]
    status, reply, _ = client.infer("linear.0", document, *binary, length=length)
    assert (status, type(reply["error"])) == (expected, str), reply
    assert reply["error"]


def test_all_tensors_together_are_limited(client: Client) -> None:
    """Each of them is below the limit, both together are not; nothing is allocated for them."""
    rows = 100  # 800 bytes and 800 bytes, the limit is 1,024
    inputs = [
        tensor("0", (rows, 2), "FP32", binary_data_size=8 * rows),
        tensor("1", (rows,), "INT64", binary_data_size=8 * rows),
    ]
    status, reply, _ = client.infer("linear.0", {"inputs": inputs}, X * rows, I * rows)
    assert (status, "1024" in reply["error"]) == (413, True)


def test_a_failing_model_is_500_with_its_reason(client: Client) -> None:
    status, reply, _ = client.infer("bad.0", {"inputs": [tensor("0", (1, 4), "FP32", [-1, 0, 0, 0])]})
    assert status == 500
    assert "dislikes negative numbers" in reply["error"]


def test_what_a_model_gives_against_its_schema_is_500(alice: Peer, client: Client) -> None:
    backend = alice.backends["echo_FP32.0"]
    backend.forward_pool.process_function = lambda *x: (x[0].to(torch.complex64), x[1])
    inputs = [tensor("0", (1, 3), "FP32", [1, 2, 3]), tensor("1", (1,), "FP32", [1])]
    status, reply, _ = client.infer("echo_FP32.0", {"inputs": inputs})
    assert status == 500
    assert "complex64" in reply["error"]


def test_a_request_says_whether_it_trains(client: Client) -> None:
    """`parameters.mode` is our extension too; without it a request evaluates."""
    answers = [
        client.infer("linear.0", {"inputs": GOOD, "parameters": parameters})[:2]
        for parameters in ({}, {"mode": "eval"}, {"mode": "train", "seed": 2**64 - 1})
    ]
    assert [status for status, _ in answers] == [200] * 3
    assert answers[0][1]["outputs"] == answers[1][1]["outputs"] == answers[2][1]["outputs"]
    for parameters, word in (
        ({"mode": "fit"}, "'train' or 'eval'"),
        ({"mode": 1}, "mode"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
    ):
        status, reply, _ = client.infer("linear.0", {"inputs": GOOD, "parameters": parameters})
        assert (status, word in reply["error"]) == (400, True), reply


def test_training_by_the_public_protocol(alice: Peer, client: Client) -> None:
    """`parameters.pass` is our extension; an id makes a repeated call harmless."""
    inputs = [*GOOD, tensor("2", (1, 2), "FP32", [1, 1]), tensor("3", (1,), "INT64", [0])]
    document = {"id": "once", "inputs": inputs, "parameters": {"pass": "backward"}}
    for _ in range(2):
        status, reply, _ = client.infer("linear.0", document)
        assert (status, reply["outputs"][0]["data"]) == (200, [3, 3])
    backend = alice.backends["linear.0"]
    assert backend.update_count == 1
    with torch.no_grad():
        backend.expert.weight.fill_(3.0)


async def test_an_infer_body_that_stops_is_given_up(alice: Peer) -> None:
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(alice.endpoint.host, alice.endpoint.port)
        with contextlib.closing(writer):
            writer.write(b"POST /v2/models/linear.0/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 400 " in head
            assert b"0.3 s" in await reader.readuntil(b"}")
