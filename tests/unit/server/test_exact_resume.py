"""An expert that goes on from a checkpoint: bit for bit as if nothing had happened, or refused in words."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from swarm_kit import make_backend
from torch import nn

from p2pmoe import BatchTensorProto
from p2pmoe.config import GateConfig, OptimizerConfig
from p2pmoe.errors import StateError
from p2pmoe.metrics import NodeMetrics
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.checkpoints import Checkpoint
from p2pmoe.server.expert_state import made_of, take
from p2pmoe.server.optimizers import OPTIMIZERS, make_optimizer
from p2pmoe.server.restoring import restore_experts
from p2pmoe.server.screening import guard_experts
from p2pmoe.server.state_folder import StateFolder
from p2pmoe.server.tensor_file import decode_tensors, encode_tensors

DIM = 4
Make = Callable[[], ExpertBackend]


def keep(folder: StateFolder, backend: ExpertBackend, swarm: str = "s", **changes: Any) -> None:
    state = take(backend)
    folder.write(
        backend.name,
        encode_tensors(state.tensors),
        lambda sequence, tensors: Checkpoint(
            **{
                "uid": backend.name,
                "sequence": sequence,
                "swarm": swarm,
                "incarnation": backend.birth.incarnation,
                "updates": state.updates,
                "schedule_step": state.schedule_step,
                "saved_at": 1e9,
                "wire_version": 1,
                "made": made_of(backend),
                "state": state.state,
                "tensors": tensors,
            }
            | changes
        ),
    )


@pytest.fixture
def folder(tmp_path: Path) -> StateFolder:
    folder = StateFolder(tmp_path)
    folder.open()
    yield folder
    folder.close()


def restore(folder: StateFolder, *backends: ExpertBackend, fresh: Any = "if_vacant", swarm: str = "s") -> Any:
    folder.close()
    folder.open()
    return restore_experts(folder, backends, swarm=swarm, fresh=fresh)


def step(backend: ExpertBackend, number: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(number)
    rows = [torch.randn(3, DIM, generator=generator) for _ in range(2)]
    return backend.backward(*rows)


def bits(backend: ExpertBackend) -> dict[str, Any]:
    """Everything that is kept, as bytes."""
    state = take(backend)
    return {
        name: (str(each.dtype), each.shape, bytes(each.reshape(-1).view(torch.uint8).tolist()))
        for name, each in state.tensors.items()
    } | {
        "options": state.state["options"],
        "updates": state.updates,
        "gate": state.state["gate"],
    }


def expert(config: OptimizerConfig, module: Callable[[], nn.Module] | None = None, seed: int = 0) -> ExpertBackend:
    torch.manual_seed(seed)
    made = module() if module else nn.Sequential(nn.Linear(DIM, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, DIM))
    backend = ExpertBackend("ffn.1", made, make_optimizer(made.parameters(), config), args_schema=BatchTensorProto(DIM))
    guard_experts([backend], GateConfig(warmup_calls=3), NodeMetrics())
    return backend


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sgd": [{}, {"momentum": 0.9, "nesterov": True}, {"foreach": True, "momentum": 0.9}],
    "adam": [{}, {"amsgrad": True}, {"foreach": False}],
    "rmsprop": [{}, {"centered": True, "momentum": 0.5}],
    "adagrad": [{}, {"lr_decay": 0.1}],
}
TABLE = [(name, options) for name in OPTIMIZERS for options in OPTIONS.get(name, [{}])]


@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 4, "decay": "cosine", "total_steps": 12}])
@pytest.mark.parametrize(("name", "options"), TABLE)
def test_the_next_updates_are_those_of_an_uninterrupted_run(
    folder: StateFolder, name: str, options: dict[str, Any], schedule: dict[str, Any]
) -> None:
    config = OptimizerConfig(name=name, options=options, lr=0.05, clip_grad_norm=0.3, **schedule)
    straight = expert(config)
    for number in range(5):
        step(straight, number)
    keep(folder, straight)
    resumed = expert(config, seed=99)  # what it is made with must not matter
    assert restore(folder, resumed).restored == {"ffn.1": 5}
    assert resumed.birth.incarnation == straight.birth.incarnation
    assert bits(resumed) == bits(straight)
    for number in range(5, 9):
        theirs, ours = step(straight, number), step(resumed, number)
        assert all(map(torch.equal, theirs, ours))
        assert bits(resumed) == bits(straight)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, DIM, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x.abs().long() % 6).sum(1) * x


@pytest.mark.parametrize(
    ("name", "options"), [("sgd", {"momentum": 0.9}), ("adagrad", {}), ("sparse_adam", {}), ("sgd", {})]
)
def test_sparse_gradients_go_on_exactly_too(folder: StateFolder, name: str, options: dict[str, Any]) -> None:
    config = OptimizerConfig(name=name, options=options, lr=0.05)
    straight, resumed = expert(config, Embedding), expert(config, Embedding, seed=99)
    for number in range(3):
        step(straight, number)
    keep(folder, straight)
    restore(folder, resumed)
    for number in range(3, 6):
        step(straight, number)
        step(resumed, number)
        assert bits(resumed) == bits(straight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_other_dtypes_come_back_bit_for_bit(folder: StateFolder, dtype: torch.dtype) -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(DIM))
            self.register_buffer("table", torch.randn(3, 2, dtype=torch.float32).to(dtype))
            self.register_buffer("mask", torch.tensor([float("-inf"), float("nan"), 0.0]), persistent=False)
            self.register_buffer("none", None)
            self.register_buffer("empty", torch.empty(0, 3))
            self.register_buffer("wide", torch.ones(1).expand(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    config = OptimizerConfig(name="adam")
    straight, resumed = expert(config, Buffers), expert(config, Buffers, seed=99)
    with torch.no_grad():
        straight.expert.mask[2] = 7.0
    step(straight, 0)
    keep(folder, straight)
    restore(folder, resumed)
    assert bits(resumed) == bits(straight)
    assert torch.equal(resumed.expert.table, straight.expert.table)


class Gathering(ExpertBackend):
    """Steps with the gradients of two batches, and says so as torch's modules do."""

    batches = 0

    def apply_gradients(self) -> None:
        self.batches += 1
        if self.batches % 2 == 0:
            super().apply_gradients()

    def get_extra_state(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


def test_gathered_gradients_and_what_a_backend_of_the_users_keeps_come_back(folder: StateFolder) -> None:
    def make(seed: int) -> Gathering:
        torch.manual_seed(seed)
        module = nn.Linear(DIM, DIM)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        return Gathering("ffn.1", module, optimizer, args_schema=BatchTensorProto(DIM))

    straight, resumed = make(0), make(99)
    for number in range(3):
        step(straight, number)
    assert straight.expert.weight.grad is not None
    keep(folder, straight)
    restore(folder, resumed)
    step(straight, 3)
    step(resumed, 3)
    assert (resumed.batches, resumed.update_count) == (4, 2)
    assert bits(resumed) == bits(straight)


def test_a_changed_learning_rate_holds_and_the_rest_goes_on(folder: StateFolder) -> None:
    before = expert(OptimizerConfig(name="adam", lr=0.05, warmup_steps=10))
    for number in range(4):
        step(before, number)
    keep(folder, before)
    after = expert(OptimizerConfig(name="adam", lr=0.01, warmup_steps=10))
    restore(folder, after)
    (group,) = after.opt.param_groups
    assert group["initial_lr"] == 0.01
    assert group["schedule_step"] == 4
    step(after, 4)
    assert group["lr"] == pytest.approx(0.01 * 5 / 10)


@pytest.mark.parametrize(
    ("other", "swarm", "reason"),
    [
        (lambda: make_backend("ffn.1", nn.Linear(DIM, DIM)), "s", "it is a Sequential, and a Linear is to be hosted"),
        (
            lambda: make_backend("ffn.1", dim=6),
            "s",
            r"its 0.bias was made as float32\[8\], and is float32\[12\] now",
        ),
        (
            lambda: make_backend("ffn.1", optimizer=torch.optim.Adam),
            "s",
            "it was trained with SGD, and is to be with Adam",
        ),
        (lambda: make_backend("ffn.1"), "t", "it is of the swarm 's', and this node is of 't'"),
        (
            lambda: make_backend("ffn.1", dtype=torch.float64),
            "s",
            r"its 0.bias was made as float32\[8\], and is float64\[8\] now",
        ),
    ],
)
def test_a_checkpoint_of_another_expert_is_refused_and_stays(
    folder: StateFolder, other: Make, swarm: str, reason: str
) -> None:
    keep(folder, make_backend("ffn.1"))
    backend = other()
    before = bits(backend)
    with pytest.raises(StateError, match=rf"ffn.1: its checkpoint at 0 updates in .* does not fit: {reason}. Nothing"):
        restore(folder, backend, swarm=swarm)
    assert bits(backend) == before
    assert len(folder.entries_of("ffn.1")) == 1


def test_other_options_of_a_configured_class_are_refused(folder: StateFolder) -> None:
    from p2pmoe.config import BatchingConfig, ExpertsConfig
    from p2pmoe.server.hosting import make_backends

    def make(**options: Any) -> ExpertBackend:
        experts = ExpertsConfig(uids=("ffn.1",), hidden_dim=8, **options)
        return make_backends(experts, BatchingConfig(), OptimizerConfig(), ["cpu"])[0]

    keep(folder, make(options={"inner_dim": 4}))
    with pytest.raises(StateError, match=r'made with experts.options = {"inner_dim":4}, and is to be hosted with {}'):
        restore(folder, make())
    with pytest.raises(StateError, match=r'made with experts.kind = "ffn", and is to be hosted with "transformer"'):
        restore(folder, make(kind="transformer"))
    restore(folder, make(options={"inner_dim": 4}))


def test_what_fresh_says_is_done(folder: StateFolder, caplog: pytest.LogCaptureFixture) -> None:
    old = make_backend("ffn.1")
    step(old, 0)
    with pytest.raises(StateError, match=r"ffn.1: there is no checkpoint of it in .*, and experts.fresh = 'never'"):
        restore(folder, make_backend("ffn.1"), fresh="never")
    assert restore(folder, make_backend("ffn.1")).begun == ["ffn.1"]
    keep(folder, old)
    assert restore(folder, make_backend("ffn.1"), fresh="never").restored == {"ffn.1": 1}
    new = make_backend("ffn.1")
    result = restore(folder, new, fresh="always")
    assert result.thrown_away == {"ffn.1": 1}
    assert result.describe() == "1 thrown away as experts.fresh says (ffn.1 at 1)"
    assert new.update_count == 0
    assert new.birth.incarnation != old.birth.incarnation


def test_the_one_before_a_broken_checkpoint_is_gone_on_from(
    folder: StateFolder, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend("ffn.1")
    keep(folder, backend)
    step(backend, 0)
    keep(folder, backend)
    (folder.path / "expert-ffn.1@000000000002.safetensors").write_bytes(b"")
    resumed = make_backend("ffn.1")
    with caplog.at_level(logging.WARNING):
        assert restore(folder, resumed).restored == {"ffn.1": 0}
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the checkpoint at 1 updates" in line
    assert "has 0 bytes instead of" in line


def lacking(part: str, name: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        del state[part][name]

    return change


def replaced(part: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state[part] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lacking("parameters", "0.weight"),
        replaced("parameters", 3),
        replaced("parameters", {"0.weight": {"tensor": "nowhere"}}),
        replaced("optimizer", {"77": {"dict": {}}}),
        replaced("optimizer", {"0": {"tensor": "parameter/0.weight"}}),
        replaced("born", None),
        replaced("options", [{"dict": {}}, {"dict": {}}]),
        replaced("buffers", {"x": {"sparse": {"size": [1], "indices": 0, "values": 0}}}),
        replaced("gate", {"callers": 7}),
    ],
)
def test_a_made_up_state_is_refused_in_words(folder: StateFolder, change: Callable[[dict[str, Any]], None]) -> None:
    backend = make_backend("ffn.1")
    guard_experts([backend], GateConfig(), NodeMetrics())
    state = take(backend).state
    change(state)
    keep(folder, backend, state=state)
    fresh = make_backend("ffn.1")
    guard_experts([fresh], GateConfig(), NodeMetrics())
    with pytest.raises(StateError, match=r"ffn.1: its checkpoint at 0 updates in .* does not fit"):
        restore(folder, fresh)


def test_other_libraries_read_the_tensors(folder: StateFolder) -> None:
    backend = make_backend("ffn.1", optimizer=torch.optim.Adam)
    step(backend, 0)
    keep(folder, backend)
    tensors = decode_tensors(folder.newest("ffn.1").tensors_path)  # type: ignore[union-attr]
    assert torch.equal(tensors["parameter/0.weight"], backend.expert[0].weight)
    assert tensors["optimizer/0/step"].item() == 1.0


class Odd(torch.optim.SGD):
    """Keeps what no file can hold."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["odd"] = object()


def test_what_no_file_can_hold_is_said_by_name(folder: StateFolder) -> None:
    backend = make_backend("ffn.1", optimizer=Odd)
    step(backend, 0)
    with pytest.raises(StateError, match=r"optimizer/0/odd: object cannot be kept; numbers, texts, lists, dicts and"):
        take(backend)


def test_no_copy_shares_memory_with_the_expert() -> None:
    backend = make_backend("ffn.1", optimizer=torch.optim.Adam)
    step(backend, 0)
    state = take(backend)
    before = {name: each.clone() for name, each in state.tensors.items()}
    step(backend, 1)
    assert all(torch.equal(each, before[name]) for name, each in state.tensors.items())
