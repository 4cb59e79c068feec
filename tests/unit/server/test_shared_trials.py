"""Experts that are alike have one trial between them; those that may not be have one each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from p2pmoe import BatchTensorProto, ExpertBackend, register_expert_class
from p2pmoe.config import BatchingConfig, ExpertsConfig, OptimizerConfig
from p2pmoe.errors import SchemaError
from p2pmoe.server import shared_trials, trial
from p2pmoe.server.hosting import make_backends
from p2pmoe.server.layers import FeedforwardExpert, expert_classes
from p2pmoe.server.shared_trials import SharedTrials, describe_behaviour


@pytest.fixture(autouse=True)
def own_register() -> Iterator[None]:
    before = dict(expert_classes)
    yield
    expert_classes.clear()
    expert_classes.update(before)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the experts that dummy runs were made of."""
    names: list[str] = []
    findings = trial._Trial.findings

    def counted(self: Any, given: Any) -> Any:
        names.append(self._name)
        return findings(self, given)

    monkeypatch.setattr(trial._Trial, "findings", counted)
    return names


def backends(kind: str, count: int = 3, **options: Any) -> list[ExpertBackend]:
    config = ExpertsConfig(uids=(f"x.[0:{count}]",), kind=kind, hidden_dim=8, options=options)
    return make_backends(config, BatchingConfig(), OptimizerConfig(), ["cpu"])


def rows(_: int, hidden_dim: int) -> BatchTensorProto:
    return BatchTensorProto(hidden_dim)


@pytest.mark.parametrize("kind", ["ffn", "nop", "transformer", "det_dropout"])
def test_a_thousand_experts_of_a_built_in_kind_are_tried_once(kind: str, trials: list[str]) -> None:
    made = backends(kind, 1000 if kind == "ffn" else 20)
    assert trials == ["x.0"]
    first = made[0]
    for each in made[1:]:
        assert each.findings == first.findings
        assert each.outputs_schema == first.outputs_schema
        assert each.schema_digest == first.schema_digest
        assert not any(a is b for a in each.parameters() for b in first.parameters())
    alone = ExpertBackend("alone", first.expert, None, args_schema=first.args_schema, kwargs_schema=first.kwargs_schema)
    assert alone.findings == first.findings
    assert trials == ["x.0", "alone"]


def test_each_making_tries_anew(trials: list[str]) -> None:
    for _ in range(2):
        backends("ffn", 2)
    assert trials == ["x.0", "x.0"]


def test_every_instance_of_a_foreign_class_is_tried(trials: list[str]) -> None:
    count = itertools.count()

    @register_expert_class("by_count", rows)
    class ByCount(nn.Module):
        """Its second instance draws, which nothing that belongs to the instance says."""

        def __init__(self, hidden_dim: int) -> None:
            super().__init__()
            self.linear = nn.Linear(hidden_dim, hidden_dim)
            self.draws = next(count) == 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + (torch.rand_like(x) if self.draws else 0)

    assert [sorted(each.findings.draws) for each in backends("by_count")] == [[], ["eval", "train"], []]
    assert trials == ["x.0", "x.1", "x.2"]


def test_a_foreign_module_within_a_known_one_counts() -> None:
    class Mine(nn.ReLU):
        pass

    assert describe_behaviour(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) is not None
    assert describe_behaviour(nn.Sequential(nn.Linear(4, 4), Mine())) is None


def mixed(kinds: Iterator[Callable[[], nn.Module]]) -> Callable[[int], nn.Module]:
    return lambda _: next(kinds)()


def test_instances_of_one_kind_that_differ_in_settings_are_tried_apart(trials: list[str]) -> None:
    layers = iter(
        [
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)),
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)),
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)),
            lambda: nn.Sequential(nn.Linear(8, 5), nn.Dropout(0.0)),
            lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval(),
            lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        ]
    )
    register_expert_class("varied", rows)(mixed(layers))
    made = backends("varied", 6)
    assert trials == ["x.0", "x.1", "x.3", "x.4", "x.5"]
    assert [sorted(each.findings.draws) for each in made] == [[], ["train"], [], [], [], []]
    assert [each.outputs_schema.shape for each in made] == [(8,), (8,), (8,), (5,), (8,), (8,)]
    assert [sorted(each.findings.mixes_rows) for each in made] == [[], [], [], [], [], ["train"]]


def test_parameters_that_forward_writes_are_each_experts_own(trials: list[str]) -> None:
    register_expert_class("table", lambda _, __: BatchTensorProto(dtype=torch.int64))(
        lambda dim: nn.Embedding(10, dim, max_norm=1e-3)
    )
    made = backends("table")
    assert trials == ["x.0"]
    for each in made:
        assert [id(parameter) for parameter in each.findings.rewritten] == [id(each.expert.weight)]
        before = each.expert.weight.detach().clone()
        each.forward(torch.tensor([0, 1, 2]))
        assert torch.equal(each.expert.weight, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: setattr(module, "forward", lambda x: x),
        lambda module: setattr(module.up, "secret", object()),
        lambda module: setattr(module.up, "table", {"a": 1}),
        lambda module: setattr(module, "activation", type("GELU", (nn.GELU,), {})()),
        lambda module: nn.utils.parametrizations.weight_norm(module.up),
    ],
    ids=["hook", "forward", "object", "dict", "subclass", "parametrization"],
)
def test_what_may_hide_anything_is_not_described(change: Callable[[Any], Any]) -> None:
    module = FeedforwardExpert(8)
    assert describe_behaviour(module) is not None
    change(module)
    assert describe_behaviour(module) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.up.requires_grad_(False),
        lambda module: module.down.bfloat16(),
        lambda module: module.activation.eval(),
        lambda module: setattr(module.down, "bias", None),
        lambda module: setattr(module.down, "bias", module.up.bias),
        lambda module: setattr(module, "up", module.down),
        lambda module: setattr(module.activation, "approximate", "tanh"),
        lambda module: setattr(module.up, "in_features", True),
        lambda module: module.register_buffer("more", torch.zeros(1)),
    ],
    ids=["frozen", "dtype", "mode", "no_bias", "tied", "same_layer", "setting", "bool", "buffer"],
)
def test_what_differs_is_described_differently(change: Callable[[Any], Any]) -> None:
    module = FeedforwardExpert(1)
    assert describe_behaviour(module) == describe_behaviour(FeedforwardExpert(1))
    change(module)
    assert describe_behaviour(module) != describe_behaviour(FeedforwardExpert(1))


def test_other_schemas_and_refusals_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    examine = shared_trials.examine

    def counted(name: str, *args: Any) -> Any:
        asked.append(name)
        return examine(name, *args)

    monkeypatch.setattr(shared_trials, "examine", counted)
    shared, cpu = SharedTrials(), torch.device("cpu")
    for name, schema in (("a", BatchTensorProto(4)), ("b", BatchTensorProto(None, 4)), ("c", BatchTensorProto(4))):
        shared.examine(name, nn.Linear(4, 4), ((schema,), {}), cpu)
    assert asked == ["a", "b"]
    for name in ("d", "e"):
        with pytest.raises(SchemaError, match=f"^{name}: the expert does not take 3 rows"):
            shared.examine(name, nn.Linear(4, 4), ((BatchTensorProto(5),), {}), cpu)
    half = BatchTensorProto(4, dtype=torch.float16)
    assert shared.examine("f", nn.Linear(4, 4), ((BatchTensorProto(4),), {}), cpu, half).outputs_schema == half
    assert repr(shared) == "<SharedTrials: 3 kinds>"
    assert asked == ["a", "b", "d", "e", "f"]
