"""Repeats a share of forward calls at a second provider of the same expert and compares the answers.

In the background, on the swarm's loop: no caller ever waits for it. Few at once, a deadline each, cancelled at close.
It means something where the providers of an expert hold the same parameters; see docs/adr/0008-replies-that-lie.md.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from p2pmoe.client.calls import CallGroup, make_call
from p2pmoe.client.directory import ExpertInfo
from p2pmoe.client.replies import check_finite, is_finite
from p2pmoe.client.trust import Trust
from p2pmoe.errors import ConfigError, P2PMoEError
from p2pmoe.experts.directory import Provider
from p2pmoe.faults import unexpected
from p2pmoe.rpc.base import Flat
from p2pmoe.types import Manner, Mode

MAX_RUNNING: Final = 4
MAX_ROWS: Final = 64
"""Rows of a call that are repeated; more prove nothing more."""
MAX_SAMPLE_BYTES: Final = 8 * 1024 * 1024
MAX_WITNESSES: Final = 3
TIMEOUT_S: Final = 30.0
"""For all witnesses of one sample together."""
_ROUNDING: Final = {torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}
"""Relative differences that narrow formats may show after a few roundings."""


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """Which share of forward calls is repeated, and how far answers may differ.

    A number may differ by `atol + rtol × the largest magnitude in its row`: honest hardware rounds differently, most
    where large numbers cancel. Integers must be equal. `seed` None draws the calls unpredictably.
    """

    fraction: float = 0.0
    rtol: float = 1e-2
    atol: float = 1e-4
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction <= 1.0:
            raise ConfigError(f"verify_fraction must lie between 0 and 1, got {self.fraction}")
        if not (self.rtol >= 0.0 and self.atol >= 0.0):
            raise ConfigError(f"verify_rtol and verify_atol must be at least 0, got {self.rtol} and {self.atol}")


@dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of a forward call, copied, and what `provider` answered for them."""

    provider: Provider
    uid: str
    info: ExpertInfo
    inputs: Flat
    outputs: Flat
    mode: Mode = "eval"


@dataclass(slots=True)
class VerifyCounts:
    """What came of the samples so far. `unverified`: no second provider, none that answered, or too busy."""

    sampled: int = 0
    agreed: int = 0
    contradicted: int = 0
    unverified: int = 0


Ask = Callable[[CallGroup, float], Awaitable[None]]
FindProviders = Callable[[str], Awaitable[tuple[Provider, ...]]]


