"""Nodes that end, in order or not, and go on where they were."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_processes import Command
from swarm_kit import WAIT_S, make_backend, open_world

import p2pmoe
from p2pmoe.config import DHTConfig, HttpConfig, StateConfig
from p2pmoe.errors import ExpertRebornError, ReplayConflictError
from p2pmoe.protocol.frames import Frame
from p2pmoe.protocol.messages import RequestHeader, RequestParameters, TensorHeader
from p2pmoe.server.state_folder import StateFolder
from p2pmoe.types import LOCAL_CALLER

WRITER = Path(__file__).parent / "checkpoint_writer.py"


def settings(path: Path, **state: object) -> p2pmoe.NodeConfig:
    return p2pmoe.NodeConfig(state=StateConfig(path=str(path), **state), http=HttpConfig(tls=False), dht=DHTConfig())


def call(call_id: str, number: int) -> Frame[RequestHeader]:
    torch.manual_seed(number)
    tensors = (torch.randn(2, 4), torch.randn(2, 4))
    headers = tuple(TensorHeader(str(index), "FP32", (2, 4)) for index in range(2))
    parameters = RequestParameters(direction="backward")
    return Frame(RequestHeader(id=call_id, model_name="ffn.1", inputs=headers, parameters=parameters), tensors)


async def apply(node: p2pmoe.Node, call_id: str, number: int) -> torch.Tensor:
    assert node.handlers is not None
    frame = call(call_id, number)
    node.handlers.admit(frame.header, LOCAL_CALLER)
    future = node.handlers.submit(frame, LOCAL_CALLER)
    node.handlers.flush()
    async with asyncio.timeout(WAIT_S):
        return (await future)[0]


async def test_an_orderly_restart_changes_nothing_but_the_process(tmp_path: Path) -> None:
    straight = make_backend("ffn.1", optimizer=torch.optim.Adam)
    answers = [straight.backward(*call("", number).tensors)[0] for number in range(6)]
    incarnations = set()
    for first in (0, 3):
        backend = make_backend("ffn.1", optimizer=torch.optim.Adam, seed=first)
        async with p2pmoe.Node(settings(tmp_path), [backend]) as node:
            for number in range(first, first + 3):
                assert torch.equal(await apply(node, f"id {number}", number), answers[number])
            assert backend.update_count == first + 3
            incarnations.add(backend.get_info()["incarnation"])
            if first:
                for number in range(6):  # also those of the run before
                    with contextlib.suppress(ReplayConflictError):
                        await apply(node, f"id {number}", number)
                assert backend.update_count == 6
                with pytest.raises(ReplayConflictError, match="backward id id 0 was applied already"):
                    await apply(node, "id 0", 0)
    assert len(incarnations) == 1
    for name, parameter in straight.expert.named_parameters():
        assert torch.equal(parameter, dict(backend.expert.named_parameters())[name])


async def test_a_call_that_the_checkpoint_has_not_seen_may_come_again(tmp_path: Path) -> None:
    config = settings(tmp_path / "state", every_s=3600.0)
    async with p2pmoe.Node(config, [make_backend("ffn.1")]) as node:
        await apply(node, "a", 0)
    async with p2pmoe.Node(config, [make_backend("ffn.1")]) as node:
        await apply(node, "b", 1)
        shutil.copytree(tmp_path / "state", tmp_path / "before")
    shutil.rmtree(tmp_path / "state")  # as it was before "b" was written: as if the node had been killed
    shutil.copytree(tmp_path / "before", tmp_path / "state")
    backend = make_backend("ffn.1")
    async with p2pmoe.Node(config, [backend]) as node:
        assert backend.update_count == 1
        await apply(node, "b", 1)
        with pytest.raises(ReplayConflictError):
            await apply(node, "a", 0)
    assert backend.update_count == 2


def serve(home: Path, *more: str) -> Command:
    arguments = ["node", "--json", "--experts", "ffn.0,ffn.1", "--hidden-dim", "8", "--torch-threads", "1", *more]
    return Command(*arguments, XDG_DATA_HOME=str(home), LOCALAPPDATA=str(home), HOME=str(home))


def train(address: str, steps: int) -> list[float]:
    """The losses of some steps of learning y = -x with one expert."""
    losses = []
    generator = torch.Generator().manual_seed(0)
    with p2pmoe.Swarm([address]) as swarm:
        expert = swarm.expert("ffn.0")
        for _ in range(steps):
            x = torch.randn(16, 8, generator=generator)
            loss = (expert(x.requires_grad_()) + x).pow(2).mean()
            loss.backward()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("way", ["terminated", "killed"])
def test_a_node_of_the_command_line_goes_on_where_it_was(tmp_path: Path, way: str) -> None:
    with serve(tmp_path) as first:
        description = json.loads(first.stdout.next())
        before = train(description["dht_address"], 60)
        if way == "killed":
            until_kept(tmp_path, 50)
            first.process.kill()
        else:
            first.process.terminate()
        first.process.wait(WAIT_S)
    with serve(tmp_path) as second:
        after = train(json.loads(second.stdout.next())["dht_address"], 3)
        second.process.terminate()
        second.process.wait(WAIT_S)
        log = second.stderr.wait_for_end()
    assert before[-1] < 0.8 * before[0]
    assert after[0] < 0.5 * (before[0] + before[-1])
    restored = next(line for line in log.splitlines() if "checkpoints in" in line)
    assert "restored (ffn.0 at " in restored
    assert "of each expert at most 50 updates or 10 s are lost if this node dies" in restored
    updates = int(re.split("ffn.0 at |[,)]", restored)[1])
    assert updates == 60 if way == "terminated" else updates >= 50


def until_kept(home: Path, updates: int) -> None:
    """Wait until a folder below has a checkpoint of so many updates of ffn.0, as the default says."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        for index in home.glob("**/index.sqlite"):
            folder = StateFolder(index.parent)
            folder.look()
            if any(entry.uid == "ffn.0" and entry.updates >= updates for entry in folder.entries):
                return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of {updates} updates")


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_writer_that_is_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    print(f"seed {seed}")
    for _ in range(int(os.environ.get("P2PMOE_TEST_KILLS", "20"))):  # scripts/kills asks for more
        end_one_writer(tmp_path, moments.uniform(0.0, 0.08))


