"""Honest nodes that answer something wrong: the call fails, and that expert is left out in the end, never the node."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch
from frame_kit import raw_frame
from lying_kit import LyingTransport, answer, honest, serve_lie
from swarm_kit import ALICE, WAIT_S, World, make_backend, open_world, same_bits
from torch import nn

import p2pmoe
from p2pmoe import BatchTensorProto
from p2pmoe.client.answers import Answers
from p2pmoe.client.calls import CallGroup, make_call
from p2pmoe.client.directory import StaticDirectory
from p2pmoe.client.standing import SHUN_S
from p2pmoe.errors import DecodeError, DrainingError, ExpertNotFoundError, NonFiniteReplyError
from p2pmoe.experts.directory import Provider
from p2pmoe.protocol.frames import FrameLimits, FrameRefused
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.rpc.memory import MemoryNetwork, MemoryTransport
from p2pmoe.types import Endpoint, PeerId

ALICE_ID = PeerId("alice")
X = torch.ones(2, 4)
PROTOS = (BatchTensorProto(4),)


def only(uid: str, change: Any) -> Any:
    """A lie about one expert; the others are answered honestly."""

    def lie(calls: Sequence[Any]) -> Any:
        for call in calls:
            wrong = call.model_name == uid
            yield change(call) if wrong else answer(call)

    return lie


@contextlib.contextmanager
def alice_who(lie: Any, carrier: str = "memory", **hosts: Any) -> Iterator[World]:
    """Alice hosts ffn.0 and ffn.1, and answers by the lie. Over "http" nothing proves who answers."""
    experts = {"alice": [make_backend(f"ffn.{index}", lr=0.0) for index in range(2)], **hosts}
    network = MemoryNetwork()
    if carrier == "memory":
        transport = LyingTransport(MemoryTransport(network), {ALICE: lie})
        with open_world(experts, network=network, transport=transport) as world:
            world.swarm.expert("ffn.0").info  # noqa: B018
            yield world
        return
    with open_world(experts, carrier="http") as world, contextlib.ExitStack() as stack:
        infos = {uid: world.alice.handlers.expert(uid) for uid in world.alice.backends}
        documents = {f"/p2pmoe/v1/experts/{uid}": msgspec.json.encode(info) for uid, info in infos.items()}
        endpoint = stack.enter_context(serve_lie(lie, documents))
        providers = {
            uid: [Provider(ALICE_ID, endpoint, backend.schema_digest, math.inf, 1)]
            for uid, backend in world.alice.backends.items()
        }
        swarm = p2pmoe.Swarm(directory=StaticDirectory(providers), transport=HttpTransport(), timeout_s=WAIT_S)
        yield World(world.peers, stack.enter_context(swarm), swarm.directory, network)


def fails(world: World, uid: str, times: int, kind: type[Exception] = DecodeError) -> None:
    expert = world.swarm.expert(uid)
    for _ in range(times):
        with pytest.raises(kind):
            expert(X)


WRONG = {
    "its own bug breaks its schema": lambda call: answer(call, torch.ones(2, 3)),
    "sizes that do not add up": lambda call: raw_frame(
        {"id": call.id, "outputs": [{"name": "0", "datatype": "FP32", "shape": [2, 4]}]}
    ),
    "a body over our limit": lambda call: raw_frame(
        {
            "id": call.id,
            "outputs": [
                {"name": "0", "datatype": "FP32", "shape": [2, 2**28], "parameters": {"binary_data_size": 2**31}}
            ],
        },
        body_bytes=2**31,
    ),
    "a header over our limit": lambda call: (2**31).to_bytes(4, "little") + bytes(4),
    "an answer that was cut": lambda call: answer(call)[:-1],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("carrier", ["memory", "http"])
def test_one_experts_broken_replies_leave_that_expert_out_and_nothing_else(
    carrier: str, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    with alice_who(only("ffn.0", WRONG[wrong]), carrier) as world:
        standing = world.swarm.trust.standing
        with caplog.at_level(logging.WARNING, logger="p2pmoe.client.trust"):
            fails(world, "ffn.0", 3)
        fails(world, "ffn.0", 1, ExpertNotFoundError)
        assert standing.verdict(ALICE_ID, "ffn.0") == "shunned"
        assert standing.verdict(ALICE_ID, "ffn.1") == "good"
        assert standing.verdict(ALICE_ID) != "shunned"
        assert standing.shunned_for_s(ALICE_ID) == 0.0
        assert 0 < standing.shunned_for_s(ALICE_ID, "ffn.0") <= SHUN_S
        (held,) = standing.snapshot()
        assert (held.counts, list(held.experts)) == ({"broken_reply": 3}, ["ffn.0"])
        for _ in range(4):
            assert same_bits(world.swarm.expert("ffn.1")(X), X)
        assert [each.uid for each in world.swarm.find_experts("ffn.*")] == ["ffn.1"]
        assert [each.getMessage().partition(", its")[0] for each in caplog.records] == [
            f"alice is not asked for {SHUN_S:.0f} s about ffn.0"
        ]
        world.swarm.trust.pardon(ALICE_ID)
        assert standing.verdict(ALICE_ID, "ffn.0") == "good"
        assert len(world.swarm.find_experts("ffn.*")) == 2


PROVEN = {
    "no json": lambda call: raw_frame(b"{{{"),
    "another expert's name": lambda call: answer(call, model_name="ffn.99"),
    "an error with tensors": lambda call: answer(call, code=500, message="sorry"),
}


@pytest.mark.parametrize("wrong", PROVEN)
def test_what_no_honest_node_says_is_proof_where_the_sender_is_proven(wrong: str) -> None:
    with alice_who(only("ffn.0", PROVEN[wrong])) as world:
        fails(world, "ffn.0", 3)
        assert world.swarm.trust.standing.verdict(ALICE_ID) == "shunned"
        with pytest.raises(ExpertNotFoundError):
            world.swarm.expert("ffn.1")(X)
    with alice_who(only("ffn.0", PROVEN[wrong]), "http") as world:
        fails(world, "ffn.0", 3)
        assert world.swarm.trust.standing.verdict(ALICE_ID) != "shunned", "anybody may sit on that line"
        assert same_bits(world.swarm.expert("ffn.1")(X), X)
        fails(world, "ffn.0", 1, ExpertNotFoundError)


def test_nan_over_a_line_that_proves_nothing_is_held_against_the_expert() -> None:
    with alice_who(only("ffn.0", lambda call: answer(call, torch.ones(2, 4) * math.nan)), "http") as world:
        fails(world, "ffn.0", 5, NonFiniteReplyError)
        assert world.swarm.trust.standing.verdict(ALICE_ID, "ffn.0") == "shunned"
        assert same_bits(world.swarm.expert("ffn.1")(X), X)


def test_nan_of_one_expert_is_held_against_that_expert() -> None:
    """Also where the sender is proven: it may have diverged, and its neighbours have not."""
    with alice_who(only("ffn.0", lambda call: answer(call, torch.ones(2, 4) * math.nan))) as world:
        fails(world, "ffn.0", 5, NonFiniteReplyError)
        fails(world, "ffn.0", 1, ExpertNotFoundError)
        assert world.swarm.trust.standing.verdict(ALICE_ID) == "last"
        assert same_bits(world.swarm.expert("ffn.1")(X), X)


def test_stray_frames_over_such_a_line_are_counted_and_held_against_nobody() -> None:
    with alice_who(lambda calls: [answer(calls[0], id="nobody"), *honest(calls)], "http") as world:
        for _ in range(4):
            assert same_bits(world.swarm.expert("ffn.0")(X), X)
        assert world.swarm.trust.standing.verdict(ALICE_ID, "ffn.0") == "good"
        assert world.swarm.trust.standing.snapshot()[0].counts == {"broken_reply": 4}


class Wide(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 1024)


@pytest.mark.parametrize("carrier", ["memory", "https"])
def test_a_reply_over_our_own_limit_fails_its_call_and_not_its_neighbours(carrier: str) -> None:
    """An honest expert whose output is larger than what this trainer takes; also a whole batch of them."""
    backends = [make_backend("ffn.0", lr=0.0), make_backend("wide.0", Wide()), make_backend("ffn.1", lr=0.0)]
    network, limits = MemoryNetwork(), FrameLimits(body_bytes=16 * 1024)
    transport = MemoryTransport(network, limits) if carrier == "memory" else HttpTransport(limits)
    with open_world({"alice": backends}, carrier=carrier, network=network, transport=transport) as world:
        for _ in range(4):
            calls = [
                make_call(
                    world.alice.endpoint,
                    uid,
                    "forward",
                    (X,),
                    PROTOS,
                    (BatchTensorProto(4096 if uid == "wide.0" else 4),),
                    timeout_s=WAIT_S,
                    peer_id=ALICE_ID,
                )
                for uid in ("ffn.0", "wide.0", "ffn.1")
            ]
            group = CallGroup(calls)
            world.swarm.call(group, WAIT_S)
            first, wide, last = group.results(WAIT_S)
            assert isinstance(wide, DecodeError)
            assert "over the limit" in str(wide)
            assert same_bits(first[0], world.alice.backends["ffn.0"].expert(X))
            assert same_bits(last[0], world.alice.backends["ffn.1"].expert(X))
        fails(world, "wide.0", 3)
        assert world.swarm.trust.standing.verdict(ALICE_ID, "wide.0") == "shunned"
        assert world.swarm.expert("ffn.0")(X).isfinite().all()


def test_a_mixture_goes_on_with_the_nodes_other_experts() -> None:
    """After three broken passes the broken expert is no longer chosen; it costs the node nothing else."""
    with alice_who(only("ffn.0", WRONG["its own bug breaks its schema"])) as world:
        moe = world.mixture(grid_size=(2,), k_best=2)
        for _ in range(6):
            assert moe(X).isfinite().all()
        asked = [call.model_name for _, call in world.swarm.transport.asked]
        assert (asked.count("ffn.0"), asked.count("ffn.1")) == (3, 6)
        assert world.swarm.trust.standing.verdict(ALICE_ID, "ffn.1") == "good"


def test_an_info_document_that_does_not_fit_its_record_is_that_experts_matter() -> None:
    """A node that was restarted with another schema while its old record lives."""
    with open_world({"alice": [make_backend("ffn.0"), make_backend("ffn.1", Wide())]}) as world:
        real = world.alice.handlers.expert
        world.alice.handlers.expert = lambda uid: real("ffn.1" if uid == "ffn.0" else uid)
        for _ in range(4):
            with pytest.raises((DecodeError, ExpertNotFoundError)):
                world.swarm.expert("ffn.0")(X)
        assert world.swarm.trust.standing.verdict(ALICE_ID) != "shunned"
        assert world.swarm.expert("ffn.1")(X).shape == (2, 4096)


def test_one_call_sent_twice_at_once_is_no_lie_of_whoever_answers_both() -> None:
    """Our own doing: two groups with the same id that leave in one flush."""
    with open_world({"alice": [make_backend("ffn.0", lr=0.0)]}) as world:
        world.swarm.expert("ffn.0")(X)
        groups = []
        for _ in range(3):
            call = make_call(
                ALICE,
                "ffn.0",
                "forward",
                (X,),
                PROTOS,
                PROTOS,
                timeout_s=WAIT_S,
                call_id="the same",
                peer_id=ALICE_ID,
            )
            groups.append(CallGroup([call]))
        held = threading.Event()
        world.swarm._loop.call_soon_threadsafe(held.wait, WAIT_S)  # so that all leave together
        for group in groups:
            world.swarm.dispatcher.submit(group)
        held.set()
        for group in groups:
            group.wait(WAIT_S)
            assert same_bits(group.results(WAIT_S)[0][0], world.alice.backends["ffn.0"].expert(X))
        assert world.swarm.trust.standing.snapshot() == []


def test_a_refused_frame_that_nobody_waits_for_is_a_stray() -> None:
    calls = [make_call(ALICE, "ffn.0", "forward", (X,), PROTOS, PROTOS, timeout_s=1.0, peer_id=ALICE_ID)]
    told: list[DecodeError] = []
    answers = Answers(ALICE, calls, lambda call, result: None, lambda peer, error: told.append(error))
    refused = FrameRefused("nobody", DecodeError("too large", code=413))
    for _ in range(16):
        answers.refuse(refused)
    with pytest.raises(DecodeError, match="more than 16 frames"):
        answers.refuse(refused)
    assert [error.is_proof for error in told] == [True]


class Greedy(nn.Module):
    """Wants more memory than there is for a row that begins with a negative number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x[:, 0] < 0).any():
            raise MemoryError
        y: torch.Tensor = self.linear(x)
        return y


