"""A server process for the benchmarks: `python -m benchmarks.server JSON`. Prints one JSON line when it serves.

The JSON says which experts: {"experts": {"uid": ["kind", hidden_dim]}, "optimizer": "none" | "sgd" | "adam",
"max_batch_size": 4096, "tls": false}. Ends when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def serve(spec: dict[str, Any], import_bytes: int) -> None:
    import torch

    import p2pmoe
    from p2pmoe.server.layers import make_expert

    backends = []
    for uid, (kind, hidden_dim) in spec["experts"].items():
        torch.manual_seed(hash_of(uid))
        module, args_schema, kwargs_schema = make_expert(kind, hidden_dim, {})
        module = module.to(spec.get("device", "cpu"))
        optimizer = make_optimizer(spec.get("optimizer", "none"), module)
        backends.append(
            p2pmoe.ExpertBackend(
                uid,
                module,
                optimizer,
                args_schema=args_schema,
                kwargs_schema=kwargs_schema,
                max_batch_size=spec.get("max_batch_size", 4096),
            )
        )
    # Figures of different versions are compared over plain HTTP; the case `tls` measures what TLS adds.
    config = p2pmoe.NodeConfig.from_tree({"http": {"tls": spec.get("tls", False)}})
    async with p2pmoe.Node(config, backends=backends) as node:
        told = {
            "dht_address": node.dht_address,
            "host": node.endpoint.host,
            "port": node.endpoint.port,
            "pid": os.getpid(),
            "import_bytes": import_bytes,
            "parameter_bytes": sum(p.nbytes for b in backends for p in b.expert.parameters()),
        }
        print(json.dumps(told), flush=True)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.read()


def hash_of(uid: str) -> int:
    return sum(ord(character) * 31**index for index, character in enumerate(uid)) % 2**31


def make_optimizer(name: str, module: Any) -> Any:
    import torch

    class Stateless(torch.optim.Optimizer):
        """Leaves parameters as they are: what is measured is the call."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> None:
            return None

    if name == "none":
        return Stateless(module.parameters())
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), lr=1e-3, fused=True)
    return torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)


if __name__ == "__main__":
    from p2pmoe.cli.process import prepare_process

    prepare_process()
    import torch  # noqa: F401

    asyncio.run(serve(json.loads(sys.argv[1]), resident_bytes()))
