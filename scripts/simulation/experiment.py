"""One size of network: records are put, then read at random times while nodes die and join and datagrams are lost."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from typing import Any, Final

from p2pmoe.dht.validation import REPLICAS
from p2pmoe.identity import Identity
from p2pmoe.protocol.records import key_of, sign_record
from simulation.network import EPOCH_S, MEAN_RTT_S, SWARM_ID, SimulatedNetwork
from simulation.virtual_time import VirtualLoop

PUTS_LAST_S: Final = 30.0
READS_LAST_S: Final = 60.0
TTL_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a run is made under."""

    loss: float
    mean_life_s: float
    lookups: int
    seed: int


def simulate(count: int, conditions: Conditions) -> dict[str, Any]:
    """The figures of a network of `count` nodes."""
    begin = time.perf_counter()
    # A table of contacts is hundreds of objects that all live on: collecting among them again and again is for nothing.
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            figures = runner.run(_Experiment(count, conditions).run())
    finally:
        gc.enable()
        gc.collect()
    return {**figures, "took_s": round(time.perf_counter() - begin, 1)}


class _Experiment:
    def __init__(self, count: int, conditions: Conditions) -> None:
        self._conditions = conditions
        self._count = count
        self._identity = Identity.from_seed(conditions.seed.to_bytes(32, "big"))
        self._taken: list[int] = []
        self._seconds: list[float] = []
        self._found: list[bool] = []
        self._asked: list[int] = []
        self._hops: list[int] = []
        self._deaths = 0

    async def run(self) -> dict[str, Any]:
        conditions = self._conditions
        network = self._network = SimulatedNetwork(self._count, seed=conditions.seed, loss=conditions.loss)
        dice = network.dice
        keys = [key_of(SWARM_ID, f"key-{number}") for number in range(conditions.lookups)]
        await asyncio.gather(*(self._put(key, dice.uniform(0, PUTS_LAST_S)) for key in keys))
        sent_before = network.datagrams
        churn = asyncio.create_task(self._churn())
        await asyncio.gather(*(self._get(key, dice.uniform(0, READS_LAST_S)) for key in keys))
        churn.cancel()
        await asyncio.gather(churn, return_exceptions=True)
        return self._figures(network.datagrams - sent_before)

    async def _put(self, key: bytes, after_s: float) -> None:
        await asyncio.sleep(after_s)
        now = EPOCH_S + asyncio.get_running_loop().time()
        record = sign_record(
            self._identity, key, b"value", sequence=int(now * 1e6), expires_at_ms=int((now + TTL_S) * 1000)
        )
        self._taken.append(await self._network.random_node().set(key, [record]))

    async def _get(self, key: bytes, after_s: float) -> None:
        await asyncio.sleep(after_s)
        reader, loop = self._network.random_node(), asyncio.get_running_loop()
        begin, made = loop.time(), len(reader.lookups_made)
        records = await reader.get(key)
        if reader.contact.address not in self._network.alive:
            return  # it died while it read: nobody waits for the answer
        self._seconds.append(loop.time() - begin)
        self._found.append(any(record.value == b"value" for record in records))
        lookup = next(each for each in reader.lookups_made[made:] if each.target == int.from_bytes(key, "big"))
        self._asked.append(lookup.asked)
        self._hops.append(lookup.hops)

    async def _churn(self) -> None:
        """Everybody's life is exponential; whoever dies is replaced by somebody new."""
        if not self._conditions.mean_life_s:
            return
        network, joining = self._network, set()
        try:
            while True:
                await asyncio.sleep(network.dice.expovariate(self._count / self._conditions.mean_life_s))
                victim = network.dice.choice(list(network.alive.values()))
                self._deaths += 1
                task = asyncio.create_task(network.replace(victim))
                joining.add(task)
                task.add_done_callback(joining.discard)
        finally:
            for task in joining:
                task.cancel()

    def _figures(self, datagrams: int) -> dict[str, Any]:
        seconds, count = sorted(self._seconds), len(self._seconds)
        return {
            "nodes": self._count,
            "hops": round(sum(self._hops) / count, 3),
            "hops_max": max(self._hops),
            "requests": round(sum(self._asked) / count, 2),
            "requests_max": max(self._asked),
            "p50_ms": _ms(seconds, 50),
            "p90_ms": _ms(seconds, 90),
            "p99_ms": _ms(seconds, 99),
            "p50_round_trips": round(_ms(seconds, 50) / (1e3 * MEAN_RTT_S), 2),
            "success_percent": round(100 * sum(self._found) / count, 3),
            "replicas": round(sum(self._taken) / len(self._taken), 2),
            "replicas_wished": REPLICAS,
            "lookups": count,
            "died": self._deaths,
            "datagrams": datagrams,
        }


def _ms(ordered: list[float], percent: int) -> float:
    """By nearest rank."""
    return round(1e3 * ordered[max(0, -(-percent * len(ordered) // 100) - 1)], 1)
