"""Dummy runs: what they find, what they refuse, and that they leave nothing behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from swarm_kit import make_backend, same_bits
from torch import nn
from torch.nn.utils import parametrizations

from p2pmoe import BatchTensorProto as P
from p2pmoe.errors import SchemaError
from p2pmoe.protocol.nested import nested_flatten
from p2pmoe.server.module_state import Evaluating


class Call(nn.Module):
    """`function(module, x)`, with a weight of ones [4] and room for a state."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(4))
        self.cache: Any = None
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Rarely(nn.Module):
    """Draws, but not in the dummy runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(x) if x.sum() > 1e6 else x)


def refusal(module: nn.Module, **options: Any) -> str:
    with pytest.raises(SchemaError) as caught:
        make_backend("ffn.0", module, **options)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    ("give", "shown"),
    [
        (lambda m, x: x.new_zeros(3, len(x), 4), r"a run of 5 rows gave [3, 5, 4]"),  # a GRU's state of three layers
        (lambda m, x: x.new_zeros(5, len(x), 4), r"a run of 3 rows gave [5, 3, 4]"),
        (lambda m, x: x.new_zeros(len(x), len(x)), r"(float32[3, 3]), one of 5 rows gave (float32[5, 5])"),
        (lambda m, x: x.half() if len(x) == 3 else x, r"(float16[3, 4]), one of 5 rows gave (float32[5, 4])"),
        (lambda m, x: (x, x) if len(x) == 3 else x, r"one of 5 rows gave (float32[5, 4])"),
        (lambda m, x: x[:, :3] if m.training else x, r"in train mode gave (float32[3, 3]), one in eval mode gave"),
        (lambda m, x: {"a": x} if m.training else {"b": x}, "in train mode"),
        (lambda m, x: (), "no output"),
        (lambda m, x: x.to_sparse(), "only dense tensors can travel"),
    ],
)  # fmt: skip
def test_shapes_that_only_look_right_are_refused(give: Callable[..., Any], shown: str) -> None:
    assert shown in refusal(Call(give))


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 6])
def test_a_state_of_a_recurrent_layer_is_refused_however_deep(layers: int) -> None:
    """[layers, B, H]: with three layers and three rows it looks as if the batch came first."""
    assert "batch dimension first" in refusal(nn.GRU(4, 4, layers, batch_first=True), args_schema=(P(2, 4),))


# ----------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("module", "draws", "mixes"),
    [
        (nn.Linear(4, 4), (), ()),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), ("train",), ()),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval(), (), ()),
        (nn.Dropout(0.0), (), ()),
        (Call(lambda m, x: x + torch.randn_like(x)), ("eval", "train"), ()),
        (Call(lambda m, x: x + torch.randn_like(x)).eval(), ("eval", "train"), ()),
        (Rarely(), ("train",), ()),
        (nn.BatchNorm1d(4), (), ("train",)),
        (nn.BatchNorm1d(4).eval(), (), ()),
        (nn.BatchNorm1d(4, track_running_stats=False), (), ("eval", "train")),
        (Call(lambda m, x: x - x.mean(0)), (), ("eval", "train")),
        (nn.LayerNorm(4), (), ()),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), ("train",), ()),
    ],
)
def test_what_draws_and_what_mixes_rows_is_found(module: nn.Module, draws: Any, mixes: Any) -> None:
    schema = (P(2, 4),) if isinstance(module, nn.TransformerEncoderLayer) else (P(4),)
    findings = make_backend("ffn.0", module, args_schema=schema).findings
    assert (sorted(findings.draws), sorted(findings.mixes_rows)) == (list(draws), list(mixes))
    assert findings.repeatable == tuple(mode for mode in ("train", "eval") if mode not in {*draws, *mixes})


@pytest.mark.parametrize(
    "draw",
    [
        lambda m, x: x * random.random(),
        lambda m, x: x if random.random() < 2 else -x,  # nothing of it is seen in the answer
        lambda m, x: x * float(np.random.rand()),
        lambda m, x: x + float(np.random.normal()),
    ],
)
def test_numbers_that_torch_does_not_draw_are_refused(draw: Callable[..., Any]) -> None:
    assert "Draw with torch" in refusal(Call(draw))


def test_a_generator_of_the_experts_own_is_refused() -> None:
    own = np.random.default_rng(1)
    assert "two answers to the same call" in refusal(Call(lambda m, x: x * float(own.random())))
    torchs = torch.Generator().manual_seed(1)
    assert "two answers" in refusal(Call(lambda m, x: x * torch.rand(1, generator=torchs)))


class Recurrent(nn.Module):
    """Keeps its hidden state in a plain attribute from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)
        self.hidden: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.cell(x, self.hidden if self.hidden is not None and len(self.hidden) == len(x) else None)
        self.hidden = hidden.detach()
        return hidden


def test_state_between_calls_in_plain_attributes_is_refused() -> None:
    module = Recurrent()
    assert "state between calls outside its parameters and buffers" in refusal(module)
    assert module.hidden is None


