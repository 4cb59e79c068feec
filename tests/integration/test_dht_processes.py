"""The DHT between real processes on loopback: declaring, finding, expiry, withdrawal, SIGKILL, clients."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("dht_child.py")
FFN = "ab" * 32
WAIT_S = 20


class Child:
    """A process with a DHT node in it."""

    def __init__(self, **options) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready = False

    def wait_ready(self) -> Child:
        hello = self._next()
        self.peer_id, self.dht_address, self.crowd = hello["peer_id"], hello["dht_address"], hello["crowd"]
        self.ready = True
        return self

    def ask(self, command: str, **arguments):
        self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._next()

    def declare(self, uids, *, port: int, ttl_s: float = 60) -> None:
        assert self.ask("declare", schemas=dict.fromkeys(uids, FFN), port=port, ttl_s=ttl_s) is True

    def find(self, pattern: str) -> list[list]:
        return self.ask("find", pattern=pattern)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)

    def close(self) -> int:
        self.process.stdin.close()
        try:
            code = self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self._reader.join(WAIT_S)
            self.process.stdout.close()
        return code

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)

    def _next(self):
        return json.loads(self._lines.get(timeout=WAIT_S))


@pytest.fixture
def spawn():
    children: list[Child] = []

    def start(**options) -> Child:
        children.append(Child(**options))
        return children[-1]

    yield start
    codes = [child.close() for child in children]
    assert all(code in {0, -9} for code in codes), codes


@pytest.mark.slow
def test_declare_find_withdraw_expire_and_a_killed_provider(spawn, tmp_path):
    bootstrap = spawn().wait_ready()
    peers = (bootstrap.dht_address,)
    volunteers = [spawn(initial_peers=peers, key=str(tmp_path / f"{name}.pem")) for name in ("alice", "bob", "carol")]
    client = spawn(initial_peers=peers, client=True)
    alice, bob, carol = (child.wait_ready() for child in volunteers)
    client.wait_ready()

    alice.declare([f"ffn.0.{j}" for j in range(4)], port=1)
    bob.declare([f"ffn.1.{j}" for j in range(4)] + ["ffn.0.0"], port=2)
    carol.declare(["ffn.2.0"], port=3, ttl_s=3)
    declared_at = time.monotonic()
    assert len(client.find("ffn.*")) == 10
    assert client.find("ffn.0.0") == sorted([["ffn.0.0", alice.peer_id, 1], ["ffn.0.0", bob.peer_id, 2]])
    assert [uid for uid, *_ in client.find("ffn.1.")] == [f"ffn.1.{j}" for j in range(4)]
    assert client.find("ffn.2.*") == [["ffn.2.0", carol.peer_id, 3]]

    bob.ask("withdraw", uids=["ffn.1.3"])
    assert len(client.find("ffn.1.*")) == 3

    # A killed node refreshes nothing: what it declared is gone when it expires, the rest stays.
    carol.kill()
    deadline = declared_at + 8
    while client.find("ffn.2.*") and time.monotonic() < deadline:
        pass
    assert client.find("ffn.2.*") == []
    assert len(client.find("ffn.*")) == 8

    # The bootstrap node dies too: those who know one another go on.
    bootstrap.kill()
    assert len(client.find("ffn.*")) == 8
    alice.declare(["ffn.3.0"], port=1)
    assert client.find("ffn.3.0") == [["ffn.3.0", alice.peer_id, 1]]


@pytest.mark.slow
def test_four_processes_of_32_nodes(spawn):
    first = spawn(crowd=31).wait_ready()
    others = [spawn(crowd=31, initial_peers=(first.dht_address,)) for _ in range(3)]
    processes = [first, *(child.wait_ready() for child in others)]
    assert sum(child.crowd + 1 for child in processes) == 128
    for number, child in enumerate(processes):
        child.declare([f"ffn.{number}.{j}" for j in range(32)], port=number + 1)
    for child in processes:
        assert len(child.find("ffn.*")) == 128
    # A quarter of the network dies at once; what the others declared is found.
    processes[2].kill()
    for child in (processes[0], processes[3]):
        for number in (0, 1, 3):
            assert len(child.find(f"ffn.{number}.*")) == 32
