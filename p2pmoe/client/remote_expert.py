"""One expert somewhere in the swarm as a module: arguments go out, gradients come back, the expert is trained.

Knows schemas and autograd; leaves sockets, batching and threads to the swarm.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn

from p2pmoe.client.arguments import check_arguments, give_back
from p2pmoe.client.calls import CallGroup, empty_results, make_call
from p2pmoe.client.directory import ExpertInfo
from p2pmoe.client.graph import always_differentiable, input_gradients, keep_for_backward
from p2pmoe.client.manner import manner_of
from p2pmoe.client.offers import read_offers
from p2pmoe.client.patience import Patience, as_timeout, may_pass, patiently
from p2pmoe.client.replies import check_finite, check_finite_async
from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import (
    AccessDeniedError,
    AuthenticationError,
    DeadlineError,
    DecodeError,
    DrainingError,
    ExpertNotFoundError,
    OverloadedError,
    P2PMoEError,
    PeerUnreachableError,
    SchemaError,
    TorchModeError,
    UnknownExpertError,
)
from p2pmoe.experts.directory import Provider
from p2pmoe.experts.offers import Offer
from p2pmoe.experts.uid import parse_uid
from p2pmoe.protocol.messages import new_call_id
from p2pmoe.protocol.modes import keeps_graph, mode_of_now, out_of_compiled_graphs, refuse_tracing
from p2pmoe.protocol.schema import BatchTensorProto, format_schema
from p2pmoe.rpc.base import Flat
from p2pmoe.types import Manner, Pass

_TRY_ANOTHER = (
    PeerUnreachableError,
    DrainingError,
    UnknownExpertError,
    OverloadedError,
    AuthenticationError,
    AccessDeniedError,
    DecodeError,
)
_PAUSE_S = 0.2  # before the round of providers is tried again


@dataclass(frozen=True, slots=True)
class _Failed:
    """A provider that was asked already, and how it failed."""

    provider: Provider
    error: P2PMoEError


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked of whichever provider answers; under one id, so that a backward call is applied once."""

    uid: str
    direction: Pass
    tensors: Flat
    protos: tuple[BatchTensorProto, ...]
    expected: tuple[BatchTensorProto, ...]
    manner: Manner
    id: str = field(default_factory=new_call_id)

    def to(self, provider: Provider, timeout_s: float) -> CallGroup:
        """The call to one provider."""
        call = make_call(
            provider.endpoint,
            self.uid,
            self.direction,
            self.tensors,
            self.protos,
            self.expected,
            timeout_s=timeout_s,
            call_id=self.id,
            peer_id=provider.peer_id,
            manner=self.manner,
        )
        return CallGroup([call])


