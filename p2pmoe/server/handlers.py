"""What a node does with a call: check it against the expert's schema, queue it, answer. A `rpc.base.Service`.

Knows pools and schemas; nothing of HTTP, of the DHT, or of how a batch is computed.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from p2pmoe.config import LimitsConfig
from p2pmoe.errors import BadRequestError, CallError, DrainingError, ExpertFailedError
from p2pmoe.metrics import UNKNOWN, NodeMetrics
from p2pmoe.protocol.frames import Frame
from p2pmoe.protocol.messages import RequestHeader, TensorHeader
from p2pmoe.protocol.nested import nested_flatten
from p2pmoe.protocol.schema import FREE_GROWTH, BatchTensorProto, format_schema, format_tensor, largest_free
from p2pmoe.rpc.base import Flat
from p2pmoe.rpc.expert_pages import MAX_PAGE_EXPERTS
from p2pmoe.rpc.prompt import when_done
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.listing import ExpertListing
from p2pmoe.server.quota import CallerQuota
from p2pmoe.server.replay import ReplayWindow
from p2pmoe.server.runtime import Runtime
from p2pmoe.server.task_pool import Batch, Task, TaskPool
from p2pmoe.server.trial import FREE_SIZE, Findings
from p2pmoe.types import LOCAL_CALLER, SEED_BITS, Caller, Manner, Mode

_READY_TIMEOUT_S = 5.0
_MODES: Final[dict[str | None, Mode]] = {"train": "train", "eval": "eval", None: "eval"}
_PLAIN: Final[dict[Mode, Manner]] = {"train": Manner("train"), "eval": Manner("eval")}


@dataclass(frozen=True, slots=True)
class _Pass:
    """One expert and pass: what is expected, where it goes, how the results travel."""

    pool: TaskPool
    schema: Any
    protos: tuple[BatchTensorProto, ...]
    expected: tuple[tuple[str, tuple[int, ...]], ...]
    result_codecs: tuple[str, ...]
    row_bytes: int | None
    """None where it differs from call to call."""
    inputs: int
    findings: Findings

    def nbytes(self, header: RequestHeader) -> int:
        """Of a call's tensors."""
        if self.row_bytes is not None:
            return header.inputs[0].shape[0] * self.row_bytes
        return sum(
            proto.dtype.itemsize * math.prod(tensor.shape)
            for proto, tensor in zip(self.protos, header.inputs, strict=True)
        )

    def takes_shapes(self, tensors: tuple[TensorHeader, ...]) -> bool:
        """Whether tensors fit a schema with free dimensions; gradients may be as long as outputs may be."""
        if self.row_bytes is not None or len(tensors) != len(self.protos):
            return False
        most = FREE_GROWTH * largest_free(self.protos[: self.inputs], [each.shape for each in tensors[: self.inputs]])
        return all(
            tensor.datatype == proto.datatype
            and (proto.takes(tensor.shape[1:]) if index < self.inputs else proto.takes(tensor.shape[1:], 0, most))
            for index, (tensor, proto) in enumerate(zip(tensors, self.protos, strict=True))
        )


