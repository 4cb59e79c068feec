"""The exchange over HTTP, by a raw client: whatever is sent, it is answered, and the next honest call works."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from frame_kit import BAD_HEADERS, call_bytes, codes, parse, raw_frame, result_frames
from swarm_kit import WAIT_S, Failing, Gate, Peer, World, make_backend, open_world, until

from p2pmoe.config import LimitsConfig
from p2pmoe.protocol.frames import Frame, FrameLimits, FrameReader
from p2pmoe.protocol.messages import RequestParameters, response_decoder
from p2pmoe.server.runtime import Runtime

LIMITS = LimitsConfig(
    max_header_bytes=2048,
    max_body_bytes=4096,
    max_exchange_bytes=16384,
    max_json_bytes=8192,
    max_calls_per_exchange=8,
    max_tensors=4,
    max_rank=4,
    max_inflight_bytes=32768,
    idle_read_timeout_s=0.3,
)
PATH = "/p2pmoe/v1/exchange"
X = torch.ones(2, 4)


@pytest.fixture
def world() -> Iterator[World]:
    backends = [
        make_backend("ffn.0"),
        make_backend("gate.0", Gate()),
        make_backend("bad.0", Failing()),
        make_backend("small.0", max_queue_size=1),
    ]
    with open_world({"alice": backends}, carrier="http", limits=LIMITS) as world:
        yield world


@pytest.fixture
async def alice(world: World) -> AsyncIterator[Peer]:
    """The peer; at the end of every test an honest call must work and nothing may be held."""
    yield world.alice
    gate = world.backend("gate.0").expert
    gate.armed = False
    gate.go.set()
    status, frames = await post(world.alice, call("honest"))
    assert (status, [(f.header.id, f.header.code) for f in frames]) == (200, [("honest", 200)])
    await until(lambda: world.alice.runtime.tasks_waiting == world.alice.runtime.tasks_running == 0)


def call(call_id: str, *tensors: torch.Tensor, uid: str = "ffn.0", **parameters: Any) -> bytes:
    return call_bytes(*(tensors or (X,)), id=call_id, model_name=uid, parameters=RequestParameters(**parameters))


class Raw:
    """An HTTP client made of one socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.frames: FrameReader[Any] = FrameReader(response_decoder, FrameLimits())
        self.ready: list[Frame[Any]] = []
        self.status = 0
        self.headers: dict[str, str] = {}

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def begin(self, path: str = PATH, method: str = "POST", **headers: Any) -> None:
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
        ]
        await self.send("\r\n".join([*lines, "", ""]).encode())

    async def chunk(self, data: bytes) -> None:
        await self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def head(self) -> int:
        line = await self.reader.readline()
        self.status = int(line.split()[1])
        while (line := await self.reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()
        return self.status

    async def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return await self.reader.readexactly(int(self.headers["content-length"]))
        data = b""
        while piece := await self.read_chunk():
            data += piece
        return data

    async def read_chunk(self) -> bytes:
        size = int(await self.reader.readline(), 16)
        data = await self.reader.readexactly(size)
        await self.reader.readline()
        return data

    async def next_frame(self) -> Frame[Any]:
        """The next result of a chunked answer, as soon as it has arrived."""
        while not self.ready:
            self.ready += parse(self.frames, await self.read_chunk())
        return self.ready.pop(0)


@contextlib.asynccontextmanager
async def connect(peer: Peer) -> AsyncIterator[Raw]:
    async with asyncio.timeout(WAIT_S):
        raw = Raw(*await asyncio.open_connection(peer.endpoint.host, peer.endpoint.port))
        try:
            yield raw
        finally:
            raw.writer.close()
            with contextlib.suppress(ConnectionError):
                await raw.writer.wait_closed()


async def post(peer: Peer, data: bytes, path: str = PATH, **headers: Any) -> tuple[int, list[Frame[Any]]]:
    """One whole request; the status and the result frames."""
    async with connect(peer) as raw:
        await raw.begin(path, Content_Length=headers.pop("length", len(data)), Connection="close", **headers)
        await raw.send(data)
        status = await raw.head()
        body = await raw.body()
        if status != 200:
            return status, [json.loads(body)]
        return status, result_frames(body)


# -------------------------------------------------------------------------------------------- good requests


async def test_many_calls_in_one_exchange(alice: Peer) -> None:
    names = [f"call {index}" for index in range(8)]
    status, frames = await post(alice, b"".join(map(call, names)))
    assert status == 200
    assert sorted(codes(frames)) == names
    expected = alice.backends["ffn.0"].expert(X)
    for frame in frames:
        torch.testing.assert_close(frame.tensors[0], expected)


async def test_an_empty_exchange_is_answered_empty(alice: Peer) -> None:
    assert await post(alice, b"") == (200, [])


async def test_results_come_in_completion_order_while_the_request_still_arrives(alice: Peer) -> None:
    """A slow first expert, a fast second, and a third call that is sent after the second's answer was read."""
    gate = alice.backends["gate.0"].expert
    gate.armed = True
    async with connect(alice) as raw:
        await raw.begin(Transfer_Encoding="chunked")
        third = call("third")
        await raw.chunk(call("slow", uid="gate.0") + call("never reaches", torch.ones(2, 5)) + third[:30])
        assert await raw.head() == 200
        assert (await raw.next_frame()).header.id == "never reaches", "the request is not complete"
        await until(gate.begun.is_set)
        await raw.chunk(third[30:])
        gate.go.set()
        assert {(await raw.next_frame()).header.id for _ in range(2)} == {"slow", "third"}
        await raw.send(b"0\r\n\r\n")
        assert await raw.read_chunk() == b""


async def test_a_fast_result_is_not_held_back_by_a_slow_one() -> None:
    """Two devices would answer in any order; on one device what was computed first is sent first."""
    gate = Gate()
    with open_world({"alice": [make_backend("ffn.0"), make_backend("gate.0", gate)]}, carrier="http") as world:
        gate.armed = True
        async with connect(world.alice) as raw:
            await raw.begin(Transfer_Encoding="chunked")
            await raw.chunk(call("fast"))
            assert await raw.head() == 200
            assert (await raw.next_frame()).header.id == "fast"
            await raw.chunk(call("slow", uid="gate.0"))
            await until(gate.begun.is_set)
            gate.go.set()
            assert (await raw.next_frame()).header.id == "slow"
            await raw.send(b"0\r\n\r\n")
            assert await raw.read_chunk() == b""


async def test_connections_are_kept_and_pipelined(alice: Peer) -> None:
    async with connect(alice) as raw:
        for _ in range(3):
            for name in ("a", "b"):
                await raw.begin(Content_Length=len(call(name)))
                await raw.send(call(name))
            for name in ("a", "b"):
                raw.headers.clear()
                assert await raw.head() == 200
                frames = parse(FrameReader(response_decoder, FrameLimits()), await raw.body())
                assert codes(frames) == {name: 200}


async def test_one_byte_at_a_time(alice: Peer) -> None:
    data = call("drip")
    async with connect(alice) as raw:
        await raw.begin(Content_Length=len(data))
        for byte in data:
            await raw.send(bytes([byte]))
        assert await raw.head() == 200
        assert codes(parse(raw.frames, await raw.body())) == {"drip": 200}


# --------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize("bad", BAD_HEADERS)
async def test_a_bad_call_beside_good_ones(alice: Peer, bad: str) -> None:
    status, frames = await post(alice, call("first") + BAD_HEADERS[bad] + call("last"))
    assert status == 200
    assert len(frames) == 3
    assert codes(frames)["first"] == codes(frames)["last"] == 200
    (refused,) = [frame.header for frame in frames if frame.header.id not in ("first", "last")]
    assert refused.code in (400, 404, 413)
    assert refused.message


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (call("bad", uid="no.0"), 404),
        (call("bad", uid=""), 404),
        (call("bad", uid="x" * 200), 404),
        (call("bad", torch.ones(2, 5)), 400),
        (call("bad", X.double()), 400),
        (call("bad", X, X), 400),
        (call("bad", torch.ones(0, 4)), 400),
        (call("bad", direction="sideways"), 400),
        (call("bad", direction="backward"), 400),
        (call("bad", wire_version=2), 426),
        (call("bad", -X, uid="bad.0"), 500),
        (call("bad", timeout_ms=0.0), 504),
    ],
)
async def test_a_refused_call_beside_good_ones(alice: Peer, bad: bytes, code: int) -> None:
    status, frames = await post(alice, call("first") + bad + call("last"))
    assert status == 200
    assert codes(frames) == {"first": 200, "bad": code, "last": 200}


