"""A mixture-of-experts layer whose experts live in the swarm.

The way of a batch: gate, beam-search, group rows by expert and experts by node, one exchange a node, mix what came
back. Knows nothing of sockets. Shapes: B rows, D features, K experts a row, P (row, expert) pairs, O output features.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from p2pmoe.client.beam_search import BeamSearch, Found, MaskCache, read_within
from p2pmoe.client.directory import ExpertInfo
from p2pmoe.client.exchange import Call, CallGroup, make_call
from p2pmoe.client.gating import ProductKeyGating, masked_softmax
from p2pmoe.client.remote_expert import always_differentiable, check_arguments, fill_gradients, keep_outputs
from p2pmoe.client.replies import check_finite
from p2pmoe.client.routing import Routing, route
from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import (
    ExpertNotFoundError,
    ExpertsUnavailableError,
    NonFiniteReplyError,
    P2PMoEError,
    SchemaError,
)
from p2pmoe.experts.directory import Provider
from p2pmoe.experts.uid import parse_uid, prefix_of
from p2pmoe.protocol.nested import nested_map, nested_pack
from p2pmoe.protocol.schema import BatchTensorProto, format_schema
from p2pmoe.rpc.base import Flat
from p2pmoe.types import Pass, PeerId

T = TypeVar("T")
_SHOWN_ROWS = 8
_ATTEMPTS = 3  # searches for one forward pass, each without the peers that were silent before


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
    beam_size: int
    search_timeout_s: float


@dataclass(frozen=True, slots=True)
class Batch:
    """One call's input, one row each. `lead` is the shape that the rows had; inputs are flat, in wire order."""

    info: ExpertInfo
    inputs: Flat
    gating_input: torch.Tensor
    lead: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """Where every pair goes: rows grouped by expert, and a provider for each expert (None: nobody fits)."""

    routing: Routing
    uids: list[str]
    providers: list[Provider | None]
    info: ExpertInfo
    rows: int


Step = CallGroup | Coroutine[Any, Any, Any]
"""What a pass waits for: calls to send, or a coroutine to run on the swarm's loop."""
Steps = Generator[Step, Any, T]


