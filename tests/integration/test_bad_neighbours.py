"""A node whose callers and experts misbehave: honest callers beside them notice nothing, everybody gets an answer."""

from __future__ import annotations

import http.client
import json
import threading
from typing import Any

import pytest
import torch
from raising_kit import HOSTILE
from swarm_kit import WAIT_S, make_backend
from torch import nn

import p2pmoe
from p2pmoe.errors import CallError, ExpertFailedError

STEPS = 60


class Table(nn.Module):
    """Ten rows, and no eleventh."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.table(index)
        return y


class Raising(nn.Module):
    """Raises one of `HOSTILE` for rows that begin with its number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = int(x[0, 0])
        if number > 0:
            raise list(HOSTILE.values())[number - 1][0]
        y: torch.Tensor = self.linear(x)
        return y


def table_backend() -> p2pmoe.ExpertBackend:
    torch.manual_seed(1)
    module = Table()
    schema = (p2pmoe.BatchTensorProto(4), p2pmoe.BatchTensorProto(dtype=torch.int64))
    return p2pmoe.ExpertBackend("table.0", module, torch.optim.SGD(module.parameters(), lr=0.2), args_schema=schema)


def test_one_caller_with_a_bad_index_costs_three_honest_ones_no_step() -> None:
    stop = threading.Event()
    failed: list[str] = []
    errors: list[Exception] = []
    begun = threading.Semaphore(0)

    def honest(swarm: p2pmoe.Swarm) -> None:
        expert = swarm.expert("table.0")
        index = torch.tensor([1, 2, 3])
        for _ in range(STEPS):
            x = torch.zeros(3, 4, requires_grad=True)
            try:
                (expert(x, index) - 1.0).square().mean().backward()
            except CallError as error:
                failed.append(str(error))

    def bad(swarm: p2pmoe.Swarm) -> None:
        expert = swarm.expert("table.0")
        while not stop.is_set():
            for call in (
                lambda: expert(torch.zeros(3, 4), torch.tensor([1, 99, 3])),
                lambda: expert.call_backward((torch.zeros(1, 4), torch.tensor([99])), (torch.ones(1, 4),)),
            ):
                try:
                    call()
                except CallError as error:
                    errors.append(error)
            begun.release()

    backend = table_backend()
    with (
        p2pmoe.background_node(p2pmoe.NodeConfig(), [backend]) as node,
        p2pmoe.Swarm(initial_peers=[node.dht_address]) as alice,
        p2pmoe.Swarm(initial_peers=[node.dht_address]) as mallory,
    ):
        culprits = [threading.Thread(target=bad, args=(mallory,)) for _ in range(2)]
        callers = [threading.Thread(target=honest, args=(alice,)) for _ in range(3)]
        try:
            for thread in culprits:
                thread.start()
            assert begun.acquire(timeout=WAIT_S)
            for thread in callers:
                thread.start()
            for thread in callers:
                thread.join(4 * WAIT_S)
                assert not thread.is_alive()
        finally:
            stop.set()
            for thread in culprits:
                thread.join(WAIT_S)
    assert failed == []
    assert errors
    assert {type(error) for error in errors} == {ExpertFailedError}
    assert all("IndexError: index out of range" in str(error) for error in errors)
    weight = backend.expert.table.weight
    assert (weight[1:4] - 1.0).abs().max() < 0.5, "it has learned"


def ask(node: p2pmoe.Node, method: str, path: str, document: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(node.endpoint.host, node.endpoint.port, timeout=WAIT_S)
    try:
        body = None if document is None else json.dumps(document)
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_every_caller_is_told_whatever_an_expert_raises(raising_node: p2pmoe.Node, name: str) -> None:
    number = 1.0 + list(HOSTILE).index(name)
    text = f"raising.0/forward: the expert failed: {HOSTILE[name][1]}"
    with p2pmoe.Swarm(initial_peers=[raising_node.dht_address], timeout_s=WAIT_S) as swarm:
        with pytest.raises(ExpertFailedError) as caught:
            swarm.expert("raising.0")(torch.full((2, 4), number))
        assert text in str(caught.value)
        tensor = {"name": "0", "datatype": "FP32", "shape": [1, 4], "data": [number] * 4}
        status, answer = ask(raising_node, "POST", "/v2/models/raising.0/infer", {"inputs": [tensor]})
        assert (status, answer["error"]) == (500, text)
        assert swarm.expert("raising.0")(torch.zeros(2, 4)).shape == (2, 4)


@pytest.fixture(scope="module")
def raising_node() -> Any:
    backend = make_backend("raising.0", Raising())
    config = p2pmoe.NodeConfig.from_tree({"http": {"tls": False}})
    with p2pmoe.background_node(config, [backend]) as node:
        yield node


@pytest.mark.parametrize("path", ["/%ff%fe", "/v2/models/%ed%a0%80", "/v2/models/%00%0d%0a", "/p2pmoe/v1/experts/%ff"])
def test_a_path_that_is_no_text_is_refused_in_json(raising_node: p2pmoe.Node, path: str) -> None:
    status, answer = ask(raising_node, "GET", path)
    assert status in (400, 404)
    assert answer["error"].isprintable()
