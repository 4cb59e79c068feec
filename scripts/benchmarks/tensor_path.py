"""The cases of the tensor path: latency, large tensors, concurrency, experts against local torch, a mixture, memory."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import torch
from torch import nn

import p2pmoe
from benchmarks.server import hash_of, make_optimizer
from benchmarks.timing import compare, seconds_per_call
from p2pmoe.server.layers import FeedforwardExpert

Emit = Callable[..., None]
ECHO = """
import asyncio, sys
from aiohttp import web
async def echo(request):
    return web.Response(body=await request.read())
async def main():
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/echo", echo)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
asyncio.run(main())
"""


@contextmanager
def child(arguments: list[str]) -> Iterator[str]:
    """A process that prints one line when it is ready and ends when its standard input is closed."""
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        line = process.stdout.readline()
        try:
            yield line
        finally:
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def server(**spec: Any) -> Iterator[dict[str, Any]]:
    with child([sys.executable, "-m", "benchmarks.server", json.dumps(spec)]) as line:
        yield json.loads(line)


@contextmanager
def bare_echo(nbytes: int) -> Iterator[Callable[[], None]]:
    """A function that sends `nbytes` to a bare aiohttp server in another process and reads them back."""
    body = bytes(nbytes)
    loop = asyncio.new_event_loop()
    with child([sys.executable, "-c", ECHO]) as line:
        url = f"http://127.0.0.1:{int(line)}/echo"

        async def open_session() -> aiohttp.ClientSession:
            return aiohttp.ClientSession()

        session = loop.run_until_complete(open_session())

        async def post() -> None:
            async with session.post(url, data=body) as response:
                await response.read()

        # Timed inside the loop: the baseline pays no crossing from another thread.
        yield lambda: loop.run_until_complete(post())
        loop.run_until_complete(session.close())
        loop.close()


@contextmanager
def swarm_for(told: dict[str, Any]) -> Iterator[p2pmoe.Swarm]:
    with p2pmoe.Swarm(initial_peers=[told["dht_address"]]) as swarm:
        yield swarm


def nop_latency(emit: Emit, repeats: int, device: str) -> None:
    for rows, dim, demand, budget_s in ((1, 16, 2.0, 1.0), (2048, 1024, 1.3, 1.5)):
        with server(experts={"nop.0": ["nop", dim]}, device=device) as told, swarm_for(told) as swarm:
            expert, x = swarm.expert("nop.0"), torch.randn(rows, dim)
            with bare_echo(rows * dim * 4) as echo, torch.no_grad():
                figures = compare(partial(expert, x), echo, repeats=repeats, budget_s=budget_s, warmup=20)
        emit(case="nop_forward", shape=[rows, dim], baseline="bare aiohttp echo", demand_ratio=demand, **figures)


def nop_concurrency(emit: Emit, repeats: int, device: str, hivemind: str | None) -> None:
    with server(experts={"nop.0": ["nop", 1024]}, device=device) as told, swarm_for(told) as swarm:
        calls_per_s = callers(swarm.expert("nop.0"), torch.randn(4, 1024), count=64, repeats=repeats)
    figures: dict[str, Any] = {"calls_per_s": round(statistics.median(calls_per_s), 1)}
    if hivemind:
        theirs = hivemind_calls_per_s(hivemind, repeats)
        figures.update(hivemind_calls_per_s=theirs, ratio=round(figures["calls_per_s"] / theirs, 2), demand_ratio=10.0)
    emit(case="nop_64_callers", shape=[4, 1024], repeats=repeats, **figures)


def hivemind_calls_per_s(python: str, repeats: int) -> float:
    script = Path(__file__).with_name("hivemind_nop.py")
    done = subprocess.run([python, str(script), str(repeats)], capture_output=True, text=True, timeout=300, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["calls_per_s"])


def callers(expert: Callable[[torch.Tensor], Any], x: torch.Tensor, *, count: int, repeats: int) -> list[float]:
    """Calls a second of `count` threads that each call in a loop, for every repeat."""
    rates = []
    for repeat in range(repeats + 1):
        counts, stop = [0] * count, threading.Event()

        def call(index: int, counts: list[int] = counts, stop: threading.Event = stop) -> None:
            with torch.no_grad():
                while not stop.is_set():
                    expert(x)
                    counts[index] += 1

        threads = [threading.Thread(target=call, args=(index,)) for index in range(count)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        time.sleep(1.5 if repeat else 0.5)
        done, took = sum(counts), time.perf_counter() - begin
        stop.set()
        for thread in threads:
            thread.join()
        if repeat:
            rates.append(done / took)
    return rates


def local_ffn(uid: str, dim: int) -> FeedforwardExpert:
    torch.manual_seed(hash_of(uid))
    return FeedforwardExpert(dim)


def ffn_against_local(emit: Emit, repeats: int, device: str) -> None:
    dim = 1024
    local = local_ffn("ffn.0", dim)
    with server(experts={"ffn.0": ["ffn", dim]}, device=device) as told, swarm_for(told) as swarm:
        expert = swarm.expert("ffn.0")
        for rows, forward_demand, backward_demand in ((64, 1.12, 1.12), (256, 1.08, 1.06), (2048, 1.06, 1.03)):
            x, gradient = torch.randn(rows, dim), torch.randn(rows, dim)
            leaf = x.clone().requires_grad_(True)

            def forward(module: Any, x: torch.Tensor = x) -> None:
                with torch.no_grad():
                    module(x)

            def local_backward(leaf: torch.Tensor = leaf, gradient: torch.Tensor = gradient) -> None:
                # What a server does on backward: it recomputes forward first.
                leaf.grad = None
                local.zero_grad(set_to_none=True)
                local(leaf).backward(gradient)

            def remote_backward(x: torch.Tensor = x, gradient: torch.Tensor = gradient) -> None:
                expert.call_backward((x,), (gradient,))

            budget_s = 1.0 if rows < 2048 else 2.5
            figures = compare(lambda: forward(expert), lambda: forward(local), repeats=repeats, budget_s=budget_s)
            emit(case="ffn_forward", shape=[rows, dim], baseline="local torch", demand_ratio=forward_demand, **figures)
            figures = compare(remote_backward, local_backward, repeats=repeats, budget_s=budget_s)
            emit(
                case="ffn_backward",
                shape=[rows, dim],
                baseline="local forward+backward",
                demand_ratio=backward_demand,
                **figures,
            )


def ffn_concurrency(emit: Emit, repeats: int, device: str) -> None:
    dim, count, rows = 1024, 64, 4
    local, merged = local_ffn("ffn.0", dim), torch.randn(count * rows, dim)
    with server(experts={"ffn.0": ["ffn", dim]}, device=device) as told, swarm_for(told) as swarm:
        ratios, rates, locals_ = [], [], []
        for _ in range(repeats):
            with torch.no_grad():
                seconds = statistics.median(seconds_per_call(lambda: local(merged), budget_s=1.0))
            locals_.append(count * rows / seconds)
            rates.append(rows * callers(swarm.expert("ffn.0"), torch.randn(rows, dim), count=count, repeats=1)[0])
            ratios.append(rates[-1] / locals_[-1])
    emit(
        case="ffn_64_callers",
        shape=[rows, dim],
        samples_per_s=round(statistics.median(rates), 1),
        local_merged_samples_per_s=round(statistics.median(locals_), 1),
        ratio=round(statistics.median(ratios), 3),
        demand_ratio_at_least=0.7,
        repeats=repeats,
    )


class LocalMixture(nn.Module):
    """The same routing without a network: gate, exact top k of the grid, softmax, weighted sum."""

    def __init__(self, dim: int, grid: tuple[int, int], k: int, optimizer: str) -> None:
        super().__init__()
        self.grid, self.k = grid, k
        self.proj = nn.Linear(dim, sum(grid))
        uids = [f"ffn.{i}.{j}" for i in range(grid[0]) for j in range(grid[1])]
        self.experts = nn.ModuleList([local_ffn(uid, dim) for uid in uids])
        self.optimizers = [make_optimizer(optimizer, expert) for expert in self.experts]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.proj(x).split(list(self.grid), dim=-1)
        scores, chosen = (first[:, :, None] + second[:, None, :]).flatten(1).topk(self.k, dim=1)
        weights = scores.softmax(1)
        mixed = torch.zeros_like(x)
        self.used = chosen.unique().tolist()
        for index in self.used:
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            mixed = mixed.index_add(0, rows, self.experts[index](x[rows]) * weights[rows, slots, None])
        return mixed

    def train_experts(self) -> None:
        for index in self.used:
            self.optimizers[index].step()
            self.optimizers[index].zero_grad(set_to_none=True)


def mixture(emit: Emit, repeats: int, device: str) -> None:
    dim, grid, k, batch = 512, (4, 4), 4, 32
    uids = [f"ffn.{i}.{j}" for i in range(grid[0]) for j in range(grid[1])]
    for optimizer in ("none", "sgd", "adam"):
        experts = {uid: ["ffn", dim] for uid in uids}
        with server(experts=experts, optimizer=optimizer, device=device) as told, swarm_for(told) as swarm:
            remote = p2pmoe.RemoteMixtureOfExperts(swarm, in_features=dim, grid_size=grid, uid_prefix="ffn", k_best=k)
            local = LocalMixture(dim, grid, k, optimizer)
            local.proj.load_state_dict(remote.gate.proj.state_dict())
            x = torch.randn(batch, dim)
            gates = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (remote.gate, local.proj)]

            def step(
                module: nn.Module, gate: torch.optim.Optimizer, then: Callable[[], None] | None, x: torch.Tensor = x
            ) -> None:
                leaf = x.clone().requires_grad_(True)
                module(leaf).square().mean().backward()
                gate.step()
                gate.zero_grad(set_to_none=True)
                if then is not None:
                    then()

            figures = compare(
                lambda: step(remote, gates[0], None),  # noqa: B023
                lambda: step(local, gates[1], local.train_experts),  # noqa: B023
                repeats=repeats,
                budget_s=1.5,
            )
        emit(
            case="mixture_step",
            grid=list(grid),
            k=k,
            dim=dim,
            batch=batch,
            optimizer=optimizer,
            baseline="local mixture, same routing",
            demand_ratio=1.3,
            **figures,
        )


def memory(emit: Emit, repeats: int, device: str) -> None:
    del repeats
    uids = [f"ffn.0.{j}" for j in range(16)]
    experts = {uid: ["ffn", 1024] for uid in uids}
    with server(experts=experts, optimizer="none", device=device) as told, swarm_for(told) as swarm:
        x = torch.randn(64, 1024)
        time.sleep(1.0)
        idle = resident(told["pid"])
        for _ in range(3):
            for uid in uids:
                expert = swarm.expert(uid)
                with torch.no_grad():
                    expert(x)
                expert.call_backward((x,), (x,))
        time.sleep(1.0)
        used = resident(told["pid"])
        processes = count_processes(told["pid"])
    beyond = [each - told["import_bytes"] for each in (idle, used)]
    emit(
        case="memory_16_experts",
        dim=1024,
        processes=processes,
        parameter_mib=round(told["parameter_bytes"] / 2**20, 1),
        import_torch_mib=round(told["import_bytes"] / 2**20, 1),
        idle_mib_beyond_import=round(beyond[0] / 2**20, 1),
        used_mib_beyond_import=round(beyond[1] / 2**20, 1),
        ratio_idle=round(beyond[0] / told["parameter_bytes"], 3),
        ratio=round(beyond[1] / told["parameter_bytes"], 3),
        demand_ratio=1.3,
    )


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def count_processes(pid: int) -> int:
    import psutil

    return 1 + len(psutil.Process(pid).children(recursive=True))
