"""A trainer that forks while it calls: what the children may do, and that the parent loses nothing.

python fork_script.py fork|exit|loader    prints one JSON line
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from swarm_kit import grid_backends

import p2pmoe
from p2pmoe.errors import ForkedError

QUICK_S = 3.0  # on a loaded machine
CALLS, THREADS, CHILDREN = 200, 4, 2
X = torch.ones(2, 4)


def outcome(function: Any) -> str:
    """What a use of an inherited object came to, and that it came at once."""
    started = time.monotonic()
    try:
        function()
        said = "nothing"
    except ForkedError as error:
        said = f"ForkedError: {error}"
    except BaseException as error:  # noqa: BLE001
        said = f"{type(error).__name__}: {error}"
    return said if time.monotonic() - started < QUICK_S else f"after {time.monotonic() - started:.1f} s: {said}"


class Trainer:
    """Calls from several threads, lone ones and those of the swarm's loop, while others fork."""

    def __init__(self, node: p2pmoe.Node) -> None:
        self.node = node
        self.swarm = p2pmoe.Swarm(initial_peers=[node.dht_address])
        self.swarm.start()
        self.experts = [self.swarm.expert(f"ffn.0.{index}") for index in range(2)]
        self.moe = p2pmoe.RemoteMixtureOfExperts(
            self.swarm, in_features=4, grid_size=(1, 2), uid_prefix="ffn", k_best=2
        )
        self.right = [expert(X) for expert in self.experts]
        self.graph = self.experts[0](X.clone().requires_grad_())
        self.moe(X)
        self.lost: list[str] = []
        self.done = 0

    def call(self, count: int, worker: int) -> None:
        for number in range(count):
            try:
                if worker % 2:
                    assert torch.equal(self.experts[number % 2](X), self.right[number % 2])
                elif number % 2:
                    self.moe(X)
                else:
                    answer = asyncio.run(self.experts[0].acall(X))
                    assert torch.equal(answer, self.right[0])
            except Exception as error:  # noqa: BLE001
                self.lost.append(repr(error))
            self.done += 1

    def call_around(self, function: Any) -> None:
        """`function` again and again while the calls are under way."""
        threads = [threading.Thread(target=self.call, args=(CALLS // THREADS, each)) for each in range(THREADS)]
        for thread in threads:
            thread.start()
        function()
        for thread in threads:
            thread.join()

    def report(self, **more: Any) -> None:
        standing = [repr(each) for each in self.swarm.trust.standing.snapshot()]
        print(json.dumps({"lost": self.lost, "done": self.done, "standing": standing} | more), flush=True)


def in_child(trainer: Trainer, *, anew: bool) -> dict[str, str]:
    """Every inherited object, then a swarm of the child's own."""
    swarm, node = trainer.swarm, trainer.node
    said = {
        "expert": outcome(lambda: trainer.experts[0](X)),
        "awaited": outcome(lambda: asyncio.run(trainer.experts[0].acall(X))),
        "mixture": outcome(lambda: trainer.moe(X)),
        "new expert": outcome(lambda: swarm.expert("ffn.0.1")(X)),
        "backward": outcome(lambda: trainer.graph.sum().backward()),
        "find": outcome(lambda: swarm.find_experts("ffn.*")),
        "start": outcome(swarm.start),
        "directory": outcome(lambda: asyncio.run(swarm.directory.find_providers("never_read.9"))),
        "dht": outcome(lambda: asyncio.run(node.dht.get("ffn."))),
        "dht start": outcome(node.dht.start),
        "node": outcome(lambda: asyncio.run(node.start())),
        "device": outcome(lambda: asyncio.run(submit(node))),
        "close": outcome(swarm.close),
        "node close": outcome(lambda: asyncio.run(node.close())),
    }
    if anew:
        with p2pmoe.Swarm(initial_peers=[node.dht_address]) as own:
            y = own.expert("ffn.0.0")(X.clone().requires_grad_())
            y.sum().backward()
            said["own swarm"] = str(torch.equal(y, trainer.right[0]))
    return said


async def submit(node: p2pmoe.Node) -> None:
    await node.backends[0].forward_pool.submit_task(X)


def fork_all(trainer: Trainer, *, exits: bool) -> list[Any]:
    """Children one after the other; what the first one said, and how each ended."""
    reports: list[Any] = []
    for number in range(CHILDREN):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)
                said = in_child(trainer, anew=number == 0)
                if exits:
                    del trainer
                gc.collect()
                os.write(writing, json.dumps(said).encode())
            except BaseException as error:  # noqa: BLE001
                os.write(writing, json.dumps({"died": repr(error)}).encode())
                os._exit(1)
            if exits:
                sys.exit(0)  # everything inherited is finalized
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            said = json.loads(stream.read() or b"{}")
        _, status = os.waitpid(child, 0)
        reports.append([said, os.waitstatus_to_exitcode(status)])
    return reports


class FromTheSwarm(torch.utils.data.Dataset[torch.Tensor]):
    """What a user tries: a data set that asks the swarm."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.trainer.experts[0](X)


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index))


def train_with_a_loader(trainer: Trainer) -> None:
    for _ in range(2):
        loader = torch.utils.data.DataLoader(Numbers(), batch_size=8, num_workers=2, multiprocessing_context="fork")
        for batch in loader:
            batch.requires_grad_()
            trainer.moe(batch).sum().backward()
            trainer.done += 1


def main(what: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork beside threads
    with p2pmoe.background_node(backends=grid_backends([0], lr=0.0)) as node:
        trainer = Trainer(node)
        if what in ("fork", "exit"):
            reports: list[Any] = []
            trainer.call_around(lambda: reports.extend(fork_all(trainer, exits=what == "exit")))
            trainer.report(children=reports)
        elif what == "loader":
            trainer.call_around(lambda: train_with_a_loader(trainer))
            asking = torch.utils.data.DataLoader(
                FromTheSwarm(trainer), num_workers=1, multiprocessing_context="fork", timeout=20
            )
            trainer.report(asked=outcome(lambda: next(iter(asking))))
        trainer.swarm.close()


if __name__ == "__main__":
    main(sys.argv[1])
