"""One pass of a mixture over the experts that were chosen: calls out, answers judged, gradients back.

Knows routes, providers and autograd; nothing of gates, searches or how outputs are mixed. Shapes: B rows, K experts a
row, P (row, expert) pairs, O output features.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from p2pmoe.client.calls import Call, CallGroup, make_call
from p2pmoe.client.directory import ExpertInfo
from p2pmoe.client.graph import always_differentiable, explain, input_gradients, keep_for_backward
from p2pmoe.client.manner import for_expert
from p2pmoe.client.patience import Patience, may_pass
from p2pmoe.client.replies import check_finite
from p2pmoe.client.routing import Routing
from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import (
    DecodeError,
    ExpertFailedError,
    ExpertNotFoundError,
    ExpertsUnavailableError,
    NonFiniteReplyError,
    P2PMoEError,
)
from p2pmoe.experts.directory import Provider
from p2pmoe.protocol.modes import keeps_graph
from p2pmoe.protocol.schema import BatchTensorProto, largest_free
from p2pmoe.rpc.base import Flat
from p2pmoe.types import Manner, Pass, PeerId

Counts = npt.NDArray[np.int64]
_SHOWN_ROWS: Final = 8


@dataclass(frozen=True, slots=True)
class MixtureOptions:
    """How a mixture treats experts that are slow, dead or wrong; times in seconds."""

    k_best: int
    k_min: int
    backward_k_min: int
    forward_timeout_s: float
    backward_timeout_s: float
    timeout_after_k_min_s: float | None
    detect_anomalies: bool
    allow_zero_outputs: bool
    skip_non_finite: bool
    beam_size: int
    search_timeout_s: float


@dataclass(frozen=True, slots=True)
class Route:
    """Where every pair goes: rows grouped by expert, and a provider for each expert (None: nobody fits)."""

    routing: Routing
    uids: list[str]
    providers: list[Provider | None]
    info: ExpertInfo
    rows: int
    manner: Manner
    """Of all calls of the pass, but for their seeds; the backward pass has the same."""


class MixturePasses:
    """The passes of one mixture. Any thread; holds no state of a pass."""

    def __init__(self, swarm: Swarm, options: MixtureOptions) -> None:
        self._swarm = swarm
        self._options = options

    def __repr__(self) -> str:
        return f"<MixturePasses over {self._swarm}>"

    @property
    def skips_non_finite(self) -> bool:
        """See `RemoteMixtureOfExperts`."""
        return self._options.skip_non_finite

    def forward_group(
        self, way: Route, inputs: Flat, valid: torch.Tensor, timeout_s: float
    ) -> tuple[CallGroup, list[int]]:
        """A call for every expert of the route that somebody hosts, and which ones these are."""
        info = way.info
        sent = [index for index, provider in enumerate(way.providers) if provider is not None]
        calls = [self._call(way, index, "forward", inputs, info.inputs, info.outputs, timeout_s) for index in sent]
        enough = _Enough(way, sent, np.minimum(valid.numpy().sum(1), self._options.k_min))
        return CallGroup(calls, enough=enough, grace_s=self._options.timeout_after_k_min_s), sent

    def collect(
        self, way: Route, group: CallGroup, sent: list[int], timeout_s: float, tensors: Flat
    ) -> list[Flat | P2PMoEError]:
        """A result for every expert of the route; `tensors` are what its calls were slices of."""
        results: list[Flat | P2PMoEError] = [
            ExpertNotFoundError(f"nobody hosts {uid} with this schema") for uid in way.uids
        ]
        answers = group.results(timeout_s)
        alive = {
            provider.peer_id
            for index, result in zip(sent, answers, strict=True)
            if (provider := way.providers[index]) is not None and not isinstance(result, P2PMoEError)
        }
        noted = set[tuple[PeerId, type]]()
        broken: dict[Provider, list[tuple[str, DecodeError]]] = {}
        for index, call, result in zip(sent, group.calls, answers, strict=True):
            checked = results[index] = self._checked(way, index, call, result, tensors)
            provider = way.providers[index]
            if not isinstance(checked, P2PMoEError) or provider is None:
                continue
            if isinstance(checked, DecodeError):
                broken.setdefault(provider, []).append((way.uids[index], checked))
            # One slow expert is no reason to leave out a peer that has answered for others.
            elif provider.peer_id not in alive and (provider.peer_id, type(checked)) not in noted:
                noted.add((provider.peer_id, type(checked)))
                self._swarm.note_failure(provider, checked, way.uids[index])
        for provider, replies in broken.items():
            self._note_broken(provider, replies)
        if any(proto.is_free for proto in way.info.outputs) and group.calls and group.calls[0].exact is None:
            _leave_out_other_sizes(way, results)
        return results

    def offer(self, way: Route, sent: list[int], inputs: Flat, results: list[Flat | P2PMoEError]) -> None:
        """Calls that went through; the swarm may have some repeated by somebody else."""
        verifier = self._swarm.verifier
        if verifier is None:
            return
        for index in sent:
            provider, result = way.providers[index], results[index]
            if provider is not None and not isinstance(result, P2PMoEError):
                start, end = way.routing.bounds[index]
                sent_rows = tuple(each[start:end] for each in inputs)
                verifier.offer(provider, way.uids[index], way.info, sent_rows, result, way.manner)

    @staticmethod
    def alive(way: Route, results: list[Flat | P2PMoEError], valid: torch.Tensor) -> torch.Tensor:
        """Bool [B, K]: whose answer came."""
        alive = torch.zeros_like(valid)
        for (start, end), result in zip(way.routing.bounds, results, strict=True):
            if not isinstance(result, P2PMoEError):
                alive[way.routing.rows_P[start:end], way.routing.slots_P[start:end]] = True
        return alive

    def can_fill(self, valid: torch.Tensor) -> bool:
        """Whether every row has found as many experts as must answer, of bool [B, K]."""
        return bool((valid.sum(1) >= max(1, self._options.k_min)).all())

    def short_rows(self, alive: torch.Tensor) -> list[int]:
        """Rows with fewer answers than they need, of bool [B, K]."""
        if self._options.allow_zero_outputs:
            return []
        short: list[int] = (alive.sum(1) < max(1, self._options.k_min)).nonzero().flatten().tolist()
        return short

    def unavailable(
        self,
        direction: Pass,
        rows: Sequence[int],
        results: Sequence[Flat | P2PMoEError],
        gradients: Flat = (),
        *,
        reason: str = "too few experts are alive",
    ) -> ExpertsUnavailableError:
        """The error that names these rows and one reason: that of a result, or else `reason`.

        `gradients` are what a backward pass sent.
        """
        shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + (", …" if len(rows) > _SHOWN_ROWS else "")
        reason = next((str(result) for result in results if isinstance(result, P2PMoEError)), reason)
        reason = explain(reason, gradients)
        k_min = max(1, self._options.k_min) if direction == "forward" else self._options.backward_k_min
        return ExpertsUnavailableError(
            f"{direction}: fewer than {k_min} experts answered for {len(rows)} rows ({shown}): {reason}", tuple(rows)
        )

    def attach(self, way: Route, results: list[Flat | P2PMoEError], inputs: Flat) -> Flat:
        """Outputs [P, O] of every pair, zeros where nobody answered, in the autograd graph of the inputs."""
        device = inputs[0].device
        protos = way.info.outputs
        free = largest_free(way.info.inputs, [each.shape for each in inputs])
        came = next((each for each in results if not isinstance(each, P2PMoEError)), None)
        sizes = [proto.sized(free) for proto in protos] if came is None else [each.shape[1:] for each in came]
        outputs = _join(results, way.routing.bounds, protos, sizes, device)
        if not keeps_graph():
            return outputs
        answered = [index for index, result in enumerate(results) if not isinstance(result, P2PMoEError)]
        attached: Flat = _RemoteMix.apply(  # type: ignore[no-untyped-call]
            always_differentiable(), self, way, answered, outputs, *inputs
        )
        return attached

    def backward(self, way: Route, answered: list[int], inputs: Flat, gradients: Flat) -> Flat:
        """Gradients [P, …] of every input; trains each expert that answered. Zeros where nobody did.

        Experts that rows cannot do without are asked again, each under the id that its call had, while there is time:
        their node may be back at another address.
        """
        info, patience = way.info, Patience(time.monotonic() + self._options.backward_timeout_s)
        needed = np.minimum(_count_rows(way, answered), self._options.backward_k_min)
        results: list[Flat | P2PMoEError] = [ExpertNotFoundError(f"nobody hosts {uid}") for uid in way.uids]
        ids: dict[int, str] = {}
        asked = answered
        while True:
            left_s = max(1e-3, patience.left_s())
            calls = [
                self._call(
                    way,
                    index,
                    "backward",
                    (*inputs, *gradients),
                    info.inputs + info.outputs,
                    info.inputs,
                    left_s,
                    ids.get(index),
                )
                for index in asked
            ]
            ids.update(zip(asked, (call.id for call in calls), strict=True))
            missing = needed - _count_rows(way, _succeeded(answered, results))
            group = CallGroup(calls, enough=_Enough(way, asked, missing), grace_s=self._options.timeout_after_k_min_s)
            if calls:
                self._swarm.call(group, left_s)
            collected = self.collect(way, group, asked, left_s, (*inputs, *gradients))
            for index in asked:
                results[index] = collected[index]
            trained = _succeeded(answered, results)
            short: list[int] = np.flatnonzero(_count_rows(way, trained) < needed).tolist()
            if not short:
                sizes = [each.shape[1:] for each in inputs]
                return _join(results, way.routing.bounds, info.inputs, sizes, inputs[0].device)
            failed = [index for index in answered if isinstance(results[index], P2PMoEError)]
            asked = self._return_of(way, failed, [results[index] for index in failed], patience)
            if not asked:
                raise self.unavailable("backward", short, [results[index] for index in answered], gradients)

    def _return_of(
        self, way: Route, failed: list[int], errors: list[Flat | P2PMoEError], patience: Patience
    ) -> list[int]:
        """Those of the experts that failed for reasons that may pass whom somebody announces (again); waits for one.

        Their providers are put into the route. Empty when the time is up, or there is nobody to wait for.
        """
        passing = [index for index, error in zip(failed, errors, strict=True) if may_pass(error)]
        while passing and not self._swarm.directory.is_fixed:
            pause_s = patience.next_pause_s()
            if pause_s is None:
                break
            found = self._swarm.run(self._find_again(way, passing, pause_s, patience), patience.left_s() + 1.0)
            for index, provider in found.items():
                way.providers[index] = provider
            if found:
                return list(found)
        return []

    async def _find_again(
        self, way: Route, experts: list[int], pause_s: float, patience: Patience
    ) -> dict[int, Provider]:
        """Who hosts these experts by fresh records. On the swarm's loop."""
        await asyncio.sleep(pause_s)
        found: dict[int, Provider] = {}
        try:
            async with asyncio.timeout(max(1e-3, patience.left_s())):
                for index in experts:
                    providers = await self._swarm.directory.find_providers(way.uids[index], again=True)
                    for each in self._swarm.trust.order(providers, way.uids[index]):
                        if each.schema_digest == way.info.schema_digest:
                            found.setdefault(index, each)
        except (P2PMoEError, TimeoutError):
            pass  # the DHT is not there now; what was found is
        return found

    # -- private

    def _note_broken(self, provider: Provider, replies: list[tuple[str, DecodeError]]) -> None:
        """A pass is one piece of evidence of each kind, however many experts of a node are broken."""
        numbers = [each for each in replies if isinstance(each[1], NonFiniteReplyError) and each[1].is_evidence]
        forms = [each for each in replies if not isinstance(each[1], NonFiniteReplyError)]
        for some in (numbers, forms):
            if some:
                self._swarm.note_failure(provider, some[0][1], *(uid for uid, _ in some))

    def _call(
        self,
        way: Route,
        index: int,
        direction: Pass,
        tensors: Flat,
        protos: tuple[BatchTensorProto, ...],
        expected: tuple[BatchTensorProto, ...],
        timeout_s: float,
        call_id: str | None = None,
    ) -> Call:
        provider = way.providers[index]
        assert provider is not None
        start, end = way.routing.bounds[index]
        rows = [tensor[start:end] for tensor in tensors]
        return make_call(
            provider.endpoint,
            way.uids[index],
            direction,
            rows,
            protos,
            expected,
            timeout_s=timeout_s,
            call_id=call_id,
            peer_id=provider.peer_id,
            manner=for_expert(way.manner, index),
        )

    def _checked(
        self, way: Route, index: int, call: Call, result: Flat | P2PMoEError, tensors: Flat
    ) -> Flat | P2PMoEError:
        strict = self._options.detect_anomalies
        if isinstance(result, P2PMoEError) or call.is_finite or not (strict or self._swarm.check_finite):
            return result
        start, end = way.routing.bounds[index]
        sent = [tensor[start:end] for tensor in tensors]
        return check_finite(f"{call.uid} at {call.endpoint}", result, sent, call.expected, strict=strict) or result


