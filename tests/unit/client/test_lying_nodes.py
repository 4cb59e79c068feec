"""Nodes that answer anything but the truth: a typed error, bounded memory, lost standing, and nobody else is hurt."""

from __future__ import annotations

import contextlib
import logging
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch
from lying_kit import BROKEN, NOISY, Lie, LyingTransport, answer, honest, serve_lie, shaped
from swarm_kit import ALICE, BOB, World, grid_backends, make_backend, open_world, same_bits
from torch import nn

import p2pmoe
from p2pmoe.client.directory import StaticDirectory
from p2pmoe.client.standing import SHUN_S
from p2pmoe.errors import DecodeError, ExpertNotFoundError, ExpertsUnavailableError, NonFiniteReplyError
from p2pmoe.experts.directory import Provider
from p2pmoe.rpc.http.client import HttpTransport
from p2pmoe.rpc.memory import MemoryNetwork, MemoryTransport
from p2pmoe.types import Endpoint, PeerId

ALICE_ID, BOB_ID = PeerId("alice"), PeerId("bob")
X = torch.ones(2, 4)
NAN = shaped(lambda y: y * math.nan)


@contextlib.contextmanager
def liars(
    lies: dict[str, Lie], hosts: dict[str, Sequence[Any]] | None = None, *, carrier: str = "memory", **options: Any
) -> Iterator[World]:
    """Peers by name; those of `lies` answer calls by script. By default alice and bob both host ffn.0 and ffn.1."""
    hosts = hosts or {name: [make_backend(f"ffn.{i}", lr=0.0) for i in range(2)] for name in ("alice", "bob")}
    network = MemoryNetwork()
    with contextlib.ExitStack() as stack:
        if carrier == "memory":
            transport = LyingTransport(MemoryTransport(network), {Endpoint(name, 1): lie for name, lie in lies.items()})
            yield stack.enter_context(open_world(hosts, network=network, transport=transport, **options))
            return
        world = stack.enter_context(open_world(hosts, carrier="http"))
        providers: dict[str, list[Provider]] = {}
        endpoints = {name: peer.endpoint for name, peer in world.peers.items()}
        for name, lie in lies.items():
            handlers = world.peers[name].handlers
            documents = {
                f"/p2pmoe/v1/experts/{uid}": msgspec.json.encode(handlers.expert(uid)) for uid in handlers.backends
            }
            endpoints[name] = stack.enter_context(serve_lie(lie, documents))
        for name, peer in world.peers.items():
            for uid, backend in peer.backends.items():
                provider = Provider(peer.peer_id, endpoints[name], backend.schema_digest, math.inf, 1)
                providers.setdefault(uid, []).append(provider)
        directory = StaticDirectory(providers)
        swarm = p2pmoe.Swarm(directory=directory, transport=HttpTransport(), **options)
        yield World(world.peers, stack.enter_context(swarm), directory, network)


def lies_of(world: World, peer_id: PeerId) -> dict[str, int]:
    held = {each.peer_id: each.counts for each in world.swarm.trust.standing.snapshot()}
    return held.get(peer_id, {})


# -------------------------------------------------------------------------------------------- broken replies


@pytest.mark.parametrize("lie", BROKEN)
def test_a_broken_reply_is_a_typed_error_and_the_nodes_fault(carrier: str, lie: str) -> None:
    hosts = {"alice": [make_backend("ffn.0")], "bob": [make_backend("ffn.1", lr=0.0)]}
    with liars({"alice": BROKEN[lie]}, hosts, carrier=carrier) as world:
        expert, other = world.swarm.expert("ffn.0"), world.swarm.expert("ffn.1")
        right = other(X)
        with pytest.raises(DecodeError):
            expert(X)
        assert lies_of(world, ALICE_ID) == {"broken_reply": 1}
        assert world.swarm.trust.standing.verdict(ALICE_ID) == "last"
        assert same_bits(other(X), right)
        assert lies_of(world, BOB_ID) == {}


@pytest.mark.parametrize("lie", BROKEN)
def test_the_honest_replica_is_asked_instead(lie: str) -> None:
    """Forward and backward; from the second call on the honest one is asked first."""
    with liars({"alice": BROKEN[lie]}) as world:
        expert = world.swarm.expert("ffn.0")
        x = X.clone().requires_grad_()
        y = expert(x)
        assert same_bits(y, world.bob.backends["ffn.0"].expert(X))
        y.sum().backward()
        expert(X)
        assert lies_of(world, ALICE_ID) == {"broken_reply": 1}
        assert world.bob.backends["ffn.0"].update_count == 1
        asked = [endpoint for endpoint, _ in world.swarm.transport.asked]
        assert asked == [ALICE, BOB, BOB, BOB]


