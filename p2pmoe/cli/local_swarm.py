"""A swarm of node processes on loopback, for the demo: started, watched, and always ended. Knows no training.

Each process gets a pipe as standard input and leaves when it ends (`--exit-with-parent`), so that none outlives us
even when we are killed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from p2pmoe.cli.settings import OF_THE_COMMAND, PREFIX
from p2pmoe.errors import LocalError

START_TIMEOUT_S: Final = 60.0
END_TIMEOUT_S: Final = 5.0
LOG_LINES: Final = 8


class NodeProcess:
    """One `p2pmoe node` process. Its settings and its log lie in the run's folder."""

    def __init__(self, name: str, folder: Path, settings: str) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        config_path = folder / f"{name}.toml"
        config_path.write_text(settings, encoding="utf-8")
        self._lines: queue.Queue[str] = queue.Queue()
        with self.log_path.open("wb") as log:
            self._process = _spawn(
                ["node", "-c", str(config_path), "--json", "--exit-with-parent", "--temporary-identity"], stderr=log
            )
        # A thread, for pipes cannot be waited for with a deadline on every system.
        self._reader = threading.Thread(target=self._read_output, name=f"p2pmoe-{name}", daemon=True)
        self._reader.start()

    def __repr__(self) -> str:
        return f"<NodeProcess {self.name}: pid {self._process.pid}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_serving(self, deadline: float) -> dict[str, Any]:
        """What the node says of itself once it serves. Raises LocalError with the end of its log."""
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise LocalError(
                f"{self.name} did not serve within {START_TIMEOUT_S:.0f} s; {self._end_of_log()}"
            ) from None
        if not line:
            code = self._process.wait(END_TIMEOUT_S)
            raise LocalError(f"{self.name} could not start, exit code {code}; {self._end_of_log()}")
        description: dict[str, Any] = json.loads(line)
        return description

    def ask_to_leave(self) -> None:
        """SIGTERM where there is such a thing."""
        self._process.terminate()

    def end(self, deadline: float) -> None:
        """Wait until it has left, and kill it at the deadline."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._reader.join(END_TIMEOUT_S)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _end_of_log(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return f"the end of {self.log_path}: " + (" | ".join(lines) or "(empty)")


class LocalSwarm:
    """A bootstrap node and volunteers that share a grid of experts. Use as `with`; leaving ends every process."""

    def __init__(
        self, folder: Path, *, nodes: int, grid: Sequence[int], hidden_dim: int, seed: int, uid_prefix: str = "ffn"
    ) -> None:
        self._folder = folder
        self._shares = split_evenly(grid_uids(uid_prefix, grid), nodes)
        self._hidden_dim, self._seed = hidden_dim, seed
        self._processes: list[NodeProcess] = []
        self._bootstrap: NodeProcess
        self.dht_address = ""
        self.names: dict[str, str] = {}
        """Peer id -> the name of its process."""

    def __repr__(self) -> str:
        return f"<LocalSwarm at {self.dht_address or 'nowhere yet'}: {len(self._processes)} processes>"

    @property
    def expert_count(self) -> int:
        return sum(map(len, self._shares))

    def begin(self) -> None:
        """Start the bootstrap's process and wait for nothing."""
        self._bootstrap = self._add("bootstrap", node_settings(self._hidden_dim, self._seed, (), ()))

    def complete(self) -> None:
        """When the bootstrap serves, start all volunteers together. Raises LocalError with the end of a log."""
        deadline = time.monotonic() + START_TIMEOUT_S
        self.dht_address = self._wait_for(self._bootstrap, deadline)
        volunteers = [
            self._add(f"node-{index}", node_settings(self._hidden_dim, self._seed, share, (self.dht_address,)))
            for index, share in enumerate(self._shares, start=1)
        ]
        for volunteer in volunteers:
            self._wait_for(volunteer, deadline)

    def close(self) -> None:
        """End every process: asked first, killed after a while."""
        for process in self._processes:
            process.ask_to_leave()
        deadline = time.monotonic() + END_TIMEOUT_S
        for process in self._processes:
            process.end(deadline)
        self._processes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, name: str, settings: str) -> NodeProcess:
        process = NodeProcess(name, self._folder, settings)
        self._processes.append(process)
        return process

    def _wait_for(self, process: NodeProcess, deadline: float) -> str:
        description = process.wait_until_serving(deadline)
        self.names[description["peer_id"]] = process.name
        return str(description["dht_address"])


def node_settings(hidden_dim: int, seed: int, uids: Sequence[str], initial_peers: Sequence[str]) -> str:
    """A node.toml. Lists of plain strings look the same in JSON and TOML."""
    return "\n".join(
        [
            "torch_threads = 1  # several nodes share the cores",
            "[experts]",
            f"uids = {json.dumps(list(uids))}",
            f"hidden_dim = {hidden_dim}",
            f"seed = {seed}",
            "[dht]",
            f"initial_peers = {json.dumps(list(initial_peers))}",
            "",
        ]
    )


def grid_uids(uid_prefix: str, grid: Sequence[int]) -> list[str]:
    """Every uid of a grid, in order."""
    return [".".join([uid_prefix, *map(str, place)]) for place in itertools.product(*map(range, grid))]


def split_evenly(uids: Sequence[str], parts: int) -> list[list[str]]:
    """Runs of neighbours whose lengths differ by one at most."""
    edges = [len(uids) * index // parts for index in range(parts + 1)]
    return [list(uids[start:end]) for start, end in itertools.pairwise(edges)]


def _spawn(arguments: Sequence[str], stderr: IO[bytes]) -> subprocess.Popen[str]:
    # The demo's own settings must hold: variables meant for the user's node would give all of them one port.
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(PREFIX) or name in OF_THE_COMMAND
    }
    environ["PYTHONIOENCODING"] = "utf-8"  # what the user's terminal wants is no way to talk to us
    # A group of their own: Ctrl-C reaches us alone, and we end them in order.
    group: dict[str, Any] = (
        {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        if os.name == "nt"
        else {"start_new_session": True}
    )
    return subprocess.Popen(  # noqa: S603 - our own command, no shell
        [sys.executable, "-m", "p2pmoe", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environ,
        encoding="utf-8",
        errors="replace",
        **group,
    )
