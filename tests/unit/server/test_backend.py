"""ExpertBackend: the seed's contract, line by line."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swarm_kit import make_backend, make_ffn, same_bits
from torch import nn

import p2pmoe
from p2pmoe import BatchTensorProto, ExpertBackend, TaskPool, nested_flatten
from p2pmoe.errors import SchemaError
from p2pmoe.server.backend import DUMMY_BATCH_SIZE

P = BatchTensorProto


class Function(nn.Module):
    """A module around a function, with one parameter that scales."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.weight, *args, **kwargs)


def backend_of(function: Callable[..., Any], **options: Any) -> ExpertBackend:
    return make_backend("ffn.0", Function(function), **options)


# ------------------------------------------------------------------------------------------------- schemas


def test_the_dummy_batch_has_three_rows_and_another_five() -> None:
    assert DUMMY_BATCH_SIZE == 3
    seen = []
    backend_of(lambda w, x: (seen.append(tuple(x.shape)), x * w)[1])
    assert seen[0] == (3, 4)
    assert set(seen) == {(3, 4), (5, 4)}


@pytest.mark.parametrize("options", [{"args_schema": ()}, {"args_schema": None}, {"kwargs_schema": {}}])
def test_at_least_one_argument_is_needed(options: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match=r"ffn\.0.*at least one"):
        backend_of(lambda w: w, **options)


@pytest.mark.parametrize("schema", [(3,), (P(4), "x"), (torch.zeros(3),), ({"a": None},)])
def test_a_schema_is_made_of_protos(schema: Any) -> None:
    with pytest.raises(SchemaError, match="BatchTensorProto"):
        backend_of(lambda w, *x: x, args_schema=schema)


def test_the_outputs_schema_is_found() -> None:
    backend = backend_of(
        lambda w, x, *, mask: {"b": [x * w, mask], "a": (x[:, 0].half(), x.long())},
        args_schema=(P(4),),
        kwargs_schema={"mask": P(2, dtype=torch.bool)},
    )
    assert backend.outputs_schema == {
        "b": [P(4), P(2, dtype=torch.bool)],
        "a": (P(dtype=torch.float16), P(4, dtype=torch.int64)),
    }
    assert backend.forward_schema == ((P(4),), {"mask": P(2, dtype=torch.bool)})


def test_a_given_outputs_schema_is_taken() -> None:
    given = (P(4, codec="fp16"), P(dtype=torch.int64))
    backend = backend_of(lambda w, x: [x * w, x.argmax(1)], args_schema=(P(4),), outputs_schema=given)
    assert backend.outputs_schema is given


@pytest.mark.parametrize("given", [P(7), (P(4),), P(4, dtype=torch.int64), P(4, 1), P(), [P(4), P(4)]])
def test_a_given_outputs_schema_that_does_not_fit_is_refused(given: Any) -> None:
    with pytest.raises(SchemaError, match=r"ffn\.0: outputs_schema says .*, a dummy run gave \(FP32\[batch, 4\]\)"):
        backend_of(lambda w, x: x * w, args_schema=(P(4),), outputs_schema=given)


def test_a_single_proto_may_stand_for_a_tuple() -> None:
    assert backend_of(lambda w, x: x, args_schema=P(4)).args_schema == (P(4),)


@pytest.mark.parametrize(
    "output",
    [lambda w, x: x.sum(), lambda w, x: x[:1], lambda w, x: 3, lambda w, x: None, lambda w, x: (x, w.sum())],
)
def test_outputs_without_the_batch_in_front_are_refused(output: Callable[..., Any]) -> None:
    with pytest.raises(SchemaError, match="batch dimension"):
        backend_of(output)


def test_an_expert_that_does_not_take_its_schema_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"FP32\[batch, 5\].*RuntimeError"):
        make_backend("ffn.0", nn.Linear(4, 4), args_schema=(P(5),))