class _RemoteMix(torch.autograd.Function):
    """Puts the pairs' outputs into the autograd graph; backward is one more pass over the same experts."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        passes: MixturePasses,
        way: Route,
        answered: list[int],
        outputs: Flat,
        *inputs: torch.Tensor,
    ) -> Flat:
        ctx.passes, ctx.way, ctx.answered = passes, way, answered
        return keep_for_backward(ctx, inputs, outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        passes: MixturePasses = ctx.passes
        way: Route = ctx.way
        wanted = input_gradients(
            ctx,
            gradients,
            lambda inputs, filled: passes.backward(way, ctx.answered, inputs, filled),
            protos=way.info.outputs,
            skip_non_finite=passes.skips_non_finite,
        )
        return None, None, None, None, None, *wanted


class _Enough:
    """True once every row has as many answers as it needs. Called on the thread that reads the answers.

    In numpy: torch refuses another thread to write to what was made under the caller's `inference_mode`.
    """

    def __init__(self, way: Route, sent: list[int], needed: Counts) -> None:
        rows_P = way.routing.rows_P.numpy()
        self._rows = [rows_P[slice(*way.routing.bounds[index])] for index in sent]
        self._missing = needed.copy()

    def __call__(self, position: int) -> bool:
        self._missing[self._rows[position]] -= 1
        return not bool((self._missing > 0).any())


def _succeeded(experts: Sequence[int], results: Sequence[Flat | P2PMoEError]) -> list[int]:
    return [index for index in experts if not isinstance(results[index], P2PMoEError)]


def _count_rows(way: Route, experts: Sequence[int]) -> Counts:
    """[B]: how many of these experts each row went to."""
    counts = np.zeros(way.rows, np.int64)
    rows_P = way.routing.rows_P.numpy()
    for index in experts:
        counts[rows_P[slice(*way.routing.bounds[index])]] += 1
    return counts


def _leave_out_other_sizes(way: Route, results: list[Flat | P2PMoEError]) -> None:
    """Answers of another length than most have cannot be mixed with these; they count as failed."""
    came = {
        index: tuple(each.shape[1:] for each in result)
        for index, result in enumerate(results)
        if not isinstance(result, P2PMoEError)
    }
    if len(set(came.values())) < 2:
        return
    usual = Counter(came.values()).most_common(1)[0][0]
    for index, sizes in came.items():
        if sizes != usual:
            shown = ", ".join(str(list(size)) for size in sizes)
            results[index] = ExpertFailedError(
                f"{way.uids[index]} gave rows of {shown}, other experts of "
                f"{', '.join(str(list(size)) for size in usual)}; they cannot be mixed"
            )


def _join(
    results: Sequence[Flat | P2PMoEError],
    bounds: Sequence[tuple[int, int]],
    protos: tuple[BatchTensorProto, ...],
    sizes: Sequence[Sequence[int]],
    device: torch.device,
) -> Flat:
    """One tensor [P, *sizes] for each proto; zeros for experts that did not answer."""
    joined = []
    for position, (proto, size) in enumerate(zip(protos, sizes, strict=True)):
        parts = [
            torch.zeros(end - start, *size, dtype=proto.dtype, device="cpu")
            if isinstance(result, P2PMoEError)
            else result[position]
            for (start, end), result in zip(bounds, results, strict=True)
        ]
        joined.append(
            (torch.cat(parts) if parts else torch.zeros(0, *size, dtype=proto.dtype, device="cpu")).to(device)
        )
    return tuple(joined)
