"""A node as a process of its own, for tests: prints its address, serves until its standard input ends.

python node_process.py INITIAL_PEER|- [identity=KEY_FILE] UID...
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from swarm_kit import make_backend

import p2pmoe


async def main(initial_peer: str, uids: list[str]) -> None:
    torch.set_num_threads(1)
    peers = () if initial_peer == "-" else (initial_peer,)
    path = {"identity_path": uids.pop(0).partition("=")[2]} if uids and uids[0].startswith("identity=") else {}
    dht = {"initial_peers": peers, "ttl_s": 6.0, "refresh_s": 2.0}
    config = p2pmoe.NodeConfig.from_tree({**path, "dht": dht, "experts": {"twins": "serve"}})
    backends = [make_backend(uid, dim=8, lr=0.05) for uid in uids]
    async with p2pmoe.Node(config, backends) as node:
        print(node.dht_address, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