class RemoteMixtureOfExperts(nn.Module):
    """Mixes the k best experts that are alive, for every row.

    Args:
        swarm: where the experts are.
        in_features: D, the width that the gating network reads.
        grid_size: the grid of coordinates; 1 to 4 dimensions.
        uid_prefix: the name in front of the coordinates, "ffn" of "ffn.3.17".
        k_best: experts a row.
        k_min: experts that must answer for a row; when every row has them, the rest get `timeout_after_k_min_s`.
        forward_timeout_s, backward_timeout_s: how long one pass may take in all.
        timeout_after_k_min_s: None waits for all k_best until the timeout.
        backward_k_min: experts a row whose backward pass must succeed, of those that answered forward.
        detect_anomalies: refuse non-finite inputs, and treat every non-finite answer as a failure. Without it an
            answer counts as a failure unless non-finite inputs or gradients of the caller's own explain it.
        allow_zero_outputs: rows with fewer than k_min answers are mixed from what there is, zeros if nothing;
            otherwise they raise.
        beam_size: how many prefixes a row the search follows; at least k_best.
        search_timeout_s: how long one search may wait for the DHT; then it goes on with what it knows.

    Input [B, D] or [B, T, D] gives the same shape with the experts' output width. Experts that take whole
    sequences, [T, D] a row, are chosen by the mean over T. Further arguments are split by rows like the first.

    Calling it raises:
        ExpertsUnavailableError: some rows had too few answers; `rows` lists them.
        ExpertNotFoundError: no expert of this prefix is known at all (and zeros are not allowed).
        SchemaError: the input does not fit the experts.
    """

    def __init__(
        self,
        swarm: Swarm,
        *,
        in_features: int,
        grid_size: Sequence[int],
        uid_prefix: str,
        k_best: int,
        k_min: int = 1,
        forward_timeout_s: float = 60.0,
        backward_timeout_s: float = 60.0,
        timeout_after_k_min_s: float | None = 1.0,
        backward_k_min: int = 1,
        detect_anomalies: bool = False,
        allow_zero_outputs: bool = False,
        beam_size: int | None = None,
        search_timeout_s: float = 5.0,
    ) -> None:
        super().__init__()
        name = uid_prefix.rstrip(".")
        parse_uid(f"{name}.0")
        if k_best < 1 or not 0 <= k_min <= k_best or not 0 <= backward_k_min <= k_best:
            raise SchemaError(
                f"k_best={k_best} must be at least 1 and at least k_min={k_min}, {backward_k_min=}, all ≥ 0"
            )
        self.swarm, self.uid_prefix = swarm, name
        self.gate = ProductKeyGating(in_features, grid_size)
        self.in_features, self.grid_size = in_features, self.gate.grid_size
        self.options = MixtureOptions(
            k_best=k_best,
            k_min=k_min,
            backward_k_min=backward_k_min,
            forward_timeout_s=forward_timeout_s,
            backward_timeout_s=backward_timeout_s,
            timeout_after_k_min_s=timeout_after_k_min_s,
            detect_anomalies=detect_anomalies,
            allow_zero_outputs=allow_zero_outputs,
            beam_size=max(k_best, beam_size or max(2 * k_best, 8)),
            search_timeout_s=search_timeout_s,
        )
        self._masks = MaskCache()
        self._info: ExpertInfo | None = None

    def extra_repr(self) -> str:
        return f"{self.uid_prefix}, grid {self.grid_size}, k_best={self.options.k_best}, k_min={self.options.k_min}"

    # -- calling

    def forward(self, x: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """Mix the experts' outputs for every row of `x`, [B, D] or [B, T, D]."""
        return self._drive(self._forward_steps(x, args, kwargs), self.options.forward_timeout_s)

    async def acall(self, x: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """The same from a coroutine of any loop, which stays free meanwhile. `backward()` blocks as always."""
        deadline = time.monotonic() + self.options.forward_timeout_s
        steps, answer = self._forward_steps(x, args, kwargs), None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            answer, left_s = None, _left(deadline)
            if isinstance(step, CallGroup):
                await self.swarm.call_async(step, left_s)
            else:
                answer = await self.swarm.run_async(step, left_s)

    def _drive(self, steps: Steps[T], timeout_s: float) -> T:
        answer, deadline = None, time.monotonic() + timeout_s
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as stop:
                result: T = stop.value
                return result
            answer, left_s = None, _left(deadline)
            if isinstance(step, CallGroup):
                self.swarm.call(step, left_s)
            else:
                answer = self.swarm.run(step, left_s)

    # -- forward

    def _forward_steps(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps[Any]:
        deadline = time.monotonic() + self.options.forward_timeout_s
        if self._info is None:
            self._info = yield self._discover()
        if self._info is None:  # nobody is there, and zeros are allowed
            self._check_input(x)
            rows = x.reshape(-1, self.in_features)
            return self._nothing(rows, self._scores(rows), [torch.zeros_like(x)], None)
        batch = self._prepare(self._info, x, args, kwargs)
        scores = self._scores(batch.gating_input)
        if not len(batch.gating_input):
            zeros = [proto.make_zeros(0, x.device).view(*batch.lead, *proto.shape) for proto in batch.info.outputs]
            return self._nothing(batch.inputs[0], scores, zeros, batch.info.outputs_schema)
        for attempt in range(_ATTEMPTS):
            found = yield from self._search(scores)
            way = self._route(batch.info, found)
            sorted_inputs = tuple(
                tensor.index_select(0, way.routing.rows_P.to(tensor.device)) for tensor in batch.inputs
            )
            group, sent = self._forward_group(way, sorted_inputs, found.valid, _left(deadline))
            if sent:
                yield group
            results = self._collect(way, group, sent, self.options.forward_timeout_s, sorted_inputs)
            self._offer(way, sent, sorted_inputs, results)
            alive = self._alive(way, results, found.valid)
            short = self._short_rows(alive)
            if not short:
                break
            # A peer that did not answer is left out of the next search, so other experts may step in.
            lost = any(isinstance(result, P2PMoEError) for result in results)
            if attempt + 1 == _ATTEMPTS or not lost or time.monotonic() >= deadline:
                raise self._unavailable("forward", short, results)
        outputs = self._attach(way, results, sorted_inputs)
        weights = self._weights(scores, found.coordinates.to(x.device), alive.to(x.device))
        return self._finish(self._mix(batch, way, outputs, weights), scores, found.coordinates.to(x.device))

    # What RemoteSwitchMixtureOfExperts does differently:

    def _scores(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Gating scores of each grid dimension."""
        scores: Sequence[torch.Tensor] = self.gate(x)
        return scores

    def _weights(self, scores: Sequence[torch.Tensor], coordinates: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """[B, K]: how much of each expert goes into a row."""
        return masked_softmax(self.gate.score(scores, coordinates), alive)

    def _finish(self, mixed: Any, scores: Sequence[torch.Tensor], coordinates: torch.Tensor) -> Any:
        """What the layer returns."""
        del scores, coordinates
        return mixed

    async def _discover(self) -> ExpertInfo | None:
        """The schema that most experts below one live prefix share."""
        prefix = prefix_of(self.uid_prefix, ())
        for level, size in enumerate(self.grid_size):
            children = (await self.swarm.directory.get_prefixes([prefix]))[prefix]
            inside = sorted(coordinate for coordinate in children if coordinate < size)
            if not inside:
                break
            if level + 1 == len(self.grid_size):
                counts = Counter(each.schema_digest for c in inside for each in children[c])
                digest = counts.most_common(1)[0][0]
                fitting = {c: [each for each in children[c] if each.schema_digest == digest] for c in inside}
                uid, providers = next((f"{prefix}{c}", each) for c, each in fitting.items() if each)
                return await self.swarm.expert_info(uid, providers)
            prefix = f"{prefix}{inside[0]}."
        if self.options.allow_zero_outputs:
            return None
        raise ExpertNotFoundError(
            f"no expert below {self.uid_prefix}. is alive in grid {self.grid_size}; "
            f"run `p2pmoe lookup '{self.uid_prefix}.*'` to see who is there"
        )

    def _check_input(self, x: torch.Tensor) -> None:
        if x.ndim < 2 or x.shape[-1] != self.in_features:
            raise SchemaError(
                f"{self!r} takes [B, {self.in_features}] or [B, T, {self.in_features}], got {list(x.shape)}"
            )

    def _nothing(
        self, rows: torch.Tensor, scores: Sequence[torch.Tensor], zeros: Sequence[torch.Tensor], structure: Any
    ) -> Any:
        """These zeros, in the graph of input and gate, so that training goes on through them."""
        silent = [each.masked_fill(torch.ones_like(each, dtype=torch.bool), 0.0).sum() for each in (rows, *scores)]
        mixed = [sum((zero.to(each.dtype) for zero in silent), start=each) for each in zeros]
        wished = torch.stack([score.argmax(-1) for score in scores], dim=-1).unsqueeze(1)
        return self._finish(nested_pack(mixed, structure), scores, wished)

    def _prepare(self, info: ExpertInfo, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        self._check_input(x)
        if self.options.detect_anomalies and not bool(x.isfinite().all()):
            raise SchemaError("the input has non-finite values; detect_anomalies refuses to send them")
        row_rank = len(info.inputs[0].shape)
        if not 1 <= row_rank < x.ndim:
            expert = f"{self.uid_prefix} takes {format_schema(info.forward_schema)}"
            raise SchemaError(f"{expert}; an input of {list(x.shape)} has no batch dimension in front of that")
        lead = tuple(x.shape[: x.ndim - row_rank])
        args, kwargs = nested_map(lambda each: each.reshape(-1, *each.shape[len(lead) :]), ((x, *args), kwargs))
        inputs = check_arguments(self.uid_prefix, info, args, kwargs)
        rows = args[0]
        gating_input = rows if row_rank == 1 else rows.flatten(1, -2).mean(1)
        return Batch(info, inputs, gating_input, lead)

    def _search(self, scores: Sequence[torch.Tensor]) -> Steps[Found]:
        cpu_scores = [score.detach().to("cpu", torch.float32) for score in scores]
        search = BeamSearch(cpu_scores, self.uid_prefix, self.options.beam_size, self._masks)
        directory = self.swarm.directory
        deadline = time.monotonic() + self.options.search_timeout_s
        while wanted := search.wanted():
            children = {prefix: directory.cached_prefix(prefix) for prefix in wanted}
            if missing := [prefix for prefix, known in children.items() if known is None]:
                children.update((yield read_within(directory, missing, _left(deadline))))
            search.advance({prefix: known or {} for prefix, known in children.items()})
        return search.found(self.options.k_best)

    def _route(self, info: ExpertInfo, found: Found) -> Route:
        routing = route(found.coordinates, found.valid, self.grid_size)
        order = self.swarm.trust.order
        candidates = [order(found.providers(self.uid_prefix, expert)) for expert in routing.experts]
        providers = [
            next((each for each in among if each.schema_digest == info.schema_digest), None) for among in candidates
        ]
        uids = [prefix_of(self.uid_prefix, expert)[:-1] for expert in routing.experts]
        return Route(routing, uids, providers, info, len(found.valid))

    def _forward_group(
        self, way: Route, inputs: Flat, valid: torch.Tensor, timeout_s: float
    ) -> tuple[CallGroup, list[int]]:
        info = way.info
        sent = [index for index, provider in enumerate(way.providers) if provider is not None]
        calls = [self._call(way, index, "forward", inputs, info.inputs, info.outputs, timeout_s) for index in sent]
        enough = _Enough(way, sent, valid.sum(1).clamp(max=self.options.k_min))
        return CallGroup(calls, enough=enough, grace_s=self.options.timeout_after_k_min_s), sent

    def _call(
        self,
        way: Route,
        index: int,
        direction: Pass,
        tensors: Flat,
        protos: tuple[BatchTensorProto, ...],
        expected: tuple[BatchTensorProto, ...],
        timeout_s: float,
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
            peer_id=provider.peer_id,
        )

    def _collect(
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
        lied = set[PeerId]()
        for index, call, result in zip(sent, group.calls, answers, strict=True):
            checked = results[index] = self._checked(way, index, call, result, tensors)
            provider = way.providers[index]
            if not isinstance(checked, P2PMoEError) or provider is None:
                continue
            # One slow expert is no reason to leave out a peer that has answered for others.
            silent = provider.peer_id not in alive
            # A pass is one piece of evidence, however many experts of a node are broken.
            if silent or (isinstance(checked, NonFiniteReplyError) and provider.peer_id not in lied):
                self.swarm.note_failure(provider, checked)
                lied.add(provider.peer_id)
        return results

    def _checked(
        self, way: Route, index: int, call: Call, result: Flat | P2PMoEError, tensors: Flat
    ) -> Flat | P2PMoEError:
        strict = self.options.detect_anomalies
        if isinstance(result, P2PMoEError) or not (strict or self.swarm.check_finite):
            return result
        start, end = way.routing.bounds[index]
        sent = [tensor[start:end] for tensor in tensors]
        return check_finite(f"{call.uid} at {call.endpoint}", result, sent, call.expected, strict=strict) or result

    def _offer(self, way: Route, sent: list[int], inputs: Flat, results: list[Flat | P2PMoEError]) -> None:
        """Calls that went through; the swarm may have some repeated by somebody else."""
        verifier = self.swarm.verifier
        if verifier is None:
            return
        for index in sent:
            provider, result = way.providers[index], results[index]
            if provider is not None and not isinstance(result, P2PMoEError):
                start, end = way.routing.bounds[index]
                verifier.offer(provider, way.uids[index], way.info, tuple(each[start:end] for each in inputs), result)

    @staticmethod
    def _alive(way: Route, results: list[Flat | P2PMoEError], valid: torch.Tensor) -> torch.Tensor:
        """Bool [B, K]: whose answer came."""
        alive = torch.zeros_like(valid)
        for (start, end), result in zip(way.routing.bounds, results, strict=True):
            if not isinstance(result, P2PMoEError):
                alive[way.routing.rows_P[start:end], way.routing.slots_P[start:end]] = True
        return alive

    def _short_rows(self, alive: torch.Tensor) -> list[int]:
        if self.options.allow_zero_outputs:
            return []
        short: list[int] = (alive.sum(1) < max(1, self.options.k_min)).nonzero().flatten().tolist()
        return short

    def _unavailable(
        self, direction: Pass, rows: Sequence[int], results: Sequence[Flat | P2PMoEError]
    ) -> ExpertsUnavailableError:
        shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + (", …" if len(rows) > _SHOWN_ROWS else "")
        reason = next(
            (str(result) for result in results if isinstance(result, P2PMoEError)), "too few experts are alive"
        )
        k_min = max(1, self.options.k_min) if direction == "forward" else self.options.backward_k_min
        return ExpertsUnavailableError(
            f"{direction}: fewer than {k_min} experts answered for {len(rows)} rows ({shown}): {reason}", tuple(rows)
        )

    def _attach(self, way: Route, results: list[Flat | P2PMoEError], inputs: Flat) -> Flat:
        """Outputs [P, O] of every pair, zeros where nobody answered, in the autograd graph of the inputs."""
        device = inputs[0].device
        outputs = _join(results, way.routing.bounds, way.info.outputs, device)
        if not torch.is_grad_enabled():
            return outputs
        answered = [index for index, result in enumerate(results) if not isinstance(result, P2PMoEError)]
        attached: Flat = _RemoteMix.apply(  # type: ignore[no-untyped-call]
            always_differentiable(), self, way, answered, outputs, *inputs
        )
        return attached

    def _mix(self, batch: Batch, way: Route, outputs: Flat, weights: torch.Tensor) -> Any:
        """Weighted sums over each row's pairs, in the shape that the input had."""
        rows_P, slots_P = way.routing.rows_P.to(weights.device), way.routing.slots_P.to(weights.device)
        weights_P = weights[rows_P, slots_P]
        mixed = []
        for output in outputs:
            weighted = output * weights_P.to(output.dtype).view(-1, *[1] * (output.ndim - 1))
            total = torch.zeros(way.rows, *output.shape[1:], dtype=weighted.dtype, device=weighted.device)
            mixed.append(total.index_add(0, rows_P, weighted).view(*batch.lead, *output.shape[1:]))
        return batch.info.pack_outputs(mixed)

    # -- backward

    def backward_pass(self, way: Route, answered: list[int], inputs: Flat, gradients: Flat) -> Flat:
        """Gradients [P, …] of every input; trains each expert that answered. Zeros where nobody did."""
        info, timeout_s = way.info, self.options.backward_timeout_s
        calls = [
            self._call(
                way, index, "backward", (*inputs, *gradients), info.inputs + info.outputs, info.inputs, timeout_s
            )
            for index in answered
        ]
        needed = _count_rows(way, answered).clamp(max=self.options.backward_k_min)
        enough = _Enough(way, answered, needed)
        group = CallGroup(calls, enough=enough, grace_s=self.options.timeout_after_k_min_s)
        if calls:
            self.swarm.call(group, timeout_s)
        results = self._collect(way, group, answered, timeout_s, (*inputs, *gradients))
        trained = [index for index in answered if not isinstance(results[index], P2PMoEError)]
        short = (_count_rows(way, trained) < needed).nonzero().flatten().tolist()
        if short:
            raise self._unavailable("backward", short, [results[index] for index in answered])
        return _join(results, way.routing.bounds, info.inputs, inputs[0].device)


class _RemoteMix(torch.autograd.Function):
    """Puts the pairs' outputs into the autograd graph; backward is one more pass over the same experts."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        mixture: RemoteMixtureOfExperts,
        way: Route,
        answered: list[int],
        outputs: Flat,
        *inputs: torch.Tensor,
    ) -> Flat:
        ctx.mixture, ctx.way, ctx.answered = mixture, way, answered
        ctx.save_for_backward(*inputs)
        return keep_outputs(ctx, outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        filled = fill_gradients(ctx, gradients)
        results = ctx.mixture.backward_pass(ctx.way, ctx.answered, ctx.saved_tensors, filled)
        needed = ctx.needs_input_grad[5:]
        return (
            None,
            None,
            None,
            None,
            None,
            *(each if need else None for each, need in zip(results, needed, strict=True)),
        )


class _Enough:
    """True once every row has as many answers as it needs. Called on the swarm's loop."""

    def __init__(self, way: Route, sent: list[int], needed: torch.Tensor) -> None:
        self._rows = [way.routing.rows_P[slice(*way.routing.bounds[index])] for index in sent]
        self._missing = needed.clone()

    def __call__(self, position: int) -> bool:
        self._missing[self._rows[position]] -= 1
        return not bool((self._missing > 0).any())


def _left(deadline: float) -> float:
    """Seconds until then, never quite none."""
    return max(1e-3, deadline - time.monotonic())


def _count_rows(way: Route, experts: Sequence[int]) -> torch.Tensor:
    """int64 [B]: how many of these experts each row went to."""
    counts = torch.zeros(way.rows, dtype=torch.int64)
    for index in experts:
        counts[way.routing.rows_P[slice(*way.routing.bounds[index])]] += 1
    return counts


def _join(
    results: Sequence[Flat | P2PMoEError],
    bounds: Sequence[tuple[int, int]],
    protos: tuple[BatchTensorProto, ...],
    device: torch.device,
) -> Flat:
    """One tensor [P, …] for each proto; zeros for experts that did not answer."""
    joined = []
    for position, proto in enumerate(protos):
        parts = [
            proto.make_zeros(end - start) if isinstance(result, P2PMoEError) else result[position]
            for (start, end), result in zip(bounds, results, strict=True)
        ]
        joined.append((torch.cat(parts) if parts else proto.make_zeros(0)).to(device))
    return tuple(joined)
