"""ExpertHandlers: what is refused, before batching, and with which words."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swarm_kit import WAIT_S, Failing, Gate, Peer, make_backend, open_world

from p2pmoe import BatchTensorProto
from p2pmoe.config import LimitsConfig
from p2pmoe.errors import (
    BadRequestError,
    CallError,
    DrainingError,
    ExpertFailedError,
    OverloadedError,
    ReplayConflictError,
    UnknownExpertError,
)
from p2pmoe.metrics import NodeMetrics
from p2pmoe.protocol.frames import Frame
from p2pmoe.protocol.messages import RequestHeader, RequestParameters, TensorHeader, TensorParameters
from p2pmoe.protocol.schema import DTYPE_TO_DATATYPE
from p2pmoe.server.handlers import ExpertHandlers
from p2pmoe.server.quota import CallerQuota


@pytest.fixture
def alice() -> Iterator[Peer]:
    two = (BatchTensorProto(4), BatchTensorProto(dtype=torch.int64))
    backends = [
        make_backend("ffn.0"),
        make_backend("bad.0", Failing()),
        make_backend("gate.0", Gate()),
        make_backend("two.0", Pair(), args_schema=two),
    ]
    with open_world({"alice": backends}) as world:
        yield world.alice


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x * self.weight + index.unsqueeze(1)


def header(uid: str, *tensors: torch.Tensor, names: list[str] | None = None, **options: Any) -> RequestHeader:
    call_id = options.pop("id", "a")
    inputs = tuple(
        TensorHeader(name, DTYPE_TO_DATATYPE[t.dtype], tuple(t.shape), TensorParameters(t.nbytes))
        for name, t in zip(names or map(str, range(len(tensors))), tensors, strict=names is not None)
    )
    return RequestHeader(call_id, uid, inputs, RequestParameters(**options))


async def ask(peer: Peer, uid: str, *tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    call = header(uid, *tensors, **options)
    peer.handlers.admit(call)
    future = peer.handlers.submit(Frame(call, tensors))
    peer.handlers.flush()
    return await asyncio.wait_for(future, WAIT_S)


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("uid", "tensors"),
    [
        ("ffn.0", []),
        ("ffn.0", [X, X]),
        ("ffn.0", [torch.ones(2, 5)]),
        ("ffn.0", [torch.ones(4)]),
        ("ffn.0", [torch.ones(2, 4, 1)]),
        ("ffn.0", [torch.ones(())]),
        ("ffn.0", [torch.ones(0, 4)]),
        ("ffn.0", [X.double()]),
        ("ffn.0", [X.half()]),
        ("two.0", [X, torch.ones(2)]),
        ("two.0", [X, torch.ones(3, dtype=torch.int64)]),
        ("two.0", [torch.ones(2, dtype=torch.int64), X]),
    ],
)
def test_a_schema_mismatch_is_refused_with_both_schemas(alice: Peer, uid: str, tensors: list[torch.Tensor]) -> None:
    with pytest.raises(BadRequestError) as caught:
        alice.handlers.admit(header(uid, *tensors))
    message = str(caught.value)
    expected = "(FP32[batch, 4])" if uid == "ffn.0" else "(FP32[batch, 4], INT64[batch])"
    assert f"{uid}/forward" in message
    assert expected in message
    for tensor in tensors:
        assert f"{DTYPE_TO_DATATYPE[tensor.dtype]}[{', '.join(map(str, tensor.shape))}]" in message


@pytest.mark.parametrize("names", [["1", "0"], ["0", "0"], ["x", "y"], ["0", "01"]])
def test_tensors_are_named_in_wire_order(alice: Peer, names: list[str]) -> None:
    with pytest.raises(BadRequestError, match="'0' to '1'"):
        alice.handlers.admit(header("two.0", X, torch.ones(2, dtype=torch.int64), names=names))


def test_backward_expects_inputs_and_gradients(alice: Peer) -> None:
    index = torch.ones(2, dtype=torch.int64)
    alice.handlers.admit(header("two.0", X, index, X, direction="backward"))
    with pytest.raises(BadRequestError, match=r"two\.0/backward"):
        alice.handlers.admit(header("two.0", X, index, direction="backward"))


def test_an_unknown_uid_is_404_and_costs_no_label(alice: Peer) -> None:
    for index in range(50):
        with pytest.raises(UnknownExpertError, match="look it up"):
            alice.handlers.admit(header(f"ffn.{index + 1}", X))
    text = alice.handlers._metrics.render()[0].decode()
    assert "ffn.17" not in text
    assert 'outcome="404"' in text


@pytest.mark.parametrize("direction", ["sideways", "", "x" * 200])
def test_an_unknown_pass_is_400(alice: Peer, direction: str) -> None:
    with pytest.raises(BadRequestError, match="forward"):
        alice.handlers.admit(header("ffn.0", X, direction=direction))
    with pytest.raises(UnknownExpertError):
        alice.handlers.admit(header("no.0", X, direction=direction))


async def test_a_draining_node_takes_nothing_new(alice: Peer) -> None:
    await ask(alice, "ffn.0", X)
    alice.handlers.drain()
    with pytest.raises(DrainingError, match="another provider"):
        alice.handlers.admit(header("ffn.0", X))
    assert alice.handlers.draining


async def test_requests_and_updates_are_counted(alice: Peer) -> None:
    await ask(alice, "ffn.0", X)
    await ask(alice, "ffn.0", X, X, direction="backward")
    await ask(alice, "gate.0", X)  # a batch is counted after its answer left, and before the next begins
    document = alice.handlers.expert("ffn.0")
    assert (document["requests"], document["updates"]) == (2, 1)
    assert document["peer_id"] == "alice"
    assert document["oip"]["inputs"] == [{"name": "0", "datatype": "FP32", "shape": [-1, 4]}]
    assert list(alice.handlers.experts()["experts"]) == ["bad.0", "ffn.0", "gate.0", "two.0"]
    with pytest.raises(UnknownExpertError):
        alice.handlers.expert("ffn.1")


async def test_a_backward_id_is_applied_once(alice: Peer) -> None:
    backend = alice.backends["ffn.0"]
    first, again = [await ask(alice, "ffn.0", X, X, direction="backward", id="one") for _ in range(2)]
    assert backend.update_count == 1
    assert first[0] is again[0]
    with pytest.raises(ReplayConflictError):
        await ask(alice, "two.0", X, torch.ones(2, dtype=torch.int64), X, direction="backward", id="one")
    await ask(alice, "ffn.0", X, X, direction="backward", id="two")
    assert backend.update_count == 2


async def test_forward_ids_may_repeat_and_an_empty_id_is_no_id(alice: Peer) -> None:
    for _ in range(2):
        await ask(alice, "ffn.0", X, id="same")
        await ask(alice, "ffn.0", X, X, direction="backward", id="")
    assert alice.backends["ffn.0"].update_count == 2


async def test_readiness_runs_a_real_forward_at_most_once_a_second(alice: Peer) -> None:
    forward = alice.backends["ffn.0"].forward_pool
    runs: list[int] = []
    real = forward.process_function
    forward.process_function = lambda *x: (runs.append(1), real(*x))[1]  # type: ignore[assignment]
    assert await alice.handlers.ready()
    assert await alice.handlers.ready()
    assert runs == [1]


async def test_an_expert_that_fails_is_not_ready() -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of order")

    with open_world({"alice": [make_backend("ffn.0")]}) as world:
        world.alice.backends["ffn.0"].forward_pool.process_function = fail
        assert not await world.alice.handlers.ready()


async def test_a_node_without_experts_is_ready() -> None:
    with open_world({"alice": []}) as world:
        assert await world.alice.handlers.ready()


async def test_only_the_failing_experts_calls_fail(alice: Peer) -> None:
    results = await asyncio.gather(
        ask(alice, "bad.0", -X), ask(alice, "ffn.0", X), ask(alice, "ffn.0", X), return_exceptions=True
    )
    assert isinstance(results[0], ExpertFailedError)
    assert all(isinstance(result, tuple) for result in results[1:])
    assert isinstance(results[0], CallError)


async def test_a_deadline_counts_from_the_arrival(alice: Peer) -> None:
    with pytest.raises(CallError, match="deadline"):
        await ask(alice, "ffn.0", X, timeout_ms=0.0)
    await ask(alice, "ffn.0", X, timeout_ms=1e4)


def test_it_prints_its_state(alice: Peer) -> None:
    assert "4 experts, serving" in repr(alice.handlers)


def test_the_limits_that_were_given_hold_from_the_first_call_on(alice: Peer) -> None:
    """A quota that has counted nobody yet is empty, and was taken for none."""
    quota = CallerQuota(LimitsConfig(caller_max_calls=7, caller_calls_per_s=0.1, caller_burst_s=1.0), clock=lambda: 1.0)
    handlers = ExpertHandlers(alice.backends.values(), [alice.runtime], metrics=NodeMetrics(), peer_id="a", quota=quota)
    handlers.admit(header("ffn.0", X))
    with pytest.raises(OverloadedError, match=r"over 0\.1 calls a second of one caller"):
        handlers.admit(header("ffn.0", X))
    assert quota.active_since(0.0) == 1