async def test_a_bad_row_in_a_batch_fails_only_that_batch(alice: Peer) -> None:
    status, frames = await post(alice, call("good") + call("bad", -X, uid="bad.0") + call("fine", uid="bad.0"))
    assert status == 200
    assert codes(frames)["good"] == 200
    assert codes(frames)["bad"] == 500


@pytest.mark.parametrize("end", [1, 7, 8, 9, 60, -1])
async def test_a_body_that_ends_early_by_its_own_account(alice: Peer, end: int) -> None:
    data = call("good") + call("cut")[:end]
    status, frames = await post(alice, data)
    assert status == 200
    assert codes(frames)["good"] == 200
    assert [code for name, code in codes(frames).items() if name != "good"] == [400]


async def test_a_connection_that_ends_in_the_middle(alice: Peer) -> None:
    async with connect(alice) as raw:
        await raw.begin(Content_Length=1000)
        await raw.send(call("good") + call("cut")[:20])


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 200, b"\x00" * 200, b"GET / HTTP/1.1\r\n\r\n" * 5, b"\x01\x08\x00\x00" * 9]
)
async def test_garbage(alice: Peer, garbage: bytes) -> None:
    status, frames = await post(alice, call("good") + garbage)
    assert status == 200
    assert codes(frames)["good"] == 200
    assert codes(frames)[""] in (400, 413)