async def test_the_honest_replica_is_asked_by_awaited_calls_too() -> None:
    with liars({"alice": BROKEN["other shape"]}) as world:
        expert = world.swarm.expert("ffn.0")
        assert same_bits(await expert.acall(X), world.bob.backends["ffn.0"].expert(X))
        assert same_bits(await expert.acall(X), world.bob.backends["ffn.0"].expert(X))
        assert lies_of(world, ALICE_ID) == {"broken_reply": 1}


@pytest.mark.parametrize("lie", NOISY)
def test_noise_beside_the_right_answer_is_ignored_and_held_against_the_node(carrier: str, lie: str) -> None:
    with liars({"alice": NOISY[lie]}, {"alice": [make_backend("ffn.0")]}, carrier=carrier) as world:
        assert same_bits(world.swarm.expert("ffn.0")(X), X)
        world.swarm.close()  # the rest of the exchange is read in the background
        if lie != "noise after the answers":  # which may not have been read
            assert lies_of(world, ALICE_ID) == {"broken_reply": 1}


@pytest.mark.parametrize("lie", [name for name in BROKEN if name.startswith(("endless", "a huge", "an oversized"))])
def test_memory_and_reading_are_bounded(lie: str) -> None:
    with liars({"alice": BROKEN[lie]}, {"alice": [make_backend("ffn.0")]}) as world:
        expert = world.swarm.expert("ffn.0")
        expert.info  # noqa: B018
        tracemalloc.start()
        with pytest.raises(DecodeError):
            expert(X)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * 1024 * 1024
        assert world.swarm.transport.read[ALICE] < 1024 * 1024


def test_the_third_lie_shuns_the_node_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    hosts = {
        name: [make_backend(f"ffn.{name}.0".replace(name, "0" if name == "alice" else "1"))]
        for name in ("alice", "bob")
    }
    with liars({"alice": BROKEN["other dtype"], "bob": BROKEN["no json"]}, hosts) as world:
        with caplog.at_level(logging.WARNING, logger="p2pmoe.client.trust"):
            for uid in ("ffn.0.0", "ffn.1.0"):
                expert = world.swarm.expert(uid)
                for _ in range(3):
                    with pytest.raises(DecodeError):
                        expert(X)
                asked = len(world.swarm.transport.asked)
                with pytest.raises(ExpertNotFoundError, match="replies were wrong"):
                    expert(X)
                assert len(world.swarm.transport.asked) == asked, "not asked any more"
        assert [record.getMessage() for record in caplog.records if "is not asked" in record.getMessage()] == [
            caplog.records[0].getMessage()
        ], "one line for both, for they came within seconds"
        assert f"alice is not asked for {SHUN_S:.0f} s" in caplog.records[0].getMessage()
        assert world.swarm.find_experts("ffn.*") == []


def test_a_pardoned_node_is_asked_again() -> None:
    with liars({"alice": BROKEN["other dtype"]}, {"alice": [make_backend("ffn.0")]}) as world:
        expert = world.swarm.expert("ffn.0")
        for _ in range(3):
            with pytest.raises(DecodeError):
                expert(X)
        world.swarm.transport.lies[ALICE] = honest
        world.swarm.trust.pardon(ALICE_ID)
        assert same_bits(expert(X), X)


def test_a_false_info_document_costs_standing_and_the_next_provider_is_asked() -> None:
    with liars({}) as world:
        real = world.alice.handlers.expert
        world.alice.handlers.expert = lambda uid: real(uid) | {"outputs_schema": {"type": "tuple", "items": []}}
        assert world.swarm.expert("ffn.0").info.outputs[0].shape == (4,)
        assert lies_of(world, ALICE_ID) == {"broken_reply": 1}


# ------------------------------------------------------------------------------------------------- NaN


def test_non_finite_answers_go_to_the_replica(carrier: str) -> None:
    with liars({"alice": NAN}, carrier=carrier) as world:
        expert = world.swarm.expert("ffn.0")
        right = world.bob.backends["ffn.0"].expert(X)
        if carrier == "memory":
            assert same_bits(expert(X), right)
        assert expert(X).isfinite().all()
        assert lies_of(world, ALICE_ID) == {"non_finite": 1}


def test_non_finite_answers_of_the_only_provider_are_a_typed_error() -> None:
    backend = make_backend("ffn.0", lr=0.0)
    with liars({}, {"alice": [backend]}) as world:
        expert = world.swarm.expert("ffn.0")
        x = X.clone().requires_grad_()
        y = expert(x)
        with torch.no_grad():
            backend.expert[2].bias[1] = math.inf
        with pytest.raises(NonFiniteReplyError, match=r"ffn\.0 at .*NaN or infinite"):
            expert(X)
        assert lies_of(world, ALICE_ID) == {"non_finite": 1}
        del y