class Verifier:
    """Draws samples on callers' threads and settles them on the swarm's loop.

    Args:
        options: how often and how strictly.
        trust: told who contradicted whom, and who was outvoted.
        find_providers: of a uid, in the order in which they are to be asked; on the loop.
        ask: sends a group of calls and returns when they are answered or the seconds have passed; on the loop.
    """

    def __init__(
        self,
        options: VerifyOptions,
        trust: Trust,
        find_providers: FindProviders,
        ask: Ask,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.options = options
        self.counts = VerifyCounts()
        self._trust = trust
        self._find_providers = find_providers
        self._ask = ask
        self._loop = loop
        self._dice = random.Random(options.seed)  # noqa: S311 - a node must not guess it, and never sees it
        self._lock = threading.Lock()
        self._held = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Verifier: {self.counts}, {self._held} running>"

    def offer(
        self,
        provider: Provider,
        uid: str,
        info: ExpertInfo,
        inputs: Flat,
        outputs: Flat,
        manner: Manner | None = None,
    ) -> None:
        """A forward call went through: perhaps repeat it. On any thread; copies what it keeps, and only then.

        Not where an answer depends on more than a row and the parameters: there honest providers differ.
        """
        mode: Mode = "eval" if manner is None else manner.mode
        if not len(inputs[0]) or mode not in info.repeatable:
            return
        with self._lock:
            if self._dice.random() >= self.options.fraction:
                return
            self.counts.sampled += 1
            rows = draw_rows(self._dice, inputs, outputs)
            if rows is None or self._held >= MAX_RUNNING or self._closed:
                self.counts.unverified += 1
                return
            self._held += 1
        try:
            sample = Sample(provider, uid, info, take_rows(inputs, rows), take_rows(outputs, rows), mode)
            self._loop.call_soon_threadsafe(self._start, sample)
        except Exception as error:  # noqa: BLE001 - the call went through, whatever becomes of the sample
            self.counts.unverified += 1
            self._give_back()
            if not self._loop.is_closed():
                unexpected(f"taking a sample of a call of {uid}", error)

    async def close(self) -> None:
        """Cancel what runs. On the loop."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=2.0)

    # -- on the loop

    def _start(self, sample: Sample) -> None:
        if self._closed:
            self._give_back()
            return
        task = self._loop.create_task(self._verify(sample))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._give_back()

    def _give_back(self) -> None:
        with self._lock:
            self._held -= 1

    async def _verify(self, sample: Sample) -> None:
        if not is_finite(sample.outputs):  # an honest answer to inputs that were not finite
            self.counts.unverified += 1
            return
        deadline = time.monotonic() + TIMEOUT_S
        try:
            witnesses = await self._witnesses(sample)
            second = await self._next_answer(sample, witnesses, deadline)
            if second is None:
                self.counts.unverified += 1
            elif self._agree(sample, sample.outputs, second[1]):
                self.counts.agreed += 1
            else:
                self.counts.contradicted += 1
                self._settle(sample, second, await self._next_answer(sample, witnesses, deadline))
        except P2PMoEError:  # the directory gave no answer, or the swarm is being closed
            self.counts.unverified += 1
        except Exception as error:  # noqa: BLE001 - nobody awaits this task
            self.counts.unverified += 1
            unexpected(f"repeating a call of {sample.uid}", error)

    async def _witnesses(self, sample: Sample) -> list[Provider]:
        """Peers of good standing that provide the same, in random order; the last is asked first."""
        mine = sample.provider
        witnesses = [
            each
            for each in await self._find_providers(sample.uid)
            if each.schema_digest == mine.schema_digest
            and each.peer_id != mine.peer_id
            and each.endpoint != mine.endpoint
            and self._trust.standing.verdict(each.peer_id, sample.uid) == "good"
        ]
        self._dice.shuffle(witnesses)
        return witnesses[:MAX_WITNESSES]

    async def _next_answer(
        self, sample: Sample, witnesses: list[Provider], deadline: float
    ) -> tuple[Provider, Flat] | None:
        """What the next witness that answers says."""
        info = sample.info
        while witnesses and (left_s := deadline - time.monotonic()) > 0:
            witness = witnesses.pop()
            call = make_call(
                witness.endpoint,
                sample.uid,
                "forward",
                sample.inputs,
                info.inputs,
                info.outputs,
                timeout_s=left_s,
                peer_id=witness.peer_id,
                manner=Manner(sample.mode),
            )
            group = CallGroup([call])
            await self._ask(group, left_s)
            result = group.results(left_s)[0]
            if not isinstance(result, P2PMoEError):
                result = check_finite(f"{call.uid} at {call.endpoint}", result, sample.inputs, info.outputs) or result
            if not isinstance(result, P2PMoEError):
                return witness, result
            self._trust.note_failure(witness, result, sample.uid)
        return None

    def _settle(self, sample: Sample, second: tuple[Provider, Flat], third: tuple[Provider, Flat] | None) -> None:
        """Two answers differ: the third decides by majority, where there is one."""
        first_peer, second_peer = sample.provider.peer_id, second[0].peer_id
        if third is not None:
            third_peer = third[0].peer_id
            backs_first = self._agree(sample, sample.outputs, third[1])
            backs_second = self._agree(sample, second[1], third[1])
            if backs_first and backs_second:  # within the tolerance of both
                return
            if backs_first or backs_second:
                liar, others = (
                    (second_peer, (first_peer, third_peer)) if backs_first else (first_peer, (second_peer, third_peer))
                )
                reason = f"its answer for {sample.uid} differs from those of {others[0]} and {others[1]}"
                self._trust.note_lie(liar, "outvoted", reason)
                return
            for peer in (first_peer, second_peer):
                self._trust.note_contradiction(peer, third_peer, f"three providers of {sample.uid} differ")
        elif self._trust.standing.verdict(first_peer) != "good":  # a peer that has lied before is no witness
            reason = f"its answer for {sample.uid} differs from that of {second_peer}"
            self._trust.note_lie(first_peer, "outvoted", reason)
            return
        self._trust.note_contradiction(first_peer, second_peer, f"two providers of {sample.uid} differ")

    def _agree(self, sample: Sample, first: Flat, second: Flat) -> bool:
        options = self.options
        return all(
            same_answer(
                a, b, rtol=max(options.rtol, _ROUNDING.get(_travelling_dtype(proto.codec, a), 0.0)), atol=options.atol
            )
            for a, b, proto in zip(first, second, sample.info.outputs, strict=True)
        )


def draw_rows(dice: random.Random, inputs: Flat, outputs: Flat) -> list[int] | None:
    """Which rows of a call to repeat, within the bounds; None when a single row is too large."""
    rows = len(inputs[0])
    row_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs)) // rows
    count = min(rows, MAX_ROWS, MAX_SAMPLE_BYTES // max(1, row_bytes))
    return sorted(dice.sample(range(rows), count)) if count else None


def take_rows(tensors: Flat, rows: Sequence[int]) -> Flat:
    """Copies of some rows, on the CPU: the originals belong to the caller, who may change them in place."""
    with torch.inference_mode(False), torch.no_grad():  # they are used on another thread
        return tuple(
            tensor.detach().index_select(0, torch.tensor(rows, dtype=torch.int64, device=tensor.device)).to("cpu")
            for tensor in tensors
        )


def same_answer(first: torch.Tensor, second: torch.Tensor, *, rtol: float, atol: float) -> bool:
    """Whether two [B, …] answers are the same but for rounding; see `VerifyOptions`. NaN equals nothing."""
    if first.shape != second.shape:
        return False
    if not first.is_floating_point():
        return torch.equal(first, second)
    if not first.numel():
        return True
    first, second = (each.double().reshape(len(each), -1) for each in (first, second))
    largest = torch.maximum(first.abs().amax(1), second.abs().amax(1))
    return bool(((first - second).abs() <= (atol + rtol * largest).unsqueeze(1)).all())


def _travelling_dtype(codec: str, tensor: torch.Tensor) -> torch.dtype:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(codec, tensor.dtype)
