"""The in-memory network that is shipped for tests: scripted failures, slow, cut and lossy links."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from frame_kit import BAD_HEADERS, call_bytes
from swarm_kit import ALICE, BOB, WAIT_S, Gate, World, make_backend, open_world, until

from p2pmoe.errors import BadRequestError, PeerUnreachableError, UnknownExpertError
from p2pmoe.protocol.frames import EncodedFrame, FrameLimits
from p2pmoe.protocol.messages import RequestParameters
from p2pmoe.rpc.memory import Failure, MemoryNetwork, MemoryTransport
from p2pmoe.types import Caller

X = torch.ones(1, 4)


@pytest.fixture
def world() -> Iterator[World]:
    with open_world({"alice": [make_backend("ffn.0"), make_backend("gate.0", Gate())], "bob": []}) as world:
        yield world


def frame(call_id: str, *tensors: torch.Tensor, uid: str = "ffn.0", direction: str = "forward") -> EncodedFrame:
    data = call_bytes(*(tensors or (X,)), id=call_id, model_name=uid, parameters=RequestParameters(direction=direction))
    return EncodedFrame((data,), len(data))


async def exchange(world: World, *frames: EncodedFrame, endpoint: Any = ALICE, **options: Any) -> list[str]:
    """Ids of the results; what the transport raises is raised."""
    received: list[str] = []
    transport = options.get("transport") or MemoryTransport(world.network)
    replies = transport.exchange(endpoint, frames, lambda header: True)
    async with asyncio.timeout(WAIT_S), contextlib.aclosing(replies):
        async for reply in replies:
            received.append(reply.header.id)
            options.get("seen", []).append(reply)
    return received


async def test_calls_are_answered_over_real_bytes(world: World) -> None:
    world.alice.link.chunk_bytes = 7  # type: ignore[union-attr]
    seen: list[Any] = []
    assert sorted(await exchange(world, frame("a"), frame("b", torch.ones(3, 4)), seen=seen)) == ["a", "b"]
    by_id = {reply.header.id: reply for reply in seen}
    assert by_id["b"].tensors[0].shape == (3, 4)
    link = world.network.link(ALICE)
    assert (link.exchanges, link.calls) == (1, 2)
    assert "up, 1 exchanges, 0 running" in repr(link)


async def test_services_see_who_calls(world: World) -> None:
    for name in ("alice", "bob"):
        await exchange(world, frame(name), transport=MemoryTransport(world.network, caller=Caller(name)))
    assert list(world.alice.handlers._quota._accounts) == ["alice", "bob"]


async def test_documents(world: World) -> None:
    transport = MemoryTransport(world.network)
    assert (await transport.get_json(ALICE, "/p2pmoe/v1/experts/ffn.0"))["uid"] == "ffn.0"
    assert list((await transport.get_json(ALICE, "/p2pmoe/v1/experts"))["experts"]) == ["ffn.0", "gate.0"]
    with pytest.raises(UnknownExpertError):
        await transport.get_json(ALICE, "/p2pmoe/v1/experts/no.0")
    with pytest.raises(BadRequestError):
        await transport.get_json(ALICE, "/p2pmoe/v2/experts/ffn.0")
    assert world.network.link(ALICE).exchanges == 0
    assert world.network.link(ALICE).documents == 4
    await transport.close()


async def test_nobody_listens(world: World) -> None:
    with pytest.raises(PeerUnreachableError, match="http://bobby"):
        await exchange(world, frame("a"), endpoint=BOB.__class__("bobby", 1))


@pytest.mark.parametrize(
    ("failure", "computed", "received"),
    [("refuse", 0, []), ("break_request", 1, []), ("break_answer", 2, ["a"]), ("lose_answer", 2, [])],
)
async def test_failures_come_at_their_number(
    world: World, failure: Failure, computed: int, received: list[str]
) -> None:
    backend = world.backend("ffn.0")
    world.network.fail_at(ALICE, 2, failure)
    calls = [frame(name, X, X, direction="backward") for name in "ab"]
    assert len(await exchange(world, frame("x"))) == 1
    seen: list[Any] = []
    with pytest.raises(PeerUnreachableError):
        await exchange(world, *calls, seen=seen)
    assert [reply.header.id for reply in seen] == received
    assert len(await exchange(world, frame("y"))) == 1
    assert backend.update_count == min(computed, 1), "one batch, if any"
    assert world.network.link(ALICE).exchanges == 3


async def test_a_lost_answer_can_be_asked_for_again(world: World) -> None:
    world.network.fail_at(ALICE, 1, "lose_answer")
    call = frame("one", X, X, direction="backward")
    with pytest.raises(PeerUnreachableError):
        await exchange(world, call)
    assert await exchange(world, call) == ["one"]
    assert world.backend("ffn.0").update_count == 1


async def test_cutting_breaks_what_runs_and_what_comes(world: World) -> None:
    gate = world.backend("gate.0").expert
    gate.armed = True
    link = world.network.link(ALICE)
    running = asyncio.create_task(exchange(world, frame("a", uid="gate.0")))
    assert await asyncio.to_thread(gate.begun.wait, WAIT_S)
    await asyncio.to_thread(link.cut)  # from any thread
    with pytest.raises(PeerUnreachableError):
        await running
    with pytest.raises(PeerUnreachableError):
        await exchange(world, frame("b"))
    assert "cut" in repr(link)
    link.restore()
    gate.go.set()
    assert await exchange(world, frame("c")) == ["c"]


async def test_delays_go_through_the_injected_sleep() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    with open_world({"alice": [make_backend("ffn.0")]}, network=MemoryNetwork(sleep=sleep)) as world:
        world.network.link(ALICE).delay_s = 123.0
        assert await exchange(world, frame("a")) == ["a"]
        world.network.link(ALICE).delay_s = 0.0
        assert await exchange(world, frame("b")) == ["b"]
    assert slept == [123.0]


async def test_a_silent_peer_is_silent_until_the_link_is_cut(world: World) -> None:
    link = world.network.link(ALICE)
    link.delay_s = math.inf
    running = asyncio.create_task(exchange(world, frame("a")))
    done, _ = await asyncio.wait([running], timeout=0.05)
    assert not done
    link.cut()
    with pytest.raises(PeerUnreachableError):
        await running


async def test_a_lossy_link_loses_the_same_exchanges_for_the_same_seed() -> None:
    def play(seed: int) -> list[bool]:
        async def run() -> list[bool]:
            with open_world({"alice": [make_backend("ffn.0")]}, network=MemoryNetwork(seed=seed)) as world:
                world.network.link(ALICE).loss = 0.5
                came = []
                for _ in range(30):
                    try:
                        came.append(bool(await exchange(world, frame("a"))))
                    except PeerUnreachableError:
                        came.append(False)
                return came

        return asyncio.run(run())

    first, again, other = [await asyncio.to_thread(play, seed) for seed in (1, 1, 2)]
    assert first == again != other
    assert 3 < sum(first) < 27


async def test_a_service_that_leaves_breaks_its_exchanges(world: World) -> None:
    gate = world.backend("gate.0").expert
    gate.armed = True
    running = asyncio.create_task(exchange(world, frame("a", uid="gate.0")))
    assert await asyncio.to_thread(gate.begun.wait, WAIT_S)
    world.network.unregister(ALICE)
    with pytest.raises(PeerUnreachableError):
        await running
    with pytest.raises(PeerUnreachableError):
        await exchange(world, frame("b"))
    gate.go.set()


async def test_a_caller_who_leaves_cancels_what_is_queued(world: World) -> None:
    gate = world.backend("gate.0").expert
    before = gate.calls
    gate.armed = True
    first = asyncio.create_task(exchange(world, frame("a", uid="gate.0")))
    assert await asyncio.to_thread(gate.begun.wait, WAIT_S)
    second = asyncio.create_task(exchange(world, frame("b", uid="gate.0")))
    await until(lambda: world.alice.runtime.tasks_waiting)
    second.cancel()
    await asyncio.wait([second])
    gate.go.set()
    await first
    gate.armed = False
    await exchange(world, frame("c", uid="gate.0"))
    assert gate.calls - before == 2, "a and c"


@pytest.mark.parametrize("bad", BAD_HEADERS)
async def test_bad_calls_are_answered_as_over_http(world: World, bad: str) -> None:
    seen: list[Any] = []
    broken = EncodedFrame((BAD_HEADERS[bad],), len(BAD_HEADERS[bad]))
    limits = FrameLimits(2048, 4096, 4, 4)
    world.network.register(ALICE, world.alice.handlers, limits=limits)
    await exchange(world, frame("a"), broken, frame("b"), seen=seen)
    codes = {reply.header.id: reply.header.code for reply in seen}
    assert codes["a"] == codes["b"] == 200
    assert len(seen) == 3


async def test_too_many_calls_and_limits_hold(world: World) -> None:
    world.network.register(ALICE, world.alice.handlers, max_calls=2)
    seen: list[Any] = []
    await exchange(world, *(frame(name) for name in "abcd"), seen=seen)
    assert sorted((reply.header.id, reply.header.code) for reply in seen) == [("", 413), ("a", 200), ("b", 200)]


def test_users_need_no_event_loop_to_build_one(world: World) -> None:
    network = MemoryNetwork()
    network.register(ALICE, world.alice.handlers)
    assert repr(MemoryTransport(network)) == "<MemoryTransport over <MemoryNetwork: 1 services>>"