async def test_garbage_instead_of_http(alice: Peer) -> None:
    async with connect(alice) as raw:
        await raw.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n")
        assert await raw.head() == 400


async def test_too_large_by_content_length_is_refused_before_it_is_sent(alice: Peer) -> None:
    async with connect(alice) as raw:
        await raw.begin(Content_Length=LIMITS.max_exchange_bytes + 1)
        assert await raw.head() == 413
        assert "16384" in json.loads(await raw.body())["error"]


async def test_too_large_by_chunks_is_refused_on_the_way(alice: Peer) -> None:
    async with connect(alice) as raw:
        await raw.begin(Transfer_Encoding="chunked")
        await raw.chunk(call("good"))
        assert await raw.head() == 200
        assert (await raw.next_frame()).header.code == 200
        await raw.chunk(raw_frame({"id": "large", "model_name": "ffn.0"}, body_bytes=2**31))
        refused = (await raw.next_frame()).header
        assert (refused.id, refused.code) == ("large", 413), "its header was enough"
        await raw.chunk(b"\0" * 10000)
        await raw.chunk(b"\0" * 10000)
        broken = (await raw.next_frame()).header
        assert (broken.id, broken.code) == ("", 413)
        assert "16384" in broken.message


async def test_too_many_calls(alice: Peer) -> None:
    status, frames = await post(alice, b"".join(call(str(index)) for index in range(12)))
    assert status == 200
    assert codes(frames) == {**{str(index): 200 for index in range(8)}, "": 413}


async def test_duplicate_ids(alice: Peer) -> None:
    _, frames = await post(alice, call("same") * 3)
    assert [(frame.header.id, frame.header.code) for frame in frames] == [("same", 200)] * 3
    backward = call("twice", X, X, direction="backward")
    _, frames = await post(alice, backward * 2)
    assert [frame.header.code for frame in frames] == [200, 200]
    await post(alice, backward)
    assert alice.backends["ffn.0"].update_count == 1


async def test_a_slow_loris_is_given_up(alice: Peer) -> None:
    async with connect(alice) as raw:
        await raw.begin(Content_Length=1000)
        await raw.send(call("good") + call("never")[:20])
        assert await raw.head() == 200
        frames = parse(raw.frames, await raw.body() if "content-length" in raw.headers else await raw.read_chunk())
        while len(frames) < 2:
            frames += parse(raw.frames, await raw.read_chunk())
        assert codes(frames) == {"good": 200, "": 400}
        assert "0.3 s" in next(frame.header.message for frame in frames if frame.header.code == 400)