class ExpertHandlers:
    """The service of one node.

    Args:
        backends: the experts; each belongs to one of the runtimes.
        runtimes: the devices to wake.
        metrics: where calls are counted.
        peer_id: named in every info document.
        quota: what one caller may ask for; the defaults of `[limits]` when it is left out.
    """

    def __init__(
        self,
        backends: Iterable[ExpertBackend],
        runtimes: Iterable[Runtime],
        *,
        metrics: NodeMetrics,
        peer_id: str,
        replay: ReplayWindow | None = None,
        quota: CallerQuota | None = None,
    ) -> None:
        self.backends = {backend.name: backend for backend in backends}
        self._runtimes = list(runtimes)
        self._metrics = metrics
        # An empty window or quota is false.
        self._replay = ReplayWindow() if replay is None else replay
        self._quota = CallerQuota(LimitsConfig(), clock=time.monotonic) if quota is None else quota
        self._passes = {
            (uid, name): plan for uid, backend in self.backends.items() for name, plan in _plan_passes(backend).items()
        }
        self._stats = {plan.pool.uid: metrics.stats(uid, direction) for (uid, direction), plan in self._passes.items()}
        self._listing = ExpertListing(self.backends, peer_id, self._answered)
        self.on_applied: Callable[[str, Sequence[Task]], None] | None = None
        """Told of an expert and the backward calls that it has just seen, on the device thread."""
        self._draining = False
        self._last_ready = (0.0, False)

    def __repr__(self) -> str:
        state = "draining" if self._draining else "serving"
        return f"<ExpertHandlers: {len(self.backends)} experts, {state}, {self._replay}>"

    # -- rpc.base.Service

    def admit(self, header: RequestHeader, caller: Caller = LOCAL_CALLER) -> None:
        """See `Service.admit`."""
        try:
            if self._draining:
                raise DrainingError("the node is shutting down; ask another provider")
            account = self._quota.count_call(caller.key)  # first: a call that fits no schema counts too
            plan = self._plan(header)
            _check_schema(plan, header)
            _manner_of(plan, header)
            nbytes = plan.nbytes(header)
            self._quota.charge(account, nbytes, updates=header.parameters.direction == "backward")
        except CallError as error:
            self._metrics.stats(*self._labels(header)).outcomes[str(error.code)] += 1
            raise

    def submit(self, frame: Frame[RequestHeader], caller: Caller = LOCAL_CALLER) -> asyncio.Future[Flat]:
        """See `Service.submit`."""
        account = self._quota.account(caller.key)
        future = self._queue(frame, caller)
        account.begin()
        when_done(future, account.end)
        return future

    def result_codecs(self, header: RequestHeader) -> tuple[str, ...]:
        """See `Service.result_codecs`."""
        return self._plan(header).result_codecs

    def count_wire(self, direction: str, tensors: Sequence[TensorHeader]) -> None:
        """See `Service.count_wire`."""
        for tensor in tensors:
            codec = tensor.parameters.codec or "raw"
            self._metrics.wire_bytes[direction, codec] += tensor.parameters.binary_data_size or 0

    def flush(self) -> None:
        """See `Service.flush`."""
        for runtime in self._runtimes:
            runtime.wake()

    def experts(self, after: str = "", limit: int = MAX_PAGE_EXPERTS) -> dict[str, Any]:
        """See `Service.experts`."""
        return self._listing.page(after, limit)

    def expert(self, uid: str) -> dict[str, Any]:
        """See `Service.expert`."""
        return self._listing.expert(uid)

    def age_of(self, uid: str) -> dict[str, Any]:
        """See `AgingService.age_of`."""
        backend = self.backends.get(uid)
        if backend is None:
            return {}
        birth = backend.birth
        return {"incarnation": birth.incarnation, "run": birth.run, "updates": backend.update_count}

    def serves(self, uid: str) -> bool:
        """See `Service.serves`."""
        runtime = self._listing.backend(uid).forward_pool.runtime
        return not self._draining and (not isinstance(runtime, Runtime) or runtime.alive)

    async def ready(self) -> bool:
        """Whether an expert computes: one real forward in eval mode, at most once a second. It leaves no trace."""
        checked_at, was_ready = self._last_ready
        if time.monotonic() - checked_at < 1.0:
            return was_ready
        is_ready = all(runtime.alive for runtime in self._runtimes) and await self._try_forward()
        self._last_ready = (time.monotonic(), is_ready)
        return is_ready

    @property
    def draining(self) -> bool:
        """See `Service.draining`."""
        return self._draining

    # -- of the node

    def drain(self) -> None:
        """Refuse new calls from now on."""
        self._draining = True

    def observe_batch(self, batch: Batch, seconds: float, succeeded: bool) -> None:
        """Count a batch; called on the device thread."""
        if batch.tasks and batch.tasks[0].is_probe:  # it had no neighbours
            return
        stats = self._stats[batch.pool.uid]
        stats.outcomes["ok" if succeeded else "500"] += len(batch.tasks)
        if not succeeded:
            return
        stats.compute_seconds.observe(seconds)
        stats.batch_rows.observe(batch.rows)
        stats.queue_seconds.observe(batch.taken_at - min(task.arrived for task in batch.tasks))
        if stats.direction == "backward":
            if self.backends[stats.expert].is_trained:
                stats.updates += 1
            if self.on_applied is not None:
                self.on_applied(stats.expert, batch.tasks)

    # -- private

    def _answered(self, backend: ExpertBackend) -> int:
        return sum(self._stats[pool.uid].outcomes["ok"] for pool in backend.get_pools())

    def _queue(self, frame: Frame[RequestHeader], caller: Caller) -> asyncio.Future[Flat]:
        header = frame.header
        plan = self._plan(header)
        timeout_ms = header.parameters.timeout_ms
        deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1e3
        manner = _manner_of(plan, header)
        alone = manner.mode in plan.findings.mixes_rows
        if header.parameters.direction == "forward" or not header.id:
            return plan.pool.submit(
                frame.tensors, deadline=deadline, caller=caller.key, manner=manner, alone=alone
            ).future
        repeated = self._replay.repeat(header.id, header.model_name)
        if repeated is not None:
            return repeated
        task = plan.pool.submit(
            frame.tensors, deadline=deadline, caller=caller.key, manner=manner, alone=alone, call_id=header.id
        )
        return self._replay.first(header.id, header.model_name, plan.pool, task)

    def _plan(self, header: RequestHeader) -> _Pass:
        plan = self._passes.get((header.model_name, header.parameters.direction))
        if plan is None:
            self._listing.backend(header.model_name)
            raise BadRequestError(f"pass must be 'forward' or 'backward', got {header.parameters.direction[:32]!r}")
        return plan

    def _labels(self, header: RequestHeader) -> tuple[str, str]:
        """Never a name that a stranger made up: labels cost memory for ever."""
        known = (header.model_name, header.parameters.direction) in self._passes
        return (header.model_name, header.parameters.direction) if known else (UNKNOWN, UNKNOWN)

    async def _try_forward(self) -> bool:
        if not self.backends:
            return True
        backend = next(iter(self.backends.values()))
        rows = tuple(proto.make_zeros(1, "cpu", free=FREE_SIZE) for proto in nested_flatten(backend.forward_schema))
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                task = backend.forward_pool.submit(rows, manner=Manner("eval", seed=0), alone=True, is_probe=True)
                self.flush()
                await task.future
        except (TimeoutError, CallError, ExpertFailedError):
            return False
        return True


