"""Built-in experts, the register of the user's own, optimizers by name, and the backends that a config asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from swarm_kit import same_bits
from torch import nn

from p2pmoe import BatchTensorProto, register_expert_class
from p2pmoe.config import BatchingConfig, ExpertsConfig, LimitsConfig, OptimizerConfig
from p2pmoe.errors import ConfigError, InvalidUidError, SchemaError
from p2pmoe.server.hosting import check_limits, make_backends
from p2pmoe.server.layers import expert_classes, make_expert
from p2pmoe.server.optimizers import OPTIMIZERS, make_optimizer, schedule_factor


@pytest.fixture(autouse=True)
def own_register() -> Iterator[None]:
    before = dict(expert_classes)
    yield
    expert_classes.clear()
    expert_classes.update(before)


def backends(uids: tuple[str, ...] = ("ffn.0",), devices: tuple[str, ...] = ("cpu",), **experts: Any) -> list[Any]:
    optimizer = OptimizerConfig(name="sgd", lr=0.1)
    config = ExpertsConfig(uids=uids, **({"hidden_dim": 4} | experts))
    return make_backends(config, BatchingConfig(max_batch_size=77), optimizer, devices)


# -------------------------------------------------------------------------------------------------- layers


def test_the_built_in_kinds() -> None:
    assert {"ffn", "transformer", "nop", "det_dropout"} <= expert_classes.keys()
    ffn = make_expert("ffn", 8, {})[0]
    assert ffn.up.out_features == 32
    assert make_expert("ffn", 8, {"inner_dim": 3})[0].up.out_features == 3


def test_a_transformer_takes_one_length_or_any() -> None:
    assert make_expert("transformer", 8, {})[1] == (BatchTensorProto(64, 8),)
    assert make_expert("transformer", 8, {"seq_len": 0})[1] == (BatchTensorProto(None, 8),)


def test_nop_gives_a_copy() -> None:
    x = torch.randn(2, 4)
    y = make_expert("nop", 4, {})[0](x)
    assert same_bits(x, y)
    assert x.data_ptr() != y.data_ptr()


def test_deterministic_dropout_drops_what_the_mask_says() -> None:
    module, args, _ = make_expert("det_dropout", 4, {"dropout": 0.5})
    assert args == (BatchTensorProto(4), BatchTensorProto(4, dtype=torch.uint8))
    x, mask = torch.randn(3, 4), torch.tensor([[1, 0, 1, 0]] * 3, dtype=torch.uint8)
    changed = x.clone()
    changed[:, 1::2] = 9.0
    assert same_bits(module(x, mask), module(changed, mask))
    with pytest.raises(ConfigError, match="dropout"):
        make_expert("det_dropout", 4, {"dropout": 1.0})


def test_a_class_of_the_users_own() -> None:
    @register_expert_class("mine", lambda batch, hidden: {"x": torch.empty(batch, hidden), "i": BatchTensorProto()})
    class Mine(nn.Module):
        def __init__(self, hidden: int, *, scale: float = 1.0) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

    module, args, kwargs = make_expert("mine", 4, {"scale": 3.0})
    assert isinstance(module, Mine)
    assert module.scale.item() == 3.0
    assert (args, kwargs) == ((), {"x": BatchTensorProto(4), "i": BatchTensorProto()})
    with pytest.raises(ConfigError, match="already"):
        register_expert_class("mine", torch.empty)(nn.Identity)
    register_expert_class("mine", torch.empty)(Mine)  # imported twice


def test_what_is_no_sample_is_refused() -> None:
    register_expert_class("odd", lambda batch, hidden: (3,))(nn.Identity)
    with pytest.raises(SchemaError, match="int"):
        make_expert("odd", 4, {})


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [("who", {}, "unknown kind"), ("ffn", {"x": 1}, "hidden_dim=4"), ("transformer", {"num_heads": 3}, "transformer")],
)
def test_a_wrong_kind_or_option_is_a_config_error(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_expert(kind, 4, options)


def make_badly(hidden: int, *, error: BaseException) -> nn.Module:
    raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2"), KeyError("heads"), ImportError("no einops"), OSError(2, "weights.pt")]
)
@pytest.mark.parametrize("place", ["constructor", "sample_input"])
def test_whatever_a_class_raises_at_start_is_a_config_error_that_names_it(error: Exception, place: str) -> None:
    """RuntimeError and the like came out bare, `sample_input`'s TypeError too."""
    kind = f"raises-in-{place}-{type(error).__name__}"
    if place == "constructor":
        register_expert_class(kind, torch.empty)(make_badly)
        options, words = {"error": error}, f"experts.options: {kind} does not take hidden_dim=4"
    else:
        register_expert_class(kind, lambda batch, hidden: make_badly(hidden, error=error))(nn.Identity)
        options, words = {}, f"experts.kind: sample_input(3, 4) of {kind} failed"
    with pytest.raises(ConfigError) as caught:
        make_expert(kind, 4, options)
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith(str(error))
    assert caught.value.__cause__ is error


def test_a_sample_input_of_one_argument_and_a_class_that_makes_no_module() -> None:
    register_expert_class("one-argument", lambda hidden: torch.empty(3, hidden))(nn.Identity)
    with pytest.raises(ConfigError, match=r"sample_input\(3, 4\) of one-argument failed: TypeError: .*positional"):
        make_expert("one-argument", 4, {})
    register_expert_class("no-module", torch.empty)(lambda hidden: None)
    with pytest.raises(ConfigError, match=r"no-module gave a NoneType, which is no torch\.nn\.Module"):
        make_expert("no-module", 4, {})