@pytest.mark.parametrize("carrier", ["memory", "http"])
def test_a_call_that_there_is_no_memory_for_leaves_nobody_out(carrier: str) -> None:
    """503 was taken for a node that leaves: all calls of this process to it had no provider for five seconds."""
    backends = [make_backend("ffn.0.0", Greedy(), lr=0.0), make_backend("ffn.0.1", lr=0.0)]
    with open_world({"alice": backends}, carrier=carrier) as world:
        expert, other = world.swarm.expert("ffn.0.0"), world.swarm.expert("ffn.0.1")
        for call in (lambda: expert(-X), lambda: expert.call_backward([-X], [X])):
            with pytest.raises(DrainingError, match=r"no memory for this call now \(MemoryError\)") as caught:
                call()
            assert caught.value.retry_after_s == 1.0
            assert same_bits(other(X), world.backend("ffn.0.1").expert(X))
            assert same_bits(expert(X), world.backend("ffn.0.0").expert(X))
        moe = world.mixture(grid_size=(1, 2), k_best=2, k_min=1)
        alone = moe(-X)
        torch.testing.assert_close(alone, world.backend("ffn.0.1").expert(-X))
        assert moe(X).isfinite().all()
        assert same_bits(expert(X), world.backend("ffn.0.0").expert(X))


def test_a_node_that_leaves_is_left_out() -> None:
    with open_world({"alice": [make_backend("ffn.0")]}) as world:
        provider = world.directory.cached_prefix("ffn.")[0][0]
        world.swarm.note_failure(provider, DrainingError("shutting down"), "ffn.0")
        assert not world.directory.cached_prefix("ffn.")


def test_only_pinned_tls_proves_who_answers() -> None:
    transport, key = HttpTransport(), bytes(32)
    assert transport.proves(Endpoint("192.0.2.1", 1, "https", key))
    assert not transport.proves(Endpoint("192.0.2.1", 1, "https"))
    assert not transport.proves(Endpoint("127.0.0.1", 1, "http", key))
