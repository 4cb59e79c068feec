"""Schemas with a free dimension: sequences of any length, from the layer to the expert and back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swarm_kit import ALICE, World, make_backend, open_world, same_bits
from torch import nn

import p2pmoe
from p2pmoe import BatchTensorProto as P
from p2pmoe.client.calls import make_call
from p2pmoe.errors import BadRequestError, DecodeError, SchemaError
from p2pmoe.protocol.frames import Frame, describe_tensors
from p2pmoe.protocol.messages import RequestHeader, RequestParameters, ResponseHeader, TensorHeader
from p2pmoe.protocol.schema import (
    FREE_GROWTH,
    format_schema,
    largest_free,
    schema_digest,
    schema_from_json,
    schema_to_json,
)
from p2pmoe.server.layers import make_expert
from p2pmoe.types import Manner

LENGTHS = (1, 2, 5, 9)


def encoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make_expert("transformer", 4, {"num_heads": 2, "seq_len": 0})[0]


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.function = function

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self.weight, *args)


def backend_of(function: Any, *schema: P, uid: str = "seq.0", **options: Any) -> p2pmoe.ExpertBackend:
    return make_backend(uid, Function(function), args_schema=schema or (P(None, 4),), **options)


@pytest.fixture(params=["memory", "http"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    experts = [make_backend(f"ffn.0.{index}", encoder(), args_schema=(P(None, 4),)) for index in range(2)]
    experts.append(backend_of(lambda w, x: x[:, ::2] * w))
    experts.append(backend_of(lambda w, x, m: x * w * m.unsqueeze(-1), P(None, 4), P(None), uid="masked.0"))
    with open_world({"alice": experts}, carrier=request.param) as world:
        yield world


# ------------------------------------------------------------------------------------------------ schema


def test_a_free_dimension_in_words_json_and_digest() -> None:
    proto = P(None, 64)
    assert (proto.shape, proto.is_free, str(proto)) == ((None, 64), True, "FP32[batch, any, 64]")
    assert schema_to_json(proto)["shape"] == [None, 64]
    assert schema_from_json(schema_to_json(proto)) == proto
    assert schema_digest(proto, proto) not in {schema_digest(P(1, 64), P(1, 64)), schema_digest(P(64), P(64))}
    assert proto.make_zeros(2, free=5).shape == proto.make_empty(2, free=5).shape == (2, 5, 64)
    assert not P(3).is_free
    assert [proto.takes(shape) for shape in ((1, 64), (9, 64), (0, 64), (9, 63), (64,), (9, 64, 1))] == [
        *(True, True),
        *(False,) * 4,
    ]
    assert proto.takes((0, 64), least=0)
    assert not proto.takes((9, 64), most=8)
    assert largest_free((P(None, 3), P(7), P(2, None)), ((1, 5, 3), (1, 7), (1, 2, 6))) == 6
    assert largest_free((P(7),), ((1, 7),)) == 0


@pytest.mark.parametrize("size", [-1, True, "any", 1.0, 2**48])
def test_a_peers_odd_size_is_a_decode_error(size: Any) -> None:
    with pytest.raises(DecodeError, match="null for a free one"):
        schema_from_json({"type": "tensor", "shape": [size], "datatype": "FP32"})


# ------------------------------------------------------------------------------------------------- trial


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda w, x: x * w, P(None, 4)),
        (lambda w, x: x.mean(1) * w, P(4)),
        (lambda w, x: (x[:, ::2], x.sum(2)), (P(None, 4), P(None))),
        (lambda w, x: x @ x.transpose(1, 2), P(None, None)),
        (lambda w, x: x.repeat(1, 3, 1) * w, P(None, 4)),
        (lambda w, x: x[:, :0] * w, P(0, 4)),
    ],
)
def test_what_follows_the_length_is_found(function: Any, found: Any) -> None:
    assert backend_of(function).outputs_schema == found


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda w, x: x.view(x.shape[0] * x.shape[1], 4), "batch dimension first"),
        (lambda w, x: x if x.shape[1] == 4 else x.unsqueeze(1), "of length 7"),
        (lambda w, x: x + torch.ones(4, 4), "does not take 3 rows"),
        (lambda w, x: x.repeat(1, FREE_GROWTH + 1, 1), "over 16 times longer"),
    ],
)
def test_what_cannot_be_served_at_any_length_is_refused(function: Any, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        backend_of(function)


def test_a_given_schema_may_leave_free_what_is_not() -> None:
    assert backend_of(lambda w, x: x.mean(1) * w, outputs_schema=P(None)).outputs_schema == P(None)
    with pytest.raises(SchemaError, match=r"says \(FP32\[batch, 4, 4\]\), a dummy run gave \(FP32\[batch, any, 4\]\)"):
        backend_of(lambda w, x: x * w, outputs_schema=P(4, 4))


# ------------------------------------------------------------------------------------------- one expert


@pytest.mark.parametrize("length", LENGTHS)
def test_a_remote_expert_takes_any_length(world: World, length: int) -> None:
    expert, local = world.swarm.expert("ffn.0.0"), encoder()
    assert expert.info.inputs == (P(None, 4),)
    torch.manual_seed(length)
    x, mine = (torch.randn(3, length, 4).requires_grad_() for _ in range(2))
    with torch.no_grad():
        mine.copy_(x)
        local.load_state_dict(world.backend("ffn.0.0").expert.state_dict())
    y, expected = expert(x), local(mine)
    assert y.shape == (3, length, 4)
    assert torch.allclose(y, expected, atol=1e-6)
    y.sum().backward()
    expected.sum().backward()
    assert torch.allclose(x.grad, mine.grad, atol=1e-5)


def test_outputs_of_another_length_than_the_input(world: World) -> None:
    expert = world.swarm.expert("seq.0")
    for length in LENGTHS:
        x = torch.randn(2, length, 4, requires_grad=True)
        y = expert(x)
        assert y.shape == (2, (length + 1) // 2, 4)
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_several_free_arguments(world: World) -> None:
    expert = world.swarm.expert("masked.0")
    assert format_schema(expert.info.inputs) == "(FP32[batch, any, 4], FP32[batch, any])"
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5)
    assert same_bits(expert(x, mask), x)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 4), torch.ones(2, 5, 3), torch.ones(2, 0, 4), torch.ones(2, 5, 4, 1), torch.ones(())]
)
def test_what_does_not_fit_is_refused_before_it_is_sent(world: World, x: torch.Tensor) -> None:
    expert = world.swarm.expert("seq.0")
    assert expert.info
    with pytest.raises(SchemaError, match=r"must be FP32\[batch, any, 4\]"):
        expert(x)


def test_no_rows_of_some_length(world: World) -> None:
    x = torch.ones(0, 6, 4, requires_grad=True)
    y = world.swarm.expert("ffn.0.0")(x)
    assert y.shape == (0, 6, 4)
    y.sum().backward()
    assert x.grad.shape == (0, 6, 4)


# --------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("length", LENGTHS)
def test_a_mixture_takes_any_length(world: World, length: int) -> None:
    mixture = world.mixture(grid_size=(1, 2), k_best=2)
    x = torch.randn(3, length, 4, requires_grad=True)
    y = mixture(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert mixture(torch.ones(0, length, 4)).shape == (0, length, 4)


def test_rows_that_nobody_answered_are_zeros_of_the_right_length() -> None:
    experts = [make_backend(f"ffn.0.{index}", encoder(), args_schema=(P(None, 4),)) for index in range(2)]
    with open_world({"alice": experts[:1], "bob": experts[1:]}) as world:
        mixture = world.mixture(grid_size=(1, 2), k_best=1, allow_zero_outputs=True)
        mixture(torch.randn(8, 3, 4))
        for peer in world.peers.values():
            for backend in peer.backends.values():
                backend.forward_pool.process_function = lambda x: 1 / 0  # type: ignore[assignment,return-value]
        assert torch.equal(mixture(torch.randn(8, 5, 4)), torch.zeros(8, 5, 4))


def test_answers_of_different_lengths_are_not_mixed() -> None:
    def short(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x[:, : x.shape[1] // 2] * w

    experts = [backend_of(lambda w, x: x * w, uid=f"ffn.0.{index}") for index in range(3)]
    experts.append(backend_of(short, uid="ffn.0.3"))
    with open_world({"alice": experts}) as world:
        mixture = world.mixture(grid_size=(1, 4), k_best=4, k_min=3)
        y = mixture(torch.ones(2, 6, 4))
        assert torch.allclose(y, torch.ones(2, 6, 4))
        strict = world.mixture(grid_size=(1, 4), k_best=4, k_min=4)
        with pytest.raises(p2pmoe.errors.ExpertsUnavailableError, match=r"gave rows of \[3, 4\].*cannot be mixed"):
            strict(torch.ones(2, 6, 4))


# --------------------------------------------------------------------------------------------- the wire


async def ask(world: World, uid: str, *tensors: torch.Tensor, **parameters: Any) -> Any:
    headers, _ = describe_tensors(tensors)
    header = RequestHeader(model_name=uid, inputs=headers, parameters=RequestParameters(**parameters))
    world.alice.handlers.admit(header)
    future = world.alice.handlers.submit(Frame(header, tensors))
    world.alice.handlers.flush()
    return await future


@pytest.mark.parametrize("shape", [(2, 4), (2, 0, 4), (2, 5, 3), (0, 5, 4), (2, 5, 4, 1)])
async def test_a_node_refuses_what_does_not_fit(world: World, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadRequestError, match=r"FP32\[batch, any, 4\]"):
        await ask(world, "seq.0", torch.ones(shape))


async def test_gradients_of_a_wrong_length_are_the_callers_fault(world: World) -> None:
    backend = world.backend("seq.0")
    with pytest.raises(BadRequestError, match=r"gradient of output 0 is \[2, 3, 4\], and the output .* \[2, 2, 4\]"):
        await ask(world, "seq.0", torch.ones(2, 4, 4), torch.ones(2, 3, 4), direction="backward")
    with pytest.raises(BadRequestError, match="expects tensors"):
        await ask(world, "seq.0", torch.ones(2, 1, 4), torch.ones(2, FREE_GROWTH + 1, 4), direction="backward")
    assert backend.update_count == 0
    await ask(world, "seq.0", torch.ones(2, 4, 4), torch.ones(2, 2, 4), direction="backward")
    assert backend.update_count == 1


async def test_only_calls_of_one_length_share_a_batch(world: World) -> None:
    pool = world.backend("seq.0").forward_pool
    for length in (3, 5, 3, 5, 5):
        pool.submit((torch.ones(1, length, 4),), caller=str(length))
    rows = []
    while (batch := pool.take_batch()) is not None:
        rows.append((batch.tasks[0].tensors[0].shape[1], batch.rows))
    assert sorted(rows) == [(3, 2), (5, 3)]


async def test_many_lengths_at_once(world: World) -> None:
    shapes = [(1 + index % 3, 1 + index % 7) for index in range(40)]
    answers = await asyncio.gather(*(ask(world, "seq.0", torch.ones(rows, n, 4)) for rows, n in shapes))
    assert [tuple(answer[0].shape) for answer in answers] == [(rows, (n + 1) // 2, 4) for rows, n in shapes]


async def test_quotas_count_what_is_sent(world: World) -> None:
    plan = world.alice.handlers._passes["seq.0", "forward"]
    headers, _ = describe_tensors((torch.ones(2, 9, 4),))
    assert plan.nbytes(RequestHeader(inputs=headers)) == 2 * 9 * 4 * 4


async def test_readiness_and_metadata_know_of_it(world: World) -> None:
    assert await world.alice.handlers.ready()
    document = world.alice.handlers.expert("seq.0")
    assert document["oip"]["inputs"] == [{"name": "0", "datatype": "FP32", "shape": [-1, -1, 4]}]
    assert document["outputs_schema"]["shape"] == [None, 4]


# --------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((2, 3, 4), True),
        ((2, 0, 4), True),
        ((2, 3 * FREE_GROWTH, 4), True),
        ((2, 3 * FREE_GROWTH + 1, 4), False),
        ((1, 3, 4), False),
        ((2, 3, 5), False),
        ((2, 3), False),
        ((), False),
    ],
)
def test_a_reply_is_bounded_before_memory_is_allocated(shape: tuple[int, ...], fits: bool) -> None:
    protos = (P(None, 4),)
    call = make_call(ALICE, "seq.0", "forward", (torch.ones(2, 3, 4),), protos, protos, timeout_s=1.0)
    reply = ResponseHeader(id=call.id, outputs=(TensorHeader("0", "FP32", shape),))
    if fits:
        call.check(reply)
    else:
        with pytest.raises(DecodeError, match=r"instead of \(FP32\[2, any, 4\]\)"):
            call.check(reply)


def test_gradients_that_come_back_have_the_arguments_shapes() -> None:
    protos = (P(None, 4),)
    tensors = (torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    call = make_call(ALICE, "seq.0", "backward", tensors, protos * 2, protos, timeout_s=1.0, manner=Manner("train", 1))
    call.check(ResponseHeader(outputs=(TensorHeader("0", "FP32", (2, 3, 4)),)))
    with pytest.raises(DecodeError):
        call.check(ResponseHeader(outputs=(TensorHeader("0", "FP32", (2, 4, 4)),)))