class Restless(nn.Module):
    """Changes whatever a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.embedding = nn.Embedding(5, 4, max_norm=0.1)  # renormalises its weight inside forward
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(2))
        self.history: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.seen = torch.randn(len(x))  # replaced by one of another shape
        index = torch.zeros(len(x), dtype=torch.int64)
        return self.dropout(self.norm(x)) + self.embedding(index) + torch.randn_like(x)


@pytest.mark.parametrize("training", [True, False])
def test_the_dummy_run_leaves_everything_as_it_was(training: bool) -> None:
    module = Restless().train(training)
    nn.init.constant_(module.embedding.weight, 3.0)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = copy.deepcopy(module.state_dict())
    modes = [each.training for each in module.modules()]
    random_state = torch.get_rng_state()
    backend = make_backend("ffn.0", module)
    after = module.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert same_bits(before[name], after[name]), name
    assert all(bool((parameter.grad == 7.0).all()) for parameter in module.parameters())
    assert [each.training for each in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert backend.outputs_schema == P(4)
    assert backend.update_count == 0


def test_a_failing_dummy_run_leaves_everything_as_it_was_too() -> None:
    module = Restless()
    before, random_state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    with pytest.raises(SchemaError):
        make_backend("ffn.0", module, args_schema=(P(5),))
    assert all(map(same_bits, before.values(), module.state_dict().values()))
    assert torch.equal(torch.get_rng_state(), random_state)


# ------------------------------------------------------------------------------------------------- forward


def test_forward_takes_flat_tensors_and_gives_a_flat_tuple() -> None:
    backend = backend_of(
        lambda w, x, pair, *, b, a: {"second": pair[0] - pair[1], "first": [x * w, a - b]},
        args_schema=(P(2), (P(2), P(2))),
        kwargs_schema={"b": P(2), "a": P(2)},
    )
    x, p0, p1, a, b = (torch.full((3, 2), float(value)) for value in (1, 10, 20, 300, 400))
    outputs = backend.forward(x, p0, p1, a, b)  # keywords by sorted name
    assert isinstance(outputs, tuple)
    assert [output[0, 0].item() for output in outputs] == [2.0, -100.0, -10.0]
    assert outputs == nested_flatten(outputs)


def test_forward_runs_without_gradients() -> None:
    modes = []
    backend = backend_of(lambda w, x: (modes.append(torch.is_grad_enabled()), x * w)[1])
    modes.clear()
    (output,) = backend.forward(torch.ones(2, 4, requires_grad=True))
    assert modes == [False]
    assert not output.requires_grad


def test_an_ordered_dict_of_outputs_comes_in_wire_order() -> None:
    backend = backend_of(lambda w, x: OrderedDict(z=x * 1, a=x * 2))
    ones = torch.ones(1, 4)
    assert [output[0, 0].item() for output in backend.forward(ones)] == [2.0, 1.0]
    (gradient,) = backend.backward(ones, torch.full((1, 4), 10.0), torch.ones(1, 4))
    assert gradient.tolist() == [[21.0] * 4]


def test_a_wrong_number_of_tensors_is_refused() -> None:
    backend = make_backend("ffn.0")
    with pytest.raises(SchemaError, match="2"):
        backend.forward(torch.ones(2, 4), torch.ones(2, 4))


# ------------------------------------------------------------------------------------------------ backward


def test_backward_equals_autograd_and_one_step() -> None:
    backend = make_backend("ffn.0")
    local = make_ffn("ffn.0")
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for _ in range(3):
        x, gradient = torch.randn(5, 4), torch.randn(5, 4)
        mine = x.clone().requires_grad_()
        local(mine).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        (theirs,) = backend.backward(x, gradient)
        assert same_bits(mine.grad, theirs)
        assert all(map(same_bits, local.parameters(), backend.expert.parameters()))
    assert backend.update_count == 3
    assert all(parameter.grad is None for parameter in backend.expert.parameters())


def test_backward_takes_inputs_then_gradients_and_returns_every_input() -> None:
    backend = backend_of(
        lambda w, x, *, k: {"b": x * w, "a": k * 3}, args_schema=(P(1),), kwargs_schema={"k": P(1)}, lr=0.0
    )
    x, k, grad_a, grad_b = (torch.full((2, 1), value) for value in (1.0, 1.0, 5.0, 7.0))
    grad_x, grad_k = backend.backward(x, k, grad_a, grad_b)
    assert (grad_x[0].item(), grad_k[0].item()) == (14.0, 15.0)


def test_unused_inputs_give_zeros() -> None:
    backend = backend_of(lambda w, x, y: x * w, args_schema=(P(4), P(3)))
    grad_x, grad_y = backend.backward(torch.ones(2, 4), torch.ones(2, 3), torch.ones(2, 4))
    assert grad_x.abs().sum() > 0
    assert same_bits(grad_y, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.int32])
def test_integer_inputs_are_carried_and_come_back_as_zeros_of_their_shape(dtype: torch.dtype) -> None:
    seen = []
    backend = backend_of(
        lambda w, x, index: (seen.append((index.dtype, index.requires_grad)), x * index[:, :1].to(x.dtype) * w)[1],
        args_schema=(P(4), P(2, dtype=dtype)),
    )
    index = torch.ones(3, 2).to(dtype)
    grad_x, grad_index = backend.backward(torch.ones(3, 4), index, torch.ones(3, 4))
    assert seen[-1] == (dtype, False)
    assert grad_x.tolist() == [[2.0] * 4] * 3
    assert same_bits(grad_index, torch.zeros(3, 2, dtype=dtype))


def test_integer_outputs_get_no_gradient() -> None:
    backend = backend_of(lambda w, x: (x * w, x.argmax(1)))
    (gradient,) = backend.backward(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, dtype=torch.int64))
    assert gradient.tolist() == [[2.0] * 4] * 2


def test_outputs_that_depend_on_nothing_trainable_still_count_as_a_step() -> None:
    backend = backend_of(lambda w, x: torch.ones_like(x, requires_grad=False))
    (gradient,) = backend.backward(torch.ones(2, 4), torch.ones(2, 4))
    assert same_bits(gradient, torch.zeros(2, 4))
    assert backend.update_count == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_are_cast_to_the_dtype_of_their_output(dtype: torch.dtype) -> None:
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.to(dtype)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            seen.append(gradients[0].dtype)
            return gradients[0].float()

    backend = backend_of(lambda w, x: Watched.apply(x * w), outputs_schema=P(4))  # states float32
    (gradient,) = backend.backward(torch.ones(2, 4), torch.full((2, 4), 0.5))
    assert seen == [dtype]
    assert gradient.dtype is torch.float32
    assert gradient.tolist() == [[1.0] * 4] * 2


def test_half_precision_experts_work() -> None:
    backend = make_backend("ffn.0", make_ffn("ffn.0", dtype=torch.bfloat16), args_schema=(P(4, dtype=torch.bfloat16),))
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    (output,) = backend.forward(x)
    (gradient,) = backend.backward(x, torch.ones(3, 4, dtype=torch.bfloat16))
    assert output.dtype is gradient.dtype is torch.bfloat16


def test_apply_gradients_runs_inside_the_pass_and_may_be_overridden() -> None:
    order: list[str] = []

    class Lazy(ExpertBackend):
        def apply_gradients(self) -> None:
            order.append(f"apply {self.expert.weight.grad.item():g}")

    module = Function(lambda w, x: (order.append("forward"), x * w)[1])
    backend = Lazy("ffn.0", module, torch.optim.SGD(module.parameters(), lr=1.0), args_schema=(P(1),))
    order.clear()
    backend.backward(torch.ones(2, 1), torch.ones(2, 1))
    assert order == ["forward", "apply 2"]
    assert module.weight.item() == 2.0, "nothing but apply_gradients steps"
    backend.backward(torch.ones(2, 1), torch.ones(2, 1))
    assert order[-1] == "apply 4", "gradients accumulate when it does not clear them"


def test_backward_back_propagates_once_for_several_outputs() -> None:
    passes: list[int] = []
    module = Function(lambda w, x: (x * w, x * w * 3))
    backend = make_backend("ffn.0", module)
    module.weight.register_hook(lambda gradient: passes.append(1))
    backend.backward(torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 4))
    assert passes == [1]


@pytest.mark.parametrize("where", ["forward", "backward", "step"])
def test_a_failing_expert_leaves_no_half_gradient(where: str) -> None:
    backend = make_backend("ffn.0", optimizer=torch.optim.Adam)
    before = copy.deepcopy(backend.expert.state_dict())
    broken = True

    def maybe_fail(*_: Any) -> None:
        if broken:
            raise RuntimeError("broken on purpose")

    if where == "forward":
        backend.expert[2].register_forward_hook(maybe_fail)
    elif where == "backward":
        backend.expert[0].weight.register_hook(maybe_fail)  # the last layers have their gradients by then
    else:
        backend.opt.register_step_pre_hook(maybe_fail)
    x, gradient = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="on purpose"):
        backend.backward(x, gradient)
    assert all(parameter.grad is None for parameter in backend.expert.parameters())
    assert all(map(same_bits, before.values(), backend.expert.state_dict().values()))
    assert backend.update_count == 0

    broken = False
    fresh = make_backend("ffn.0", optimizer=torch.optim.Adam)
    assert same_bits(backend.backward(x, gradient)[0], fresh.backward(x, gradient)[0])
    assert all(map(same_bits, backend.expert.parameters(), fresh.expert.parameters()))


def test_outputs_of_another_structure_than_the_schema_fail() -> None:
    answers: list[Any] = []
    backend = backend_of(lambda w, x: (x * w, x) if answers else x * w)
    answers.append(1)
    with pytest.raises(SchemaError, match=r"ffn\.0"):
        backend.backward(torch.ones(2, 4), torch.ones(2, 4))


def test_callers_tensors_are_not_touched() -> None:
    backend = make_backend("ffn.0")
    x, gradient = torch.randn(3, 4), torch.randn(3, 4)
    copies = x.clone(), gradient.clone()
    backend.backward(x, gradient)
    assert not x.requires_grad
    assert x.grad is None
    assert same_bits(x, copies[0])
    assert same_bits(gradient, copies[1])


# ---------------------------------------------------------------------------------------------- everything


def test_get_info_and_get_pools() -> None:
    backend = make_backend("ffn.3.17", max_batch_size=32, min_batch_size=2, max_queue_delay_ms=5.0, priority=3)
    info = backend.get_info()
    assert info["forward_schema"] == ((P(4),), {})
    assert info["outputs_schema"] == P(4)
    assert info["keyword_names"] == ()
    assert info["updates"] == 0
    forward, backward = backend.get_pools()
    assert all(isinstance(pool, TaskPool) for pool in (forward, backward))
    assert (forward.uid, backward.uid) == ("ffn.3.17/forward", "ffn.3.17/backward")
    for pool in (forward, backward):
        assert (pool.max_batch_size, pool.min_batch_size, pool.priority) == (32, 2, 3)
    assert forward.process_function(torch.zeros(1, 4))[0].shape == (1, 4)
    assert "ffn.3.17: (FP32[batch, 4]) -> (FP32[batch, 4]), 0 updates" in repr(backend)


def test_a_backend_is_a_module_with_its_experts_parameters() -> None:
    backend = make_backend("ffn.0")
    assert isinstance(backend, nn.Module)
    assert list(backend.parameters()) == list(backend.expert.parameters())
    assert backend.device == torch.device("cpu")


@pytest.mark.parametrize("kind", ["ffn", "transformer", "nop", "det_dropout"])
def test_built_in_experts_train(kind: str) -> None:
    from p2pmoe.server.layers import make_expert

    options = {"seq_len": 3, "num_heads": 2} if kind == "transformer" else {}
    module, args, kwargs = make_expert(kind, 4, options)
    backend = make_backend(f"{kind}.0", module, args_schema=args, kwargs_schema=kwargs)
    inputs = [proto.make_zeros(2) for proto in nested_flatten(backend.forward_schema)]
    inputs[0].normal_()
    outputs = backend.forward(*inputs)
    gradients = backend.backward(*inputs, *map(torch.ones_like, outputs))
    assert [each.shape for each in gradients] == [each.shape for each in inputs]
    assert all(math.isfinite(each.float().sum()) for each in (*outputs, *gradients))


def test_it_is_the_public_name() -> None:
    assert p2pmoe.ExpertBackend is ExpertBackend


def test_an_expert_that_starts_in_place_is_trained_like_any_other():
    torch.manual_seed(7)
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    twin = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
    twin.load_state_dict(module.state_dict())
    backend = ExpertBackend(
        "ffn.0", module, torch.optim.SGD(module.parameters(), lr=0.1), args_schema=(BatchTensorProto(4),)
    )
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        x, gradient = torch.randn(5, 4), torch.randn(5, 4)
        leaf = x.clone().requires_grad_(True)
        twin(leaf).backward(gradient)
        (received,) = backend.backward(x.clone(), gradient)
        assert torch.equal(received, leaf.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert all(map(torch.equal, module.parameters(), twin.parameters()))