async def test_a_full_queue_is_429_with_a_time_to_wait(alice: Peer) -> None:
    gate = alice.backends["gate.0"].expert
    gate.armed = True
    blocker = asyncio.create_task(post(alice, call("blocker", uid="gate.0")))
    await until(gate.begun.is_set)
    waiting = asyncio.create_task(post(alice, call("waits", uid="small.0")))
    await until(lambda: alice.runtime.tasks_waiting == 1)
    async with connect(alice) as raw:
        await raw.begin(Transfer_Encoding="chunked")
        await raw.chunk(call("too many", uid="small.0"))
        await raw.send(b"0\r\n\r\n")
        assert await raw.head() == 200
        frames = parse(raw.frames, await raw.body())
    assert codes(frames) == {"too many": 429}
    assert frames[0].header.retry_after_s == 1.0
    body = json.dumps({"inputs": [{"name": "0", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
    async with connect(alice) as raw:
        await raw.begin("/v2/models/small.0/infer", Content_Length=len(body))
        await raw.send(body)
        assert await raw.head() == 429
        assert raw.headers["retry-after"] == "1"
        assert "error" in json.loads(await raw.body())
    gate.go.set()
    assert codes((await blocker)[1]) == {"blocker": 200}
    assert codes((await waiting)[1]) == {"waits": 200}


async def test_bytes_in_flight_over_the_limit_are_429(world: World) -> None:
    gate = world.backend("gate.0").expert
    gate.armed = True
    large = torch.ones(200, 4)  # 3,200 bytes
    exchanges = [
        asyncio.create_task(post(world.alice, b"".join(call(f"{i}.{j}", large, uid="gate.0") for j in range(4))))
        for i in range(4)
    ]
    await until(lambda: any(task.done() for task in exchanges) or world.alice.runtime.tasks_waiting >= 7)
    gate.go.set()
    gate.armed = False
    outcomes = [code for task in exchanges for code in codes((await task)[1]).values()]
    assert set(outcomes) == {200, 429}
    assert outcomes.count(200) >= 8, "one caller alone holds four fifths"
    assert codes((await post(world.alice, call("after")))[1]) == {"after": 200}


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/p2pmoe/v2/exchange", {}),
        ("/p2pmoe/v17/experts", {}),
        ("/p2pmoe/v2/experts/ffn.0", {}),
        (PATH, {"P2PMoE_Wire_Version": "2"}),
        (PATH, {"P2PMoE_Wire_Version": "x" * 500}),
        ("/v2/models/ffn.0/infer", {"P2PMoE_Wire_Version": "2"}),
        ("/p2pmoe/v1/experts", {"P2PMoE_Wire_Version": "0"}),
    ],
)
async def test_another_wire_version_is_426_with_both_versions(alice: Peer, path: str, headers: dict[str, str]) -> None:
    async with connect(alice) as raw:
        method = "GET" if "experts" in path else "POST"
        await raw.begin(path, method, Content_Length=0, **headers)
        assert await raw.head() == 426
        assert raw.headers["upgrade"] == "p2pmoe/1"
        message = json.loads(await raw.body())["error"]
    asked = headers.get("P2PMoE_Wire_Version", path.split("/")[2][1:])
    assert "version 1" in message
    assert asked[:32] in message


async def test_the_wire_version_of_an_infer_call_is_checked_too(alice: Peer) -> None:
    tensor = {"name": "0", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    body = json.dumps({"inputs": [tensor], "parameters": {"wire_version": 2}}).encode()
    status, (answer,) = await post(alice, body, "/v2/models/ffn.0/infer")
    assert status == 426
    assert "version 1" in answer["error"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", PATH, 405),
        ("POST", "/p2pmoe/v1/experts", 405),
        ("GET", "/p2pmoe/v1/experts/no.0", 404),
        ("GET", "/p2pmoe/v1/experts/%00%ff", 404),
        ("GET", "/p2pmoe/v1/experts/..%2f..", 404),
        ("POST", "/p2pmoe/vx/exchange", 404),
        ("GET", "/v2/models/no.0", 404),
    ],
)
async def test_unknown_paths_are_json_errors(alice: Peer, method: str, path: str, status: int) -> None:
    async with connect(alice) as raw:
        await raw.begin(path, method, Content_Length=0)
        assert await raw.head() == status
        assert json.loads(await raw.body())["error"]


async def test_compressed_bodies_are_not_unpacked(alice: Peer) -> None:
    status, (answer,) = await post(alice, b"\x1f\x8b" + b"\0" * 50, Content_Encoding="gzip")
    assert status == 400
    assert "compressed" in answer["error"]  # type: ignore[index]


async def test_too_many_http_headers(alice: Peer) -> None:
    async with connect(alice) as raw:
        await raw.begin(**{f"X{index}": "y" * 1000 for index in range(300)})
        assert await raw.head() in (400, 431)


# --------------------------------------------------------------------------------------- callers who leave


async def test_a_caller_who_leaves_cancels_its_queued_work(alice: Peer) -> None:
    gate = alice.backends["gate.0"].expert
    gate.armed = True
    blocker = asyncio.create_task(post(alice, call("blocker", uid="gate.0")))
    await until(gate.begun.is_set)
    async with connect(alice) as raw:
        data = call("forward") + call("backward", X, X, direction="backward")
        await raw.begin(Content_Length=len(data))
        await raw.send(data)
        await until(lambda: alice.runtime.tasks_waiting == 2)
    forward, backward = alice.backends["ffn.0"].get_pools()
    await until(lambda: forward.oldest() is None and backward.oldest() is None)
    gate.go.set()
    await blocker
    assert alice.backends["ffn.0"].update_count == 0
    _, frames = await post(alice, call("backward", X, X, direction="backward"))
    assert codes(frames) == {"backward": 200}
    assert alice.backends["ffn.0"].update_count == 1, "it left no trace"


async def test_what_a_device_has_taken_is_applied_once_and_its_answer_kept(alice: Peer) -> None:
    gate = alice.backends["gate.0"].expert
    gate.armed = True
    once = call("once", X, X, uid="gate.0", direction="backward")
    async with connect(alice) as raw:
        await raw.begin(Content_Length=len(once))
        await raw.send(once)
        await until(gate.begun.is_set)
    again = asyncio.create_task(post(alice, once))
    gate.go.set()
    assert codes((await again)[1]) == {"once": 200}
    assert codes((await post(alice, once))[1]) == {"once": 200}
    assert alice.backends["gate.0"].update_count == 1


async def test_a_caller_who_leaves_in_mid_request_leaves_no_task_behind(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The call that was already queued is cancelled; nobody must start to write its result."""
    gate = world.backend("gate.0").expert
    gate.armed = True
    blocker = asyncio.create_task(post(world.alice, call("blocker", uid="gate.0")))
    await until(gate.begun.is_set)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            async with connect(world.alice) as raw:
                await raw.begin(Transfer_Encoding="chunked")
                await raw.chunk(call("queued") + call("half")[:30])
                await until(lambda: world.alice.runtime.tasks_waiting == 1)
            await until(lambda: world.backend("ffn.0").forward_pool.oldest() is None)
        gate.go.set()
        await blocker
        await post(world.alice, call("after"))
        gc.collect()
    assert not caplog.records, caplog.text


async def test_a_draining_node_refuses_with_503(world: World) -> None:
    world.alice.handlers.drain()
    status, frames = await post(world.alice, call("late"))
    assert (status, codes(frames)) == (200, {"late": 503})
    assert "another provider" in frames[0].header.message
    body = json.dumps({"inputs": [{"name": "0", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
    async with connect(world.alice) as raw:
        await raw.begin("/v2/models/ffn.0/infer", Content_Length=len(body))
        await raw.send(body)
        assert await raw.head() == 503
        assert int(raw.headers["retry-after"]) >= 1
    for path in ("/v2/health/ready", "/v2/models/ffn.0/ready"):
        async with connect(world.alice) as raw:
            await raw.begin(path, "GET")
            assert await raw.head() == 503
    async with connect(world.alice) as raw:
        await raw.begin("/v2/health/live", "GET")
        assert await raw.head() == 200


async def test_an_expert_whose_device_has_stopped_is_not_ready(alice: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "alive", False)
    for path in ("/v2/models/ffn.0/ready", "/v2/models/ffn.0/versions/1/ready", "/v2/health/ready"):
        async with connect(alice) as raw:
            await raw.begin(path, "GET")
            assert await raw.head() == 503, path


async def test_metrics_are_served(alice: Peer) -> None:
    await post(alice, call("a"))
    async with connect(alice) as raw:
        await raw.begin("/metrics", "GET")
        assert await raw.head() == 200
        assert raw.headers["content-type"].startswith("text/plain")