def test_what_an_expert_only_notes_does_no_harm() -> None:
    def note(module: Any, x: torch.Tensor) -> torch.Tensor:
        module.cache, module.seen = x * 2, len(x)
        return x * module.weight

    module = Call(note)
    make_backend("ffn.0", module)
    assert module.cache is None
    assert not hasattr(module, "seen")


# ------------------------------------------------------------------------------------------- no trace left


def test_every_generator_mode_and_gradient_is_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    module[1].eval()  # frozen by its owner
    state, python, legacy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    backend = make_backend("ffn.0", module)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], legacy[1])
    assert [each.training for each in module.modules()] == [True, True, False, True]
    assert all(each.grad is None for each in module.parameters())
    assert module[1].num_batches_tracked == 0
    assert not backend.opt.state


def test_parameters_that_forward_writes_are_found_and_put_back() -> None:
    def clamp(module: Any, x: torch.Tensor) -> torch.Tensor:
        module.weight.data.clamp_(max=0.5)
        return x * module.weight

    module = Call(clamp)
    backend = make_backend("ffn.0", module)
    assert backend.findings.rewritten == (module.weight,)
    assert module.weight.tolist() == [1.0] * 4
    (y,) = backend.forward(torch.ones(2, 4))
    assert y.tolist() == [[0.5] * 4] * 2
    assert module.weight.tolist() == [1.0] * 4, "a call that does not train leaves parameters alone"
    backend.backward(torch.ones(2, 4), torch.ones(2, 4))
    assert torch.allclose(module.weight, torch.full((4,), 0.5 - 0.1 * 2)), "as forward, backward and step do locally"


def test_an_embedding_with_max_norm_is_found_even_where_its_rows_are_short() -> None:
    embedding = nn.Embedding(5, 4, max_norm=100.0)
    backend = make_backend("ffn.0", embedding, args_schema=(P(dtype=torch.int64),))
    assert backend.findings.rewritten == (embedding.weight,)


def test_parameters_made_by_forward_are_refused_and_gone() -> None:
    def make(module: Any, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(module, "late"):
            module.late = nn.Parameter(torch.ones(4))
        return x * module.late

    module = Call(make)
    assert "makes or replaces parameters" in refusal(module)
    assert [name for name, _ in module.named_parameters()] == ["weight"]


def test_lazy_modules_are_made_and_trained() -> None:
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    backend = make_backend("ffn.0", module, args_schema=(P(7),))
    assert module[0].weight.shape == (4, 7)
    assert module[1].num_batches_tracked == 0
    before = module[0].weight.detach().clone()
    backend.backward(torch.randn(3, 7), torch.randn(3, 4))
    assert not torch.equal(module[0].weight, before)
    assert module[1].num_batches_tracked == 1


def test_lazy_modules_that_differ_from_the_schema_are_refused() -> None:
    lonely = nn.Module()
    lonely.used, lonely.unused = nn.Linear(4, 4), nn.LazyLinear(4)
    lonely.forward = lambda x: lonely.used(x)  # type: ignore[method-assign]  # noqa: PLW0108 - no child of it
    assert "used by no forward pass" in refusal(lonely)
    assert "lazy parameters cannot be made" in refusal(nn.LazyConv1d(4, 3), args_schema=(P(dtype=torch.int64),))


def test_what_was_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        module = nn.Linear(4, 4)
    assert "inference_mode" in refusal(module)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_the_thread_that_makes_the_expert_do_not_matter(mode: Callable[[], Any]) -> None:
    module = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with mode():
        backend = make_backend("ffn.0", module, optimizer=lambda *_, **__: optimizer)
    assert backend.outputs_schema == P(4)
    backend.backward(torch.ones(2, 4), torch.ones(2, 4))
    assert backend.update_count == 1


# -------------------------------------------------------------------------------- inputs, views and in place


@pytest.mark.parametrize(
    ("schema", "function"),
    [
        (P(4), lambda m, x: x.add_(1.0) * m.weight),
        (P(4), lambda m, x: x.relu_() * m.weight),
        (P(4), lambda m, x: x[:, :2].mul_(2.0).sum(1, keepdim=True) * m.weight),
        (P(4, dtype=torch.int64), lambda m, x: x.add_(1).float() * m.weight),
    ],
)
def test_inputs_are_not_changed_by_experts_that_work_in_place(schema: P, function: Callable[..., Any]) -> None:
    backend = make_backend("ffn.0", Call(function), args_schema=(schema,))
    assert backend.findings.works_in_place
    x = torch.ones(2, 4, dtype=schema.dtype)
    backend.forward(x)
    backend.backward(x, torch.ones(2, 4))
    assert torch.equal(x, torch.ones(2, 4, dtype=schema.dtype))


def test_an_expert_that_returns_its_input_works() -> None:
    backend = make_backend("ffn.0", Call(lambda m, x: x))
    x = torch.randn(2, 4)
    assert same_bits(backend.forward(x)[0], x)
    assert backend.backward(x, torch.full((2, 4), 3.0))[0].tolist() == [[3.0] * 4] * 2


@pytest.mark.parametrize("name", ["weight", "count"])
def test_answers_are_not_memory_of_the_expert(name: str) -> None:
    def give(module: Any, x: torch.Tensor) -> torch.Tensor:
        module.count += 1.0
        return getattr(module, name).expand(len(x), -1)

    backend = make_backend("ffn.0", Call(give))
    assert backend.findings.shares_state
    (y,) = backend.forward(torch.ones(2, 4))
    assert y.tolist() == [[1.0] * 4] * 2
    backend.backward(torch.ones(2, 4), torch.ones(2, 4))
    assert y.tolist() == [[1.0] * 4] * 2


def test_buffers_that_are_views_of_one_number_or_of_each_other_are_kept() -> None:
    module = Call(lambda m, x: x * m.weight + m.spread + m.part.sum())
    module.register_buffer("spread", torch.ones(1).expand(4))
    module.register_buffer("part", module.count[:2])
    backend = make_backend("ffn.0", module)
    for _ in range(2):
        assert backend.forward(torch.ones(2, 4))[0].tolist() == [[2.0] * 4] * 2
        backend.backward(torch.ones(2, 4), torch.zeros(2, 4))


def test_a_mask_of_infinities_is_no_overflow() -> None:
    from p2pmoe.config import GateConfig
    from p2pmoe.metrics import NodeMetrics
    from p2pmoe.server.screening import guard_experts

    module = Call(lambda m, x: torch.softmax(x * m.weight + m.mask, -1))
    module.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))
    backend = make_backend("ffn.0", module)
    guard_experts([backend], GateConfig(), NodeMetrics())
    backend.forward(torch.ones(2, 4))
    backend.backward(torch.ones(2, 4), torch.ones(2, 4))
    assert backend.update_count == 1


