"""A mixture-of-experts layer whose experts live in the swarm.

The way of a batch: gate, beam-search, group rows by expert and experts by node, one exchange a node
(`mixture_pass.py`), mix what came back. Knows nothing of sockets.
Shapes: B rows, D features, K experts a row, P (row, expert) pairs, O output features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import nn

from p2pmoe.client.arguments import check_arguments, give_back
from p2pmoe.client.beam_search import Found
from p2pmoe.client.calls import CallGroup
from p2pmoe.client.directory import ExpertInfo
from p2pmoe.client.discovery import Wanted
from p2pmoe.client.gating import ProductKeyGating, masked_softmax
from p2pmoe.client.graph import always_differentiable
from p2pmoe.client.grid_finder import GridFinder
from p2pmoe.client.manner import manner_of
from p2pmoe.client.mixture_pass import MixtureOptions, MixturePasses, Route
from p2pmoe.client.patience import Patience, as_timeout, may_pass
from p2pmoe.client.routing import route
from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import P2PMoEError, SchemaError
from p2pmoe.experts.offers import format_grid
from p2pmoe.experts.uid import parse_uid, prefix_of
from p2pmoe.protocol.modes import keeps_graph, mode_of_now, out_of_compiled_graphs, refuse_tracing, require_plain
from p2pmoe.protocol.nested import nested_map, nested_pack
from p2pmoe.protocol.schema import format_schema, format_tensor, largest_free
from p2pmoe.rpc.base import Flat
from p2pmoe.types import Manner

T = TypeVar("T")
_ATTEMPTS = 3  # searches for one forward pass, each without the peers that were silent before, until it waits for them
_SLACK_S = 1.0  # coroutines of a pass end with it by themselves, and say why


@dataclass(frozen=True, slots=True)
class Batch:
    """One call's input, one row each; inputs are flat, in wire order.

    lead: the shape that the rows had; dtype: what floating outputs are cast to, None for the schema's own.
    """

    info: ExpertInfo
    inputs: Flat
    gating_input: torch.Tensor
    lead: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class _Answers:
    """What came of asking the experts that one search had found, for inputs sorted by expert.

    alive: bool [B, K]; short: rows with too few answers; reasons: errors of this asking, or else of the one before.
    """

    found: Found
    way: Route
    inputs: Flat
    results: list[Flat | P2PMoEError]
    alive: torch.Tensor
    short: list[int]
    errors: list[P2PMoEError]
    reasons: list[P2PMoEError]


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
        allow_zero_outputs: rows with fewer than k_min answers are mixed from what there is, zeros if nothing, with a
            line in the log; otherwise they raise. A grid or a schema that does not fit raises all the same.
        skip_non_finite: a backward pass whose gradients hold NaN or infinity sends nothing to anybody and gives NaN
            for every input, as a `torch.amp.GradScaler` needs; without it such a pass raises.
        beam_size: how many prefixes a row the search follows; at least k_best.
        search_timeout_s: how long one search may wait for the DHT; then it goes on with what it knows.
        schema_digest: the only schema of experts to use. Without it the one that has most weight in the swarm of those
            that fit `in_features`, `out_features` and the first input; others are ignored with a line in the log.
        out_features: the width that experts must give; None takes any.
        partial_grid: the swarm's grid is larger than `grid_size`, and a part of it is meant.

    Input [B, D] or [B, T, D] gives the same shape with the experts' output width. Experts that take whole
    sequences, [T, D] a row, are chosen by the mean over T. Further arguments are split by rows like the first.

    Floating arguments are cast to the schema's dtype; if the first was, the outputs come back in its dtype. The gate
    computes in its parameters' dtype; weights and sums are float32 at least.

    `copy.deepcopy` shares the swarm and copies the gate. To save the layer, save its `state_dict`.

    Making it raises SchemaError or ConfigError for numbers that make no sense. Calling it raises:
        ExpertsUnavailableError: some rows had too few answers; `rows` lists them.
        ExpertNotFoundError: no expert of this prefix is known at all (and zeros are not allowed).
        SchemaError: the input does not fit the experts, they give integers, which cannot be mixed, or the grid is not
            the swarm's.
        TorchModeError: torch.jit.trace, torch.func, forward-mode differentiation or a second derivative.
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
        skip_non_finite: bool = False,
        beam_size: int | None = None,
        search_timeout_s: float = 5.0,
        schema_digest: str | None = None,
        out_features: int | None = None,
        partial_grid: bool = False,
    ) -> None:
        super().__init__()
        name = uid_prefix.rstrip(".")
        parse_uid(f"{name}.0")
        numbers: dict[str, Any] = {"k_best": k_best, "k_min": k_min, "backward_k_min": backward_k_min}
        for option, value in numbers.items():
            if not isinstance(value, Integral):
                raise SchemaError(f"{option} must be a whole number, got {value!r}")
        if k_best < 1 or not 0 <= k_min <= k_best or not 0 <= backward_k_min <= k_best:
            raise SchemaError(
                f"k_best={k_best} must be at least 1 and at least k_min={k_min}, {backward_k_min=}, all ≥ 0"
            )
        self.swarm, self.uid_prefix = swarm, name
        self.gate = ProductKeyGating(in_features, grid_size)
        self.in_features, self.grid_size = in_features, self.gate.grid_size
        if k_best > math.prod(self.grid_size):
            raise SchemaError(
                f"k_best={k_best} is more than the {math.prod(self.grid_size)} experts of a grid of "
                f"{format_grid(self.grid_size)}"
            )
        self.options = MixtureOptions(
            k_best=k_best,
            k_min=k_min,
            backward_k_min=backward_k_min,
            forward_timeout_s=as_timeout("forward_timeout_s", forward_timeout_s),
            backward_timeout_s=as_timeout("backward_timeout_s", backward_timeout_s),
            timeout_after_k_min_s=None
            if timeout_after_k_min_s is None
            else as_timeout("timeout_after_k_min_s", timeout_after_k_min_s),
            detect_anomalies=detect_anomalies,
            allow_zero_outputs=allow_zero_outputs,
            skip_non_finite=skip_non_finite,
            beam_size=max(k_best, beam_size or max(2 * k_best, 8)),
            search_timeout_s=as_timeout("search_timeout_s", search_timeout_s),
        )
        self._passes = MixturePasses(swarm, self.options)
        self._finder = GridFinder(
            swarm,
            Wanted(name, self.grid_size, schema_digest, partial_grid),
            in_features=in_features,
            out_features=out_features,
            beam_size=self.options.beam_size,
            k_best=k_best,
            allow_nobody=allow_zero_outputs,
            timeout_s=self.options.search_timeout_s,
        )

    def extra_repr(self) -> str:
        return f"{self.uid_prefix}, grid {self.grid_size}, k_best={self.options.k_best}, k_min={self.options.k_min}"

    @property
    def schema_digest(self) -> str | None:
        """Of the experts that are used; None before the first call."""
        return None if self._finder.info is None else self._finder.info.schema_digest

    def check(self) -> None:
        """Find out now whether prefix, grid and width fit what the swarm has, instead of at the first call.

        Raises as a call does; ExpertNotFoundError also where zeros are allowed.
        """
        self.swarm.run(self._finder.check(), self.options.forward_timeout_s)

    # -- calling

    def forward(self, x: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """Mix the experts' outputs for every row of `x`, [B, D] or [B, T, D]."""
        return out_of_compiled_graphs(self._forward)(x, args, kwargs)

    async def acall(self, x: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """The same from a coroutine of any loop, which stays free meanwhile. `backward()` blocks as always."""
        deadline = time.monotonic() + self.options.forward_timeout_s
        steps, answer = self._forward_steps(x, args, kwargs), None
        as_begun = mode_of_now()
        while True:
            try:
                with as_begun():
                    step = steps.send(answer)
            except StopIteration as stop:
                return stop.value
            answer, left_s = None, _left(deadline)
            if isinstance(step, CallGroup):
                await self.swarm.call_async(step, left_s)
            else:
                answer = await self.swarm.run_async(step, left_s + _SLACK_S)

    def _forward(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._drive(self._forward_steps(x, args, kwargs), self.options.forward_timeout_s)

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
                answer = self.swarm.run(step, left_s + _SLACK_S)

    # -- forward

    def _forward_steps(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps[Any]:
        deadline = time.monotonic() + self.options.forward_timeout_s
        refuse_tracing(f"a mixture of {self.uid_prefix}")
        self._check_input(x)
        if self._finder.info is None:
            yield self._finder.find(x, deadline)
        if (info := self._finder.info) is None:  # nobody is there, and zeros are allowed
            rows = x.reshape(-1, self.in_features)
            return self._nothing(rows, self._scores(rows), [torch.zeros_like(x)], None)
        batch = self._prepare(info, x, args, kwargs)
        scores, manner = self._scores(batch.gating_input), manner_of(self, info.draws)
        if not len(batch.gating_input):
            return self._nothing(batch.inputs[0], scores, self._no_rows(batch, x.device), info.outputs_schema)
        batch, scores, answers = yield from self._answers(batch, scores, manner, (x, args, kwargs), deadline)
        return self._mix_answers(batch, scores, answers, x.device)

    def _answers(
        self,
        batch: Batch,
        scores: Sequence[torch.Tensor],
        manner: Manner,
        call: tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]],
        deadline: float,
    ) -> Steps[tuple[Batch, Sequence[torch.Tensor], _Answers]]:
        """Search and ask until every row has its answers; see `patience` for how long experts are waited for.

        Gives the batch and its scores too, which are others where the swarm has changed its schema.
        """
        patience, attempt, waiting, passing = Patience(deadline), 0, False, False
        answers: _Answers | None = None
        while True:
            found, looked = yield from self._search(scores, batch.info)
            if self._finder.should_look_again(found):
                yield self._finder.look_again(call[0])
                if (info := self._finder.info) is not None and info.schema_digest != batch.info.schema_digest:
                    batch = self._prepare(info, *call)
                    scores = self._scores(batch.gating_input)
                    found, looked = yield from self._search(scores, info)
            errors: list[P2PMoEError] = []
            if answers is None or not waiting or self._passes.can_fill(found.valid):  # else nobody is back yet
                attempt += 1
                answers = yield from self._ask(batch, found, manner, deadline, answers)
                if not answers.short:
                    break
                errors = answers.errors
                passing = any(may_pass(error) for error in errors) or (passing and not errors)
                if errors and attempt < _ATTEMPTS and patience.left_s():
                    continue  # a peer that did not answer is left out of the next search: others may step in
            waiting = passing or (not errors and self._finder.awaits(looked))
            pause_s = patience.next_pause_s() if waiting and not self.swarm.directory.is_fixed else None
            if pause_s is None:
                raise self._passes.unavailable("forward", answers.short, answers.reasons)
            yield self._finder.read_again(looked, pause_s, patience)
        self._finder.has_served = True
        return batch, scores, answers

    @staticmethod
    def _no_rows(batch: Batch, device: torch.device) -> Sequence[torch.Tensor]:
        """The outputs for an input without rows."""
        info = batch.info
        free = largest_free(info.inputs, [each.shape for each in batch.inputs])
        empty = [proto.make_zeros(0, device, free=free).view(*batch.lead, *proto.sized(free)) for proto in info.outputs]
        return give_back(empty, batch.dtype)

    def _ask(
        self, batch: Batch, found: Found, manner: Manner, deadline: float, before: _Answers | None
    ) -> Steps[_Answers]:
        """Call the experts that were found."""
        way = self._route(batch.info, found, manner)
        inputs = tuple(tensor.index_select(0, way.routing.rows_P.to(tensor.device)) for tensor in batch.inputs)
        group, sent = self._passes.forward_group(way, inputs, found.valid, _left(deadline))
        if sent:
            yield group
        results = self._passes.collect(way, group, sent, self.options.forward_timeout_s, inputs)
        self._passes.offer(way, sent, inputs, results)
        alive = self._passes.alive(way, results, found.valid)
        errors = [result for result in results if isinstance(result, P2PMoEError)]
        reasons = errors or (before.reasons if before else [])
        return _Answers(found, way, inputs, results, alive, self._passes.short_rows(alive), errors, reasons)

    def _mix_answers(
        self, batch: Batch, scores: Sequence[torch.Tensor], answers: _Answers, device: torch.device
    ) -> Any:
        outputs = self._passes.attach(answers.way, answers.results, answers.inputs)
        if self.options.allow_zero_outputs:
            self._say_zeros(answers)
        coordinates = answers.found.coordinates.to(device)
        weights = self._weights(scores, coordinates, answers.alive.to(device))
        return self._finish(self._mix(batch, answers.way, outputs, weights), scores, coordinates)

    def _say_zeros(self, answers: _Answers) -> None:
        empty = int((~answers.alive.any(1)).sum())
        if empty:
            rows, reason = len(answers.alive), answers.errors[0] if answers.errors else "no expert is alive"
            self._finder.say_seldom(f"{self.uid_prefix}: {empty} of {rows} rows are zeros: {reason}")

    # What RemoteSwitchMixtureOfExperts does differently:

    def _scores(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Gating scores of each grid dimension, float32 at least: half of them would be ties in bfloat16."""
        return [each.to(torch.promote_types(each.dtype, torch.float32)) for each in self.gate(x)]

    def _weights(self, scores: Sequence[torch.Tensor], coordinates: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """[B, K]: how much of each expert goes into a row."""
        return masked_softmax(self.gate.score(scores, coordinates), alive)

    def _finish(self, mixed: Any, scores: Sequence[torch.Tensor], coordinates: torch.Tensor) -> Any:
        """What the layer returns."""
        del scores, coordinates
        return mixed

    def _check_input(self, x: torch.Tensor) -> None:
        takes = f"a mixture of {self.uid_prefix} takes [B, {self.in_features}] or [B, T, {self.in_features}]"
        if not isinstance(x, torch.Tensor):
            raise SchemaError(f"{takes}, got {type(x).__name__}")
        require_plain(f"a mixture of {self.uid_prefix}", "the input", x)
        if x.ndim < 2 or x.shape[-1] != self.in_features or x.is_complex():
            raise SchemaError(f"{takes}, got {format_tensor(tuple(x.shape), str(x.dtype).removeprefix('torch.'))}")

    def _nothing(
        self, rows: torch.Tensor, scores: Sequence[torch.Tensor], zeros: Sequence[torch.Tensor], structure: Any
    ) -> Any:
        """These zeros, in the graph of input and gate, so that training goes on through them."""
        parts = (rows, *scores, *((always_differentiable(),) if keeps_graph() else ()))
        silent = [each.masked_fill(torch.ones_like(each, dtype=torch.bool), 0).sum() for each in parts]
        mixed = [sum((zero.to(each.dtype) for zero in silent), start=each) for each in zeros]
        wished = torch.stack([score.argmax(-1) for score in scores], dim=-1).unsqueeze(1)
        return self._finish(nested_pack(mixed, structure), scores, wished)

    def _prepare(self, info: ExpertInfo, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        if self.options.detect_anomalies and not bool(x.isfinite().all()):
            raise SchemaError("the input has non-finite values; detect_anomalies refuses to send them")
        row_rank = len(info.inputs[0].shape)
        if not 1 <= row_rank < x.ndim:
            expert = f"{self.uid_prefix} takes {format_schema(info.forward_schema)}"
            raise SchemaError(f"{expert}; an input of {list(x.shape)} has no batch dimension in front of that")
        lead = tuple(x.shape[: x.ndim - row_rank])
        args, kwargs = nested_map(lambda each: self._as_rows(each, lead), ((x, *args), kwargs))
        inputs, dtype = check_arguments(self.uid_prefix, info, args, kwargs)
        return Batch(info, inputs, self._gating_input(args[0]), lead, dtype)

    def _as_rows(self, argument: Any, lead: tuple[int, ...]) -> torch.Tensor:
        """An argument with its leading dimensions, those of the first one, made into one."""
        if not isinstance(argument, torch.Tensor):
            raise SchemaError(f"{self.uid_prefix}: every argument must be a tensor, got {type(argument).__name__}")
        require_plain(self.uid_prefix, "an argument", argument)
        if tuple(argument.shape[: len(lead)]) != lead:
            raise SchemaError(
                f"{self.uid_prefix}: every argument must begin with the first one's {list(lead)}, the batch size; "
                f"got {list(argument.shape)}"
            )
        return argument.reshape(math.prod(lead), *argument.shape[len(lead) :])

    @staticmethod
    def _gating_input(rows: torch.Tensor) -> torch.Tensor:
        """[B, D]: the rows, or the mean over whatever lies between; no NaN where that is nothing."""
        if rows.ndim == 2:
            return rows
        flat = rows.flatten(1, -2)
        if not flat.is_floating_point():
            flat = flat.to(torch.float32)
        return flat.mean(1) if flat.shape[1] else flat.sum(1)

    def _search(self, scores: Sequence[torch.Tensor], info: ExpertInfo) -> Steps[tuple[Found, list[str]]]:
        """The best experts that are alive, and the prefixes that were looked at for them."""
        cpu_scores = [score.detach().to("cpu") for score in scores]
        looked: list[str] = []
        found = yield from self._finder.search(cpu_scores, info.schema_digest, looked)
        if not bool(found.valid.all()):
            found = self._without_lost_rows(cpu_scores, found)
        return found, looked

    def _without_lost_rows(self, scores: Sequence[torch.Tensor], found: Found) -> Found:
        """Rows that cannot be scored have no experts, however many are alive. Raises where zeros are not allowed."""
        lost = torch.stack([(score.isnan() | (score == math.inf)).any(1) for score in scores]).any(0)
        rows: list[int] = (lost & ~found.valid.all(1)).nonzero().flatten().tolist()
        if not rows:
            return found
        reason = "the gate's scores are NaN or infinite, because the input or the gate's parameters hold such numbers"
        if not self.options.allow_zero_outputs:
            raise self._passes.unavailable("forward", rows, (), reason=reason)
        self._finder.say_seldom(f"{self.uid_prefix}: {len(rows)} of {len(lost)} rows are zeros: {reason}")
        valid = found.valid.clone()
        valid[rows] = False
        return replace(found, valid=valid)

    def _route(self, info: ExpertInfo, found: Found, manner: Manner) -> Route:
        routing = route(found.coordinates, found.valid, self.grid_size)
        order = self.swarm.trust.order
        candidates = [
            order(found.providers(self.uid_prefix, expert), prefix_of(self.uid_prefix, expert)[:-1])
            for expert in routing.experts
        ]
        providers = [
            next((each for each in among if each.schema_digest == info.schema_digest), None) for among in candidates
        ]
        uids = [prefix_of(self.uid_prefix, expert)[:-1] for expert in routing.experts]
        return Route(routing, uids, providers, info, len(found.valid), manner)

    def _mix(self, batch: Batch, way: Route, outputs: Flat, weights: torch.Tensor) -> Any:
        """Weighted sums over each row's pairs, in the shape that the input had."""
        rows_P, slots_P = way.routing.rows_P.to(weights.device), way.routing.slots_P.to(weights.device)
        weights_P = weights[rows_P, slots_P]
        mixed = []
        for output in outputs:
            weighted = output.to(torch.promote_types(output.dtype, weights.dtype)) * weights_P.view(
                -1, *[1] * (output.ndim - 1)
            )
            total = torch.zeros(way.rows, *output.shape[1:], dtype=weighted.dtype, device=weighted.device)
            summed = total.index_add(0, rows_P, weighted).to(output.dtype if batch.dtype is None else batch.dtype)
            mixed.append(summed.view(*batch.lead, *output.shape[1:]))
        return batch.info.pack_outputs(mixed)


def _left(deadline: float) -> float:
    """Seconds until then, never quite none."""
    return max(1e-3, deadline - time.monotonic())