def test_non_finite_gradients_are_a_typed_error_and_go_to_the_replica() -> None:
    def lie(calls: Sequence[Any]) -> Any:
        for call in calls:
            backward = call.parameters.direction == "backward"
            yield answer(call, torch.ones(call.inputs[0].shape) * (math.nan if backward else 1.0))

    with liars({"alice": lie}, {"alice": [make_backend("ffn.0")]}) as world:
        x = X.clone().requires_grad_()
        y = world.swarm.expert("ffn.0")(x)
        with pytest.raises(NonFiniteReplyError):
            y.sum().backward()
        assert x.grad is None
    with liars({"alice": lie}) as world:
        x = X.clone().requires_grad_()
        world.swarm.expert("ffn.0")(x).sum().backward()
        assert x.grad.isfinite().all()
        assert world.bob.backends["ffn.0"].update_count == 1


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


def test_what_is_ones_own_fault_is_not_the_nodes() -> None:
    """Non-finite inputs come back as such; huge ones fail, and nobody is blamed."""
    with liars({}, {"alice": [make_backend("ffn.0", Square())]}) as world:
        expert = world.swarm.expert("ffn.0")
        x = X.clone()
        x[0, 0] = math.nan
        y = expert(x)
        assert y[0, 0].isnan()
        assert y[1].isfinite().all()
        with pytest.raises(NonFiniteReplyError):
            expert(torch.full((2, 4), 3e38))
        assert world.swarm.trust.standing.snapshot() == []


def test_the_check_can_be_turned_off_for_experts_that_mean_it() -> None:
    with liars({"alice": NAN}, {"alice": [make_backend("ffn.0")]}, check_finite=False) as world:
        assert world.swarm.expert("ffn.0")(X).isnan().all()
        assert world.swarm.trust.standing.snapshot() == []


# ---------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("lie", [*BROKEN, "NaN"])
def test_a_mixture_leaves_a_liars_experts_out(lie: str) -> None:
    """One piece of evidence a pass, however many experts of the node are asked."""
    hosts = {"alice": grid_backends([0], lr=0.0), "bob": grid_backends([1], lr=0.0)}
    with liars({"alice": (BROKEN | {"NaN": NAN})[lie]}, hosts) as world:
        moe = world.mixture(k_best=4)
        x = torch.randn(3, 4, requires_grad=True)
        y = moe(x)
        y.sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
        # A frame cut short makes the first answer whole with a byte of the second: then backward asks once more.
        assert sum(lies_of(world, ALICE_ID).values()) == (2 if lie == "a frame cut short" else 1)
        assert lies_of(world, BOB_ID) == {}
        assert {each.update_count for each in world.bob.backends.values()} == {1}


@pytest.mark.parametrize("lie", ["other shape", "NaN"])
def test_a_mixture_goes_on_with_the_replicas(lie: str) -> None:
    hosts = {name: grid_backends(lr=0.0) for name in ("alice", "bob")}
    with liars({"alice": (BROKEN | {"NaN": NAN})[lie]}, hosts) as world, open_world({"bob": grid_backends()}) as other:
        x = torch.randn(3, 4)
        right = other.mixture(k_best=2, k_min=2)(x)
        moe = world.mixture(k_best=2, k_min=2)
        assert same_bits(moe(x), right)
        exchanges = world.swarm.dispatcher.exchanges
        assert same_bits(moe(x), right)
        assert world.swarm.dispatcher.exchanges == exchanges + 1, "bob alone is asked"


def test_shunned_nodes_are_not_searched() -> None:
    hosts = {"alice": grid_backends([0], lr=0.0), "bob": grid_backends([1], lr=0.0)}
    with liars({"alice": BROKEN["no json"]}, hosts) as world:
        moe = world.mixture(k_best=4)
        for _ in range(5):
            moe(torch.randn(3, 4))
        assert sum(endpoint == ALICE for endpoint, _ in world.swarm.transport.asked) == 3 * 2, (
            "three passes, two experts"
        )
        assert world.swarm.trust.standing.verdict(ALICE_ID) == "shunned"


def test_when_all_lie_the_rows_are_named() -> None:
    with liars({"alice": NAN}, {"alice": grid_backends(lr=0.0)}) as world:
        with pytest.raises(ExpertsUnavailableError, match="NaN or infinite") as caught:
            world.mixture()(torch.randn(2, 4))
        assert caught.value.rows == (0, 1)
        y = world.mixture(allow_zero_outputs=True)(torch.randn(2, 4))
        assert same_bits(y, torch.zeros(2, 4))
