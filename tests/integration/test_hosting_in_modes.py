"""A node is started by a thread whose torch is in some mode: its experts serve and train as if it were not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from swarm_kit import WAIT_S, make_backend, make_ffn, same_bits
from torch import nn

import p2pmoe
from p2pmoe.config import ExpertsConfig, OptimizerConfig
from p2pmoe.errors import SchemaError
from p2pmoe.server.layers import make_expert

D = 8


class Normed(nn.Module):
    """An expert with a buffer that every pass may write to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


@contextlib.contextmanager
def defaults(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


MODES: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default float64": lambda: defaults(dtype=torch.float64),
    "default bfloat16": lambda: defaults(dtype=torch.bfloat16),
    "default device meta": lambda: defaults(device="meta"),
}


@contextlib.contextmanager
def node_in(mode: str, backends: list[p2pmoe.ExpertBackend]) -> Iterator[p2pmoe.Node]:
    """A node whose event loop's thread is in the mode, from before it is made to after its end."""
    config = p2pmoe.NodeConfig(
        experts=ExpertsConfig(uids=("ffn.0", "ffn.1"), kind="ffn", hidden_dim=D, seed=3),
        optimizer=OptimizerConfig(name="sgd", lr=0.1, clip_grad_norm=None),
    )
    started, stop = threading.Event(), threading.Event()
    nodes: list[p2pmoe.Node] = []

    async def serve() -> None:
        async with p2pmoe.Node(config, backends=backends) as node:
            nodes.append(node)
            started.set()
            async with asyncio.timeout(60):
                await asyncio.get_running_loop().run_in_executor(None, stop.wait, 55)

    def run() -> None:
        try:
            with MODES[mode]():
                asyncio.run(serve())
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(WAIT_S)
        assert nodes, "the node did not start"
        yield nodes[0]
    finally:
        stop.set()
        thread.join(WAIT_S)
        assert not thread.is_alive()


def forward_and_train(mode: str) -> list[torch.Tensor]:
    """Outputs, input gradients, and outputs after a step, of an expert of the node's own and of one made in Python."""
    torch.manual_seed(11)
    normed = Normed()
    given = p2pmoe.ExpertBackend(
        "normed.0", normed, torch.optim.SGD(normed.parameters(), lr=0.1), args_schema=(p2pmoe.BatchTensorProto(D),)
    )
    results = []
    with node_in(mode, [given]) as node, p2pmoe.Swarm(node.dht_address) as swarm:
        for uid, rows in (("ffn.1", 5), ("normed.0", 5), ("ffn.0", 16_384)):
            torch.manual_seed(5)
            x = torch.randn(rows, D, dtype=torch.float32).requires_grad_()
            expert = swarm.expert(uid)
            y = expert(x)
            y.square().mean().backward()
            results += [y.detach(), x.grad, expert(x).detach()]
    return results


def test_experts_serve_and_train_the_same_in_every_mode() -> None:
    expected = forward_and_train("plain")
    assert all(each.dtype is torch.float32 for each in expected)
    for mode in sorted(set(MODES) - {"plain"}):
        for index, (given, wanted) in enumerate(zip(forward_and_train(mode), expected, strict=True)):
            torch.testing.assert_close(given, wanted, msg=lambda text, m=mode, i=index: f"{m}, result {i}: {text}")


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("kind", ["ffn", "transformer", "nop", "det_dropout"])
def test_built_in_experts_are_float32_with_one_schema(kind: str, mode: str) -> None:
    """A swarm's nodes must agree, whatever a node's owner has set."""
    from p2pmoe.protocol.modes import as_in_a_new_thread
    from p2pmoe.protocol.schema import schema_digest

    _, args, kwargs = make_expert(kind, D, {})
    with MODES[mode](), as_in_a_new_thread():
        module, given_args, given_kwargs = make_expert(kind, D, {})
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert not any(parameter.is_inference() for parameter in module.parameters())
    assert schema_digest((given_args, given_kwargs), given_args) == schema_digest((args, kwargs), args)


def test_modules_that_can_never_be_trained_are_refused_in_words() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(SchemaError, match=r"0\.weight was made under torch\.inference_mode"),
    ):
        make_backend("ffn.0", make_ffn("ffn.0"))
    with torch.device("meta"):
        module = nn.Linear(4, 4)
    with pytest.raises(SchemaError, match=r"ffn\.0: weight has no values"):
        make_backend("ffn.0", module)


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"autocast"}))  # that is the caller's own wish
def test_a_backend_called_directly_computes_the_same(mode: str) -> None:
    x, gradient = torch.randn(3, 4), torch.randn(3, 4)
    plain, other = make_backend("ffn.0"), make_backend("ffn.0")
    expected = plain.forward(x), plain.backward(x, gradient)
    with MODES[mode]():
        given = other.forward(x), other.backward(x, gradient)
    assert same_bits(given[0][0], expected[0][0])
    assert same_bits(given[1][0], expected[1][0])
    for a, b in zip(plain.expert.parameters(), other.expert.parameters(), strict=True):
        assert same_bits(a, b)


def test_tensors_of_inference_mode_may_be_batched_and_trained_with() -> None:
    with torch.inference_mode():
        x, gradient = torch.ones(3, 4), torch.ones(3, 4)
    backend, local = make_backend("ffn.0"), make_ffn("ffn.0")
    leaf = torch.ones(3, 4, requires_grad=True)
    local(leaf).sum().backward()
    assert same_bits(backend.backward(x, gradient)[0], leaf.grad)


def test_a_lone_backend_and_a_lone_peer_are_lists_of_one() -> None:
    backend = make_backend("ffn.0")
    with p2pmoe.background_node(backends=backend) as node, p2pmoe.Swarm(node.dht_address) as swarm:
        assert [record.uid for record in swarm.find_experts("ffn.*")] == ["ffn.0"]
        x = torch.randn(2, 4)
        with torch.no_grad():
            assert same_bits(swarm.expert("ffn.0")(x), backend.expert(x))
