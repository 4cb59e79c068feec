"""When checkpoints are written, what a bad disk does to serving, and what a node's end still writes."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from swarm_kit import WAIT_S, make_backend

import p2pmoe
from p2pmoe import forks
from p2pmoe.config import StateConfig
from p2pmoe.errors import ConfigError, StateError
from p2pmoe.server import state_files
from p2pmoe.server.applied_calls import MAX_KEPT_IDS, AppliedCalls
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.checkpointer import Checkpointer
from p2pmoe.server.replay import MAX_IDS, WINDOW_S
from p2pmoe.server.runtime import Runtime
from p2pmoe.server.state_folder import StateFolder
from p2pmoe.server.task_pool import Task

LATE_S = 3600.0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.005)


class Desk:
    """One expert, its device, its folder, its checkpointer."""

    def __init__(self, path: Path, config: StateConfig, backend: ExpertBackend | None = None) -> None:
        self.backend = backend or make_backend("ffn.1")
        self.folder = StateFolder(path)
        self.folder.open()
        self.runtime = Runtime(self.backend.get_pools())
        self.runtime.start()
        self.applied = AppliedCalls()
        self.checkpointer = Checkpointer(
            self.folder, config, swarm="s", runtimes={self.backend: self.runtime}, applied=self.applied
        )

    def train(self, times: int = 1) -> None:
        """On the device thread, as a batch would."""
        done = threading.Event()

        def job() -> None:
            for _ in range(times):
                self.backend.backward(torch.ones(1, 4), torch.ones(1, 4))
                self.checkpointer.note("ffn.1", [])
            done.set()

        self.runtime.between_batches(job)
        assert done.wait(WAIT_S)

    def kept(self) -> list[int]:
        return [entry.updates for entry in self.folder.entries]

    def close(self, timeout_s: float = WAIT_S) -> None:
        self.runtime.close()
        self.checkpointer.close(timeout_s)


@pytest.fixture
def open_desk(tmp_path: Path, no_new_threads: None) -> Iterator[Callable[..., Desk]]:
    desks = []

    def open_one(backend: ExpertBackend | None = None, **config: Any) -> Desk:
        config = {"every_s": LATE_S, "every_updates": 1000} | config
        desks.append(Desk(tmp_path, StateConfig(path=str(tmp_path), **config), backend))
        return desks[-1]

    yield open_one
    for desk in desks:
        desk.close()


def test_a_checkpoint_comes_after_so_many_updates(open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(every_updates=3)
    desk.checkpointer.start()
    desk.train(2)
    assert desk.kept() == []
    desk.train()
    until(lambda: desk.checkpointer.written == 1, "the first checkpoint")
    assert desk.kept() == [3]


def test_a_checkpoint_comes_after_so_many_seconds(open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(every_s=0.05)
    desk.checkpointer.start()
    desk.train()
    until(lambda: desk.checkpointer.written == 1, "the first checkpoint")
    assert desk.kept() == [1]


def test_nothing_is_written_while_nothing_changes(open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(every_s=0.01)
    desk.checkpointer.start(["ffn.1"])
    until(lambda: desk.checkpointer.written == 1, "that of an expert that has none")
    desk.close()
    assert desk.checkpointer.written == 1


def test_the_end_writes_what_is_in_none(open_desk: Callable[..., Desk]) -> None:
    desk = open_desk()
    desk.checkpointer.start()
    desk.train(7)
    desk.close()
    assert desk.kept() == [7]
    other = StateFolder(desk.folder.path)
    other.open()
    other.close()


def test_the_end_waits_for_no_expert_that_hangs(
    open_desk: Callable[..., Desk], caplog: pytest.LogCaptureFixture
) -> None:
    desk = open_desk()
    desk.checkpointer.start()
    desk.train()
    with desk.backend.at_rest(), caplog.at_level(logging.WARNING):
        started = time.monotonic()
        desk.close(0.2)
        assert time.monotonic() - started < 3.0
    assert "1 experts have learnt what is in no checkpoint: there were 0.2 s to write it in" in caplog.text


def test_a_full_disk_is_one_line_and_serving_goes_on(
    open_desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk = open_desk(every_updates=1)
    full = True

    def fsync(descriptor: int) -> None:
        if full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_files.os, "fsync", fsync)
    monkeypatch.setattr("p2pmoe.server.checkpointer._AGAIN_S", 0.01)
    desk.checkpointer.start()
    with caplog.at_level(logging.WARNING):
        desk.train()
        until(lambda: desk.checkpointer.failed >= 3, "three attempts")
        desk.train(2)
    assert len(caplog.records) == 1
    assert "No space left on device; serving goes on, 1 experts have learnt what is in none" in caplog.text
    assert [path.name for path in desk.folder.path.glob("*expert*")] == []
    full = False
    until(lambda: desk.kept()[:1] == [3], "the disk is used again")


class Unkeepable(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state[self.param_groups[0]["params"][0]]["odd"] = object()
        super().step()


def test_an_expert_that_no_file_can_hold_is_named_once(
    open_desk: Callable[..., Desk], caplog: pytest.LogCaptureFixture
) -> None:
    desk = open_desk(make_backend("ffn.1", optimizer=Unkeepable), every_updates=1)
    desk.checkpointer.start()
    with caplog.at_level(logging.WARNING):
        desk.train(3)
        until(lambda: desk.checkpointer.failed == 1, "the attempt")
        desk.train(3)
        desk.close()
    assert len(caplog.records) == 1
    assert "ffn.1 cannot be kept, and what it learns is lost when the node ends" in caplog.text


def test_a_copy_is_never_of_half_a_batch(open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(every_updates=1)
    desk.checkpointer.start()
    for _ in range(20):
        desk.train()
    desk.close()
    found = desk.folder
    found.open()
    entry = found.newest("ffn.1")
    assert entry is not None
    assert entry.checkpoint.updates == 20
    found.close()


def test_ids_of_calls_are_bounded_in_time_in_all_and_in_one_checkpoint() -> None:
    now = [0.0]
    calls = AppliedCalls(clock=lambda: now[0])
    calls.add("ffn.1", ["old"])
    now[0] = WINDOW_S / 2
    calls.add("ffn.1", (str(number) for number in range(MAX_IDS + 5)))
    assert len(calls.of("ffn.1")) == MAX_KEPT_IDS
    assert calls.of("ffn.1")[-1] == (str(MAX_IDS + 4), 0.0)
    assert f"{MAX_IDS} ids of 1 experts" in repr(calls)
    now[0] = 2 * WINDOW_S
    calls.add("ffn.2", ["new"])
    assert calls.of("ffn.1") == []
    assert "1 ids of 1 experts" in repr(calls)
    calls.restore([("a", "ffn.3", 10.0), ("b", "ffn.3", WINDOW_S + 1.0)])
    assert calls.of("ffn.3") == [("a", 10.0)]


async def test_a_node_refuses_what_it_cannot_keep_to(tmp_path: Path) -> None:
    never = p2pmoe.NodeConfig.from_tree({"experts": {"fresh": "never"}})
    with pytest.raises(ConfigError, match=r"experts.fresh = 'never' needs state.path"):
        await p2pmoe.Node(never, [make_backend("ffn.1")]).start()
    (tmp_path / "file").write_text("")
    config = p2pmoe.NodeConfig(state=StateConfig(path=str(tmp_path / "file")))
    with pytest.raises(StateError, match=r"state.path: .*file cannot be used: File exists; name a folder"):
        await p2pmoe.Node(config, [make_backend("ffn.1")]).start()


async def test_two_nodes_do_not_share_a_folder_and_the_second_leaves_it_alone(tmp_path: Path) -> None:
    config = p2pmoe.NodeConfig(state=StateConfig(path=str(tmp_path)))
    async with p2pmoe.Node(config, [make_backend("ffn.1")]):
        with pytest.raises(StateError, match="is in use by another node"):
            await p2pmoe.Node(config, [make_backend("ffn.1")]).start()
    async with p2pmoe.Node(config, [make_backend("ffn.1")]) as node:
        assert node.backends[0].update_count == 0


async def test_a_read_only_folder_is_said_and_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = p2pmoe.NodeConfig(state=StateConfig(path=str(tmp_path)))
    first = make_backend("ffn.1")
    first.backward(torch.ones(1, 4), torch.ones(1, 4))
    async with p2pmoe.Node(config, [first]):
        pass

    def refuse(self: StateFolder) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(StateFolder, "open", refuse)
    with caplog.at_level(logging.WARNING):
        async with p2pmoe.Node(config, [make_backend("ffn.1")]) as node:
            assert node.backends[0].update_count == 1
    assert "Read-only file system; what the experts learn is lost when this node ends" in caplog.text


def test_tasks_carry_the_id_of_their_call() -> None:
    assert Task((), 0, None, 0.0, None, call_id="a").call_id == "a"  # type: ignore[arg-type]


@pytest.mark.skipif(not forks.CAN_FORK, reason="this system does not fork")
def test_a_forked_child_leaves_the_folder_to_its_parent(tmp_path: Path) -> None:
    code = f"""
import os, sys, warnings
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import torch
from swarm_kit import make_backend
import p2pmoe
from p2pmoe import forks
from p2pmoe.config import StateConfig
from p2pmoe.node import background_node
warnings.simplefilter("ignore")
backend = make_backend("ffn.1")
with background_node(p2pmoe.NodeConfig(state=StateConfig(path={str(tmp_path)!r})), [backend]) as node:
    child = os.fork()
    if not child:
        sys.exit(0)  # everything that it inherited is finalized
    assert os.waitpid(child, 0)[1] == 0
    backend.backward(torch.ones(1, 4), torch.ones(1, 4))
    node.handlers.on_applied("ffn.1", [])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=40)
    folder = StateFolder(tmp_path)
    folder.open()
    try:
        assert [entry.updates for entry in folder.entries] == [1]
        assert folder.check(folder.entries[0]) is None
    finally:
        folder.close()