class RemoteExpert(nn.Module):
    """A module whose work is done by the providers of one uid.

    Args:
        swarm: the swarm to call through.
        uid: e.g. "ffn.3.17".
        forward_timeout_s, backward_timeout_s: how long one pass may take, other providers included. So long a provider
            is waited for when all are silent: a node that was killed may be back, at another address.
        skip_non_finite: a backward pass whose gradients hold NaN or infinity sends nothing and gives NaN for every
            input, as a `torch.amp.GradScaler` needs; without it such a pass raises.
        schema_digest: the schema that is meant; without it, where several are announced, the one that has most weight
            below the same name.

    Floating arguments are cast to the schema's dtype. If the first of them was, the outputs come back in its dtype.

    Making it raises ConfigError for a time-out that is none. Calling it raises:
        SchemaError: the arguments do not fit the expert's schema; nothing was sent.
        TorchModeError: torch.jit.trace, torch.func, forward-mode differentiation or a second derivative.
        ExpertNotFoundError, PeerUnreachableError, DeadlineError: nobody answered.
        CallError: the node refused or failed; see `p2pmoe.errors`.
        DecodeError: every node that was asked answered something else than the schema says, or NaN where that does
            not come from the arguments (`NonFiniteReplyError`).
    """

    def __init__(
        self,
        swarm: Swarm,
        uid: str,
        *,
        forward_timeout_s: float = 60.0,
        backward_timeout_s: float = 60.0,
        skip_non_finite: bool = False,
        schema_digest: str | None = None,
    ) -> None:
        super().__init__()
        self.swarm, self.uid = swarm, uid
        self._prefix, self._suffix = parse_uid(uid).prefix, parse_uid(uid).suffix
        self.forward_timeout_s = as_timeout("forward_timeout_s", forward_timeout_s)
        self.backward_timeout_s = as_timeout("backward_timeout_s", backward_timeout_s)
        self.skip_non_finite = skip_non_finite
        self._schema_digest = schema_digest
        self._info: ExpertInfo | None = None

    def __repr__(self) -> str:
        if self._info is None:
            return f"<RemoteExpert {self.uid}>"
        return f"<RemoteExpert {self.uid}: {format_schema(self._info.inputs)} -> {format_schema(self._info.outputs)}>"

    @property
    def info(self) -> ExpertInfo:
        """The expert's schemas, asked from a provider on first use."""
        if self._info is None:
            self._info = self._wait_for_info(self.swarm.timeout_s)
        return self._info

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the expert; [B, …] tensors in the structure of its schema, outputs in the structure of its outputs."""
        return out_of_compiled_graphs(self._forward)(args, kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """The same from a coroutine of any loop; the loop stays free while the expert computes."""
        refuse_tracing(self.uid)
        as_begun = mode_of_now()
        if self._info is None:
            timeout_s = self.forward_timeout_s
            self._info = await self.swarm.run_async(self._fetch_info(timeout_s), timeout_s + 1)
        info = self._info
        with as_begun():
            tensors, dtype = check_arguments(self.uid, info, args, kwargs)
            request = self._forward_request(info, tensors)
        versions = _versions(tensors)
        outputs = await self._call_async(request, self.forward_timeout_s)
        if versions != _versions(tensors):
            raise TorchModeError(
                f"{self.uid}: an argument was modified by an inplace operation while the call was under way; nobody "
                f"knows which values were sent. Change a copy"
            )
        with as_begun():
            return info.pack_outputs(give_back(self._attach(outputs, request), dtype))

    def call_backward(
        self, inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], manner: Manner | None = None
    ) -> Flat:
        """One backward pass: trains the expert, gives the gradients of every input. Flat, in wire order.

        `manner` is that of the forward pass; a new one of this module's mode when it is left out.
        """
        info = self.info
        protos = info.inputs + info.outputs
        request = _Request(
            self.uid, "backward", (*inputs, *gradients), protos, info.inputs, manner or manner_of(self, info.draws)
        )
        return self._call(request, self.backward_timeout_s)

    # -- private

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_tracing(self.uid)
        timeout_s = self.forward_timeout_s
        if self._info is None:
            started = time.monotonic()
            self._info = self._wait_for_info(timeout_s)
            timeout_s = max(1e-3, timeout_s - (time.monotonic() - started))
        info = self._info
        tensors, dtype = check_arguments(self.uid, info, args, kwargs)
        request = self._forward_request(info, tensors)
        outputs = self._call(request, timeout_s)
        return info.pack_outputs(give_back(self._attach(outputs, request), dtype))

    def _wait_for_info(self, timeout_s: float) -> ExpertInfo:
        return self.swarm.run(self._fetch_info(timeout_s), timeout_s + 1)

    async def _fetch_info(self, timeout_s: float) -> ExpertInfo:
        """From a provider; see `patience` for how long one is waited for. On the swarm's loop."""
        deadline = time.monotonic() + timeout_s
        return await patiently(self._ask_info, deadline, fixed=self.swarm.directory.is_fixed)

    async def _ask_info(self, again: bool) -> ExpertInfo:
        providers = await self.swarm.find_providers(self.uid, again=again)
        there = {each.schema_digest for each in providers}
        if self._schema_digest is not None:
            if self._schema_digest not in there:
                others = ", ".join(sorted(there))
                raise SchemaError(f"{self.uid} is not served with the schema {self._schema_digest}, but with {others}")
            there = {self._schema_digest}
        uid = parse_uid(self.uid)
        offers = [Offer(uid, provider) for provider in providers]
        if len(there) > 1:
            # Anybody may announce the uid with another schema; all that is served below the name says which is meant.
            neighbours = await read_offers(self.swarm.directory, uid.name, self.swarm.timeout_s / 4)
            offers += [each for each in neighbours if each.uid != uid]
        return await self.swarm.schemas.choose(self.uid, offers, lambda _: None, among=there)

    def _attach(self, outputs: Flat, request: _Request) -> Flat:
        tensors = request.tensors
        device = tensors[0].device
        if device.type != "cpu":
            outputs = tuple(output.to(device) for output in outputs)
        if not keeps_graph():
            return outputs
        attached: Flat = _RemoteCall.apply(  # type: ignore[no-untyped-call]
            always_differentiable(), self, request.manner, outputs, *tensors
        )
        return attached

    def _forward_request(self, info: ExpertInfo, tensors: Flat) -> _Request:
        return _Request(self.uid, "forward", tensors, info.inputs, info.outputs, manner_of(self, info.draws))

    def _call(self, request: _Request, timeout_s: float) -> Flat:
        if not len(request.tensors[0]):
            return empty_results(request.direction, request.tensors, request.protos, request.expected)
        provider = self._cached_provider()
        if provider is None:
            return self.swarm.run(self._call_providers(request, timeout_s), timeout_s + 1)
        started = time.monotonic()
        group = request.to(provider, timeout_s)
        self.swarm.call(group, timeout_s)
        result = group.results(timeout_s)[0]
        if self._needs_look(result, group):
            result = check_finite(self._at(provider), result, request.tensors, request.expected) or result
        if not isinstance(result, P2PMoEError):
            self._offer(request, provider, result)
            return result
        left_s = timeout_s - (time.monotonic() - started)
        if not isinstance(result, _TRY_ANOTHER) or left_s <= 0:
            self.swarm.note_failure(provider, result, self.uid)
            raise result
        if not isinstance(result, PeerUnreachableError):  # else it is asked once more
            self.swarm.note_failure(provider, result, self.uid)
        return self.swarm.run(self._call_providers(request, left_s, _Failed(provider, result)), left_s + 1)

    async def _call_async(self, request: _Request, timeout_s: float) -> Flat:
        if not len(request.tensors[0]):
            return empty_results(request.direction, request.tensors, request.protos, request.expected)
        return await self.swarm.run_async(self._call_providers(request, timeout_s), timeout_s + 1)

    async def _call_providers(self, request: _Request, timeout_s: float, failed: _Failed | None = None) -> Flat:
        """Ask one provider after the other until one answers or the time is up. On the swarm's loop.

        A provider whose connection broke is asked twice, `failed` counting as the first time; one that has applied
        this backward already repeats its answer. When all have failed for reasons that may pass the records are read
        again, until the time is up; see `patience`.
        """
        patience, again = Patience(time.monotonic() + timeout_s), False
        last = failed.error if failed else None
        asked_again = set[Provider]()
        lied = {failed.provider} if failed and isinstance(last, DecodeError) else set[Provider]()
        to_ask = deque([failed.provider] if failed and isinstance(last, PeerUnreachableError) else [])
        asked_again.update(to_ask)
        while True:
            found, reason = await self._look_up(patience.left_s(), again=again)
            last = last or reason
            to_ask.extend(each for each in found if each not in to_ask and each not in lied)
            while to_ask and (left_s := patience.left_s()) > 0:
                provider = to_ask.popleft()
                result = await self._ask(request, provider, left_s)
                if not isinstance(result, P2PMoEError):
                    self._offer(request, provider, result)
                    return result
                last = result
                if isinstance(result, DecodeError):
                    lied.add(provider)
                if isinstance(result, PeerUnreachableError) and provider not in asked_again:
                    asked_again.add(provider)
                    to_ask.appendleft(provider)
                    continue
                self.swarm.note_failure(provider, result, self.uid)
                if not isinstance(result, _TRY_ANOTHER):
                    raise result
            pause_s = self._pause_s(patience, last, reason, again=again)
            if pause_s is None:
                raise last or DeadlineError(f"{self.uid} did not answer within {timeout_s:.3g} s")
            await asyncio.sleep(pause_s)
            again = True

    def _pause_s(
        self, patience: Patience, last: P2PMoEError | None, reason: P2PMoEError | None, *, again: bool
    ) -> float | None:
        """How long to wait before the next round, `reason` being why this one found nobody; None: give up."""
        if isinstance(last, OverloadedError):
            return patience.next_pause_s(max(_PAUSE_S, last.retry_after_s or 0.0))
        # What is cached may be older than what all providers announce now, or than our own evidence.
        unread = not again and isinstance(reason, ExpertNotFoundError)
        if self.swarm.directory.is_fixed or not (unread or may_pass(last)):
            return None
        return patience.next_pause_s()

    async def _look_up(self, timeout_s: float, *, again: bool) -> tuple[tuple[Provider, ...], P2PMoEError | None]:
        """Who hosts the schema that calls are made by, or why nobody is known."""
        try:
            async with asyncio.timeout(max(1e-3, timeout_s)):
                found = await self.swarm.find_providers(self.uid, again=again)
        except TimeoutError as error:
            return (), error if isinstance(error, P2PMoEError) else None
        except (ExpertNotFoundError, PeerUnreachableError) as error:
            if isinstance(error, ExpertNotFoundError) and not self._is_announced():
                error.may_appear = True  # it was there, for its schema is known
            return (), error
        fitting = self._fitting(found)
        if fitting:
            return fitting, None
        return (), ExpertNotFoundError(
            f"{self.uid} is hosted with another schema than before by all {len(found)} providers; make this module "
            f"anew with swarm.expert({self.uid!r})"
        )

    def _is_announced(self) -> bool:
        return self._suffix in self.swarm.directory.announced(self._prefix)

    async def _ask(self, request: _Request, provider: Provider, timeout_s: float) -> Flat | P2PMoEError:
        """One provider's answer, looked at."""
        group = request.to(provider, timeout_s)
        await self.swarm.call_async(group, timeout_s)
        result = group.results(timeout_s)[0]
        if not self._needs_look(result, group):
            return result
        return await check_finite_async(self._at(provider), result, request.tensors, request.expected) or result

    def _needs_look(self, result: Flat | P2PMoEError, group: CallGroup) -> TypeGuard[Flat]:
        """Whether nobody has looked yet if the answer is finite."""
        return self.swarm.check_finite and not isinstance(result, P2PMoEError) and not group.calls[0].is_finite

    def _fitting(self, providers: tuple[Provider, ...]) -> tuple[Provider, ...]:
        """Those that host the schema which calls are made by."""
        assert self._info is not None
        digest = self._info.schema_digest
        return tuple(each for each in providers if each.schema_digest == digest)

    def _cached_provider(self) -> Provider | None:
        children = self.swarm.directory.cached_prefix(self._prefix)
        providers = self._fitting(self.swarm.trust.order(children.get(self._suffix, ()), self.uid)) if children else ()
        return providers[0] if providers else None

    def _at(self, provider: Provider) -> str:
        return f"{self.uid} at {provider.endpoint}"

    def _offer(self, request: _Request, provider: Provider, outputs: Flat) -> None:
        """A call went through; the swarm may have it repeated by somebody else."""
        verifier = self.swarm.verifier
        if verifier is not None and request.direction == "forward" and self._info is not None:
            verifier.offer(provider, self.uid, self._info, request.tensors, outputs, request.manner)


class _RemoteCall(torch.autograd.Function):
    """Puts outputs that were computed elsewhere into the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, expert: RemoteExpert, manner: Manner, outputs: Flat, *inputs: torch.Tensor
    ) -> Flat:
        ctx.expert, ctx.manner = expert, manner
        return keep_for_backward(ctx, inputs, outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        expert: RemoteExpert = ctx.expert
        wanted = input_gradients(
            ctx,
            gradients,
            lambda inputs, filled: expert.call_backward(inputs, filled, ctx.manner),
            protos=expert.info.outputs,
            skip_non_finite=expert.skip_non_finite,
        )
        return None, None, None, None, *wanted


def _versions(tensors: Flat) -> list[int]:
    """How often each was written to; torch counts that to notice that a value it needs is gone."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]  # noqa: SLF001
