"""The node under attack: one of our own, in processes that always end, or one that runs already."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from attacks.http_wire import Line, attacker_tls, request
from p2pmoe.cli.local_swarm import NodeProcess
from p2pmoe.config import LimitsConfig, parse_host_port
from p2pmoe.identity import SwarmKey
from p2pmoe.types import WIRE_VERSION

START_S = 60.0
END_S = 8.0

BOOTSTRAP = """
torch_threads = 1
[dht]
refresh_s = 2.0
"""

# The defaults, but for what would make a slow attack take minutes to show.
NODE = """
identity_path = "{identity}"
torch_threads = 1
[experts]
uids = ["ffn.[0:2].[0:2]"]
hidden_dim = 64
seed = 1
[dht]
initial_peers = ["{bootstrap}"]
ttl_s = 10.0
refresh_s = 2.0
[limits]
"""
PRIVATE = """
[access]
swarm_key_path = "{path}"
"""
TIGHT = {
    "max_connections": 160,
    "idle_read_timeout_s": 1.0,
    "http_head_timeout_s": 2.0,
    "slow_body_grace_s": 2.0,
    "write_stall_timeout_s": 2.0,
    "handshake_timeout_s": 2.0,
}


@dataclass
class Target:
    """Where the node is, and what may be seen of it from outside. `pid` 0: another machine's or user's process."""

    host: str
    port: int
    scheme: str
    dht_address: str
    initial_peers: tuple[str, ...]
    swarm_id: str = "p2pmoe"
    pid: int = 0
    log_path: Path | None = None
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Of a node that runs already: the defaults, as nobody tells."""
    features: frozenset[str] = frozenset()
    """Found out by `discover`."""
    swarm_key: SwarmKey | None = None
    """Of a private swarm: what the honest client has and the attacker has not."""
    swarm_key_path: Path | None = None

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def dht_host_port(self) -> tuple[str, int]:
        return parse_host_port(self.dht_address)

    def resident_bytes(self) -> int | None:
        return psutil.Process(self.pid).memory_info().rss if self.pid else None

    def open_files(self) -> int | None:
        return psutil.Process(self.pid).num_fds() if self.pid and hasattr(psutil.Process, "num_fds") else None

    def has(self, feature: str) -> bool:
        """Whether attacks that need `feature` make sense here. At a private node only those made for one do: to all
        others it is as if nobody were there."""
        if self.swarm_key is not None or feature == "private":
            return self.swarm_key is not None and feature == "private"
        return {
            "": True,
            "tls": self.scheme == "https",
            "plain": self.scheme == "http",
            "own": bool(self.pid),
        }.get(feature, feature in self.features)

    async def discover(self) -> None:
        """Find out which doors the node has."""
        tls = attacker_tls() if self.scheme == "https" else None
        async with await Line.open(self.host, self.port, tls, Counter()) as line:
            await line.send(request("POST", f"/p2pmoe/v{WIRE_VERSION}/session/nonce"))
            if (await line.reply()).status == 200:
                self.features |= {"sessions"}

    async def get_json(self, path: str) -> Any:
        """A document of the node, read over a connection of its own. Raises RuntimeError."""
        tls = attacker_tls() if self.scheme == "https" else None
        async with await Line.open(self.host, self.port, tls, Counter()) as line:
            await line.send(request("GET", path))
            reply = await line.reply()
        if reply.status != 200:
            raise RuntimeError(f"{self.endpoint}{path} answered {reply.seen}")
        return json.loads(reply.body)


@contextlib.contextmanager
def own_target(folder: Path, *, private: bool = False) -> Iterator[Target]:
    """A bootstrap and a node with four experts, on loopback; ended when the block is left, however it is left."""
    folder.mkdir(parents=True, exist_ok=True)
    swarm_key, key_path, access = None, None, ""
    if private:
        swarm_key, key_path = SwarmKey.generate(), folder / "swarm.key"
        key_path.unlink(missing_ok=True)
        swarm_key.save(key_path)
        access = PRIVATE.format(path=key_path.as_posix())
    processes: list[NodeProcess] = []
    try:
        deadline = time.monotonic() + START_S
        processes.append(NodeProcess("bootstrap", folder, BOOTSTRAP + access))
        bootstrap = processes[0].wait_until_serving(deadline)["dht_address"]
        settings = NODE.format(bootstrap=bootstrap, identity=(folder / "identity.pem").as_posix())
        settings += "".join(f"{key} = {value}\n" for key, value in TIGHT.items())
        node = NodeProcess("node", folder, settings + access)
        processes.append(node)
        told = node.wait_until_serving(deadline)
        scheme, _, address = told["endpoint"].partition("://")
        host, port = parse_host_port(address)
        yield Target(
            host,
            port,
            scheme,
            told["dht_address"],
            (bootstrap,),
            pid=node.pid,
            log_path=node.log_path,
            limits=msgspec.convert(TIGHT, LimitsConfig),
            swarm_key=swarm_key,
            swarm_key_path=key_path,
        )
    finally:
        for process in processes:
            process.ask_to_leave()
        deadline = time.monotonic() + END_S
        for process in processes:
            process.end(deadline)


def running_target(endpoint: str, dht_address: str, swarm_id: str) -> Target:
    """A node that somebody else runs, and lets us attack."""
    scheme, _, address = endpoint.partition("://")
    host, port = parse_host_port(address.rstrip("/"))
    return Target(host, port, scheme, dht_address, (dht_address,), swarm_id)