def end_one_writer(path: Path, delay_s: float) -> None:
    """Kill a writer so long after it has begun, and look at what it left; see checkpoint_writer.py."""
    with subprocess.Popen([sys.executable, str(WRITER), str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
        finished = [int(line) for line in writer.stdout.read().split()]
        writer.wait(WAIT_S)
    folder = StateFolder(path)
    folder.open()
    try:
        for uid in folder.uids:
            found = folder.newest(uid)  # raises when none can be read
            assert found is not None
            assert [entry for entry in folder.entries_of(uid) if entry.is_bad] == []
            if finished:
                assert found.checkpoint.updates >= finished[-1], "older than the last that was finished"
    finally:
        folder.close()


@pytest.mark.parametrize("on_rebirth", ["log", "raise"])
def test_trainers_see_that_an_expert_is_another_one_or_has_lost_updates(on_rebirth: Any, carrier: str) -> None:
    x = torch.ones(2, 4)
    backend = make_backend("ffn.1")
    with open_world({"alice": [backend]}, carrier=carrier, on_rebirth=on_rebirth) as world:
        swarm = world.swarm
        expert = swarm.expert("ffn.1")
        expert(x.clone().requires_grad_()).sum().backward()
        expert(x)
        age = swarm.ages.of("ffn.1")
        assert age is not None
        assert (age.incarnation, age.updates) == (backend.get_info()["incarnation"], 1)
        backend.update_count, backend.birth.run = 0, "other"  # as a restored one
        expect(on_rebirth, "ffn.1 went on from a checkpoint: it had 1 updates, and has 0 now", expert, x)
        backend.birth.incarnation = "f" * 32
        expect(on_rebirth, "ffn.1 is another expert than before: it had 0 updates", expert, x)
        expert(x)
        assert (swarm.ages.rebirths, swarm.ages.setbacks, swarm.ages.updates_lost) == (1, 1, 1)


def expect(on_rebirth: str, message: str, expert: torch.nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(ExpertRebornError, match=message) if on_rebirth == "raise" else contextlib.nullcontext():
        expert(x)
