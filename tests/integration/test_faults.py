"""Real processes that die: training goes on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from swarm_kit import WAIT_S, make_ffn, same_bits
from torch import nn

import p2pmoe
from p2pmoe.config import DHTConfig
from p2pmoe.errors import BootstrapError, ExpertNotFoundError, PeerUnreachableError

SCRIPT = Path(__file__).with_name("node_process.py")
START_S = 40.0


class NodeProcess:
    """A node in a process of its own; dies when the test says so."""

    def __init__(self, initial_peer: str, *uids: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), initial_peer, *uids],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.dht_address = ""

    def wait_until_ready(self) -> str:
        """The address it prints, read with a bound."""
        assert self._process.stdout is not None
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        reader.join(START_S)
        assert self.dht_address, f"the node did not start: {self._process.poll()}"
        return self.dht_address

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.dht_address = self._process.stdout.readline().strip()

    def kill(self) -> None:
        """SIGKILL: no withdrawal, no goodbye."""
        self._process.kill()
        self._process.wait(WAIT_S)

    def close(self) -> int:
        """End of standard input: it leaves in order."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            return self._process.wait(WAIT_S)
        finally:
            self._process.kill()
            self._process.wait(WAIT_S)
            self._process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def swarm_of_processes() -> Iterator[dict[str, NodeProcess]]:
    """alice knows nobody; bob and carol join her. Every expert has a replica, but ffn.1.1 is carol's alone."""
    with contextlib.ExitStack() as stack:

        def start(initial_peer: str, *uids: str) -> NodeProcess:
            node = NodeProcess(initial_peer, *uids)
            stack.callback(node.close)
            return node

        alice = start("-", "ffn.0.0", "ffn.0.1", "ffn.1.0", "only.0")
        address = alice.wait_until_ready()
        bob = start(address, "ffn.0.0", "ffn.1.0", "twin.0")
        carol = start(address, "ffn.1.1", "ffn.0.1", "twin.0")
        bob.wait_until_ready()
        carol.wait_until_ready()
        yield {"alice": alice, "bob": bob, "carol": carol}


@pytest.mark.timeout(120)
def test_training_goes_on_when_a_node_is_killed(swarm_of_processes: dict[str, NodeProcess]) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    target = torch.tanh(x @ torch.randn(8, 8)) * 2
    with p2pmoe.Swarm(initial_peers=[swarm_of_processes["alice"].dht_address]) as swarm:
        moe = p2pmoe.RemoteMixtureOfExperts(
            swarm, in_features=8, grid_size=(2, 2), uid_prefix="ffn", k_best=4, forward_timeout_s=10.0
        )
        head = nn.Linear(8, 8)
        optimizer = torch.optim.Adam([*moe.parameters(), *head.parameters()], lr=0.01)
        losses = []
        for step in range(80):
            if step == 40:
                swarm_of_processes["carol"].kill()
            optimizer.zero_grad()
            loss = (head(moe(x)) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(torch.isfinite(torch.tensor(losses)))
        assert losses[39] < losses[0] * 0.9
        assert min(losses[70:]) < losses[39] * 0.97, "it went on to fall"


@pytest.mark.timeout(120)
def test_a_replica_answers_when_its_twin_is_dead(swarm_of_processes: dict[str, NodeProcess]) -> None:
    """carol was killed above, or is killed here; bob hosts the same expert with the same parameters."""
    with p2pmoe.Swarm(initial_peers=[swarm_of_processes["alice"].dht_address]) as swarm:
        expert = swarm.expert("twin.0")
        swarm_of_processes["carol"].kill()
        x = torch.randn(4, 8, requires_grad=True)
        y = expert(x)
        assert same_bits(y, make_ffn("twin.0", 8)(x))
        y.sum().backward()
        assert x.grad is not None


@pytest.mark.timeout(120)
def test_the_only_host_is_killed(swarm_of_processes: dict[str, NodeProcess]) -> None:
    alice, bob = swarm_of_processes["alice"], swarm_of_processes["bob"]
    with p2pmoe.Swarm(initial_peers=[alice.dht_address, bob.dht_address]) as swarm:
        expert = swarm.expert("only.0", forward_timeout_s=5.0)
        x = torch.randn(4, 8)
        expert(x)
        alice.kill()
        with pytest.raises((PeerUnreachableError, ExpertNotFoundError)):
            expert(x)
        assert swarm.expert("ffn.1.0")(x).shape == (4, 8), "bob still answers"
    with p2pmoe.Swarm(initial_peers=[alice.dht_address, bob.dht_address]) as swarm:  # one that answers is enough
        assert swarm.expert("twin.0")(x).shape == (4, 8)
    impatient = DHTConfig(initial_peers=(alice.dht_address,), join_timeout_s=0.5)
    with pytest.raises(BootstrapError), p2pmoe.Swarm(dht_config=impatient):
        pass
    assert bob.close() == 0