def _plan_passes(backend: ExpertBackend) -> dict[str, _Pass]:
    inputs, outputs = nested_flatten(backend.forward_schema), nested_flatten(backend.outputs_schema)
    forward, backward = backend.get_pools()
    return {
        "forward": _make_pass(forward, backend.forward_schema, inputs, outputs, len(inputs), backend.findings),
        "backward": _make_pass(
            backward, backend.backward_schema, inputs + outputs, inputs, len(inputs), backend.findings
        ),
    }


def _make_pass(
    pool: TaskPool, schema: Any, protos: tuple[Any, ...], results: tuple[Any, ...], inputs: int, findings: Findings
) -> _Pass:
    return _Pass(
        pool=pool,
        schema=schema,
        protos=protos,
        expected=tuple((proto.datatype, proto.shape) for proto in protos),
        result_codecs=tuple(proto.codec for proto in results),
        row_bytes=(
            None
            if any(proto.is_free for proto in protos)
            else sum(proto.dtype.itemsize * math.prod(proto.shape) for proto in protos)
        ),
        inputs=inputs,
        findings=findings,
    )


def _manner_of(plan: _Pass, header: RequestHeader) -> Manner:
    """How a call is to be computed; a seed only where the expert draws, so that others share batches.

    Raises BadRequestError.
    """
    parameters = header.parameters
    mode = _MODES.get(parameters.mode)
    if mode is None:
        raise BadRequestError(f"parameters.mode must be 'train' or 'eval', got {parameters.mode!r:.40}")
    seed = parameters.seed
    if seed is not None and not 0 <= seed < 1 << SEED_BITS:
        raise BadRequestError(f"parameters.seed must be an integer of {SEED_BITS} bits, 0 ≤ seed < 2^{SEED_BITS}")
    if mode not in plan.findings.draws:
        return _PLAIN[mode]
    if seed is None:
        if parameters.direction == "backward":
            raise BadRequestError(
                f"{plan.pool.uid} draws random numbers in {mode} mode (dropout and the like): send the parameters.seed "
                "of the forward call with its backward call, else the gradient is that of another function"
            )
        seed = secrets.randbits(SEED_BITS)
    return Manner(mode, seed)


def _check_schema(plan: _Pass, header: RequestHeader) -> None:
    """That the tensors are those of the schema, with the same number of rows, at least one. Raises BadRequestError."""
    tensors = header.inputs
    received = tuple((tensor.datatype, tensor.shape[1:]) for tensor in tensors)
    rows = {tensor.shape[0] if tensor.shape else 0 for tensor in tensors}
    fits = received == plan.expected or plan.takes_shapes(tensors)
    if fits and len(rows) == 1 and 0 not in rows and _names_in_order(tensors):
        return
    got = ", ".join(format_tensor(tensor.shape, tensor.datatype[:16]) for tensor in tensors[:16])
    raise BadRequestError(
        f"{plan.pool.uid} expects tensors '0' to '{len(plan.expected) - 1}' {format_schema(plan.schema)} "
        f"of one batch size ≥ 1, received ({got})"
    )


def _names_in_order(tensors: tuple[TensorHeader, ...]) -> bool:
    return all(tensor.name == str(index) for index, tensor in enumerate(tensors))