# ---------------------------------------------------------------------------------------- kinds of experts


def test_compiled_experts_follow_modes() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    backend = make_backend("ffn.0", torch.compile(plain, backend="eager"))
    assert backend.findings.draws == {"train"}
    assert plain.training
    assert plain[1].training
    assert plain[1].num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace", "a scripted part"])
def test_scripted_experts_train_as_they_do_locally(how: str) -> None:
    """Their registers are no dicts: the dummy run ended with an AttributeError."""

    def make() -> nn.Module:
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        if how == "trace":
            return torch.jit.trace(module, torch.randn(3, 4))  # noqa: TID251 - the owner's own module
        scripted = torch.jit.script(module)  # noqa: TID251
        return scripted if how == "script" else nn.Sequential(scripted, nn.Linear(4, 4))

    local, backend = make(), make_backend("ffn.0", make())
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for seed in range(3):
        x, gradient = torch.randn(3, 4), torch.randn(3, 4)
        backend.forward(torch.randn(5, 4))  # leaves nothing behind
        leaf = x.clone().requires_grad_()
        local(leaf).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(backend.backward(x, gradient), (leaf.grad,))
        for (key, mine), other in zip(local.state_dict().items(), backend.expert.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, other, msg=f"{key} after step {seed}")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_dropout_follows_modes() -> None:
    module = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))  # noqa: TID251
    backend = make_backend("ffn.0", module)
    assert backend.findings.draws == {"train"}
    x = torch.randn(8, 4)
    with Evaluating(list(module.modules())):
        evaluated = module(x)
    assert module.training
    assert same_bits(evaluated, module[0](x))
    torch.manual_seed(5)
    (dropped,) = backend.forward(x)
    assert 0 < int((dropped == 0).sum()) < dropped.numel()


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm])
def test_normed_weights_are_what_they_are_locally(wrap: Callable[[nn.Module], nn.Module]) -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        return wrap(nn.Linear(4, 4))

    local, backend = make(), make_backend("ffn.0", make())
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        x, gradient = torch.randn(3, 4), torch.randn(3, 4)
        y = local(x)
        (theirs,) = backend.forward(x)
        assert same_bits(y, theirs)
        backend.forward(x)  # once more: nothing has moved
        y.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        backend.backward(x, gradient)
        for mine, other in zip(local.state_dict().values(), backend.expert.state_dict().values(), strict=True):
            assert same_bits(mine, other)


def test_every_built_in_kind_passes() -> None:
    from p2pmoe.server.layers import expert_classes, make_expert

    for kind in ("ffn", "transformer", "nop", "det_dropout"):
        assert kind in expert_classes
        module, args, kwargs = make_expert(kind, 8, {})
        backend = make_backend("ffn.0", module, args_schema=args, kwargs_schema=kwargs)
        assert backend.findings.repeatable == ("train", "eval")
        assert nested_flatten(backend.outputs_schema)[0].shape[-1] == 8