# ---------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_by_name_steps(name: str) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([parameter], OptimizerConfig(name=name, lr=0.1))
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"name": "sgdd"}, "optimizer.name"),
        ({"options": {"momentun": 0.9}, "name": "sgd"}, "optimizer.options.momentun"),
        ({"options": {"lr": 0.9}}, "optimizer.options.lr"),
        ({"options": {"params": []}}, "optimizer.options.params"),
        ({"options": {"betas": [2.0, 3.0]}}, "optimizer.options"),
        ({"options": {"betas": "x"}}, "optimizer.options"),
        ({"decay": "linear"}, "optimizer.total_steps"),
    ],
)
def test_a_wrong_setting_names_its_key(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_optimizer([nn.Parameter(torch.ones(1))], OptimizerConfig(**options))


def test_gradients_are_clipped_to_the_total_norm() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([first, second], OptimizerConfig(name="sgd", lr=1.0, clip_grad_norm=5.0))
    first.grad, second.grad = torch.tensor([30.0]), torch.tensor([40.0])
    optimizer.step()
    assert (first.item(), second.item()) == pytest.approx((-3.0, -4.0), rel=1e-5)
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([0.0])
    optimizer.step()
    assert first.item() == pytest.approx(-6.0, rel=1e-5)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1]),
    ],
)
def test_warm_up_and_decay(decay: str, expected: list[float]) -> None:
    config = OptimizerConfig(
        name="sgd", lr=2.0, warmup_steps=4, decay=decay, total_steps=8, min_lr_ratio=0.1, clip_grad_norm=None
    )
    assert [schedule_factor(config, step) for step in range(10)] == pytest.approx(expected)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([parameter], config)
    for step in range(10):
        parameter.grad, before = torch.ones(1), parameter.item()
        optimizer.step()
        assert before - parameter.item() == pytest.approx(2.0 * expected[step], rel=1e-4)


def test_cosine_decay_ends_at_its_floor() -> None:
    config = OptimizerConfig(decay="cosine", total_steps=10, min_lr_ratio=0.2)
    assert schedule_factor(config, 0) == 1.0
    assert schedule_factor(config, 5) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert schedule_factor(config, 999) == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------------- hosting


def test_patterns_become_backends_with_the_batching_options() -> None:
    made = backends(("ffn.[0:2].[0:2]", "other.7"))
    assert sorted(each.name for each in made) == ["ffn.0.0", "ffn.0.1", "ffn.1.0", "ffn.1.1", "other.7"]
    assert all(pool.max_batch_size == 77 for each in made for pool in each.get_pools())


def test_a_seed_makes_every_uid_reproducible_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second = backends(("ffn.[0:2]",), seed=1), backends(("ffn.1", "ffn.0"), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    by_uid = {each.name: each.expert.up.weight for each in second}
    assert all(same_bits(each.expert.up.weight, by_uid[each.name]) for each in first)
    assert not same_bits(by_uid["ffn.0"], by_uid["ffn.1"])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"uids": ("ffn.[0:4000]",)}, ConfigError, r"4000 children .* 8 are allowed.*ffn\.\[0:64\]"),
        ({"uids": ("ffn.0", "ffn.[0:2]")}, ConfigError, "ffn.0 is named twice"),
        ({"uids": ("ffn.[0:2",)}, InvalidUidError, "ffn"),
        ({"devices": ("warp",)}, ConfigError, "devices"),
        ({"devices": ("cuda:99",)}, ConfigError, "devices"),
        ({"modules": ("no_such_module_at_all",)}, ConfigError, "no_such_module_at_all"),
        ({"modules": ("no_such_file.py",)}, ConfigError, "no_such_file.py"),
    ],
)
def test_a_wrong_expert_setting_is_one_clear_error(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        backends(**options)


@pytest.mark.parametrize("text", ["def f(:", "import no_such_module_at_all", "raise RuntimeError('mine')", "1 / 0"])
def test_a_broken_file_of_the_users_own_is_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"mine\.py"):
            backends(modules=(str(path),))


def test_a_file_of_the_users_own_registers_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\nfrom p2pmoe import register_expert_class\n"
        "@register_expert_class('from_file', lambda b, h: torch.empty(b, h))\n"
        "class Mine(torch.nn.Linear):\n    def __init__(self, h): super().__init__(h, 2)\n"
    )
    for _ in range(2):
        (made,) = backends(modules=(str(path),), kind="from_file")
        assert made.outputs_schema == BatchTensorProto(2)


def test_sections_are_immutable() -> None:
    with pytest.raises(AttributeError):
        OptimizerConfig().lr = 3.0  # type: ignore[misc]
    assert msgspec.structs.replace(OptimizerConfig(), lr=0.5).lr == 0.5


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_tensors": 1}, r"ffn\.0: a backward call of one row has 2 tensors, limits\.max_tensors = 1"),
        ({"max_rank": 1}, r"2 dimensions, limits\.max_rank = 1"),
        ({"max_elements": 3}, r"4 numbers in one tensor, limits\.max_elements = 3"),
        ({"max_body_bytes": 31}, r"32 bytes, limits\.max_body_bytes = 31"),
    ],
)
def test_an_expert_whose_every_call_would_be_refused_is_refused_itself(limits: dict[str, int], message: str) -> None:
    check_limits(backends(), LimitsConfig())
    with pytest.raises(ConfigError, match=message):
        check_limits(backends(), LimitsConfig(**limits))
