"""What a transport and a service are to each other. Knows neither HTTP nor experts.

`Service` is what a node offers, `Doorkeeper` says who may ask for it, `Transport` is how a caller reaches one. Each
exists twice: service and doorkeeper in `server` and as fakes in tests; the transport over HTTP and in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from p2pmoe.protocol.frames import EncodedFrame, Frame
from p2pmoe.protocol.messages import RequestHeader, ResponseHeader, TensorHeader
from p2pmoe.protocol.sessions import SessionNonce, SessionRequest, SessionToken
from p2pmoe.rpc.deadline import Deadline
from p2pmoe.types import Caller, Endpoint

Flat = tuple[torch.Tensor, ...]
"""What a call takes or gives: tensors in schema order."""
Reply = Frame[ResponseHeader]
"""A result or an error."""


class Service(Protocol):
    """What a node answers calls with. Bookkeeping is synchronous; results come through futures of the loop."""

    def admit(self, header: RequestHeader, caller: Caller) -> None:
        """Refuse a call by its header alone, before memory is allocated for it. Raises CallError."""

    def submit(self, frame: Frame[RequestHeader], caller: Caller) -> asyncio.Future[Flat]:
        """Queue an admitted call. Cancelling the future drops the call if no device has taken it.

        Raises CallError at once when the call cannot be queued; the future fails with CallError otherwise.
        """

    def result_codecs(self, header: RequestHeader) -> tuple[str, ...]:
        """The codecs that the tensors of this call's result travel in."""

    def count_wire(self, direction: str, tensors: Sequence[TensorHeader]) -> None:
        """Tensors went over the wire, "in" or "out"; for metrics."""

    def flush(self) -> None:
        """Everything received so far is queued: wake the devices."""

    def experts(self, after: str, limit: int) -> dict[str, Any]:
        """A page of the experts behind a uid as plain JSON values, see `rpc.expert_pages`."""

    def expert(self, uid: str) -> dict[str, Any]:
        """Info of one expert. Raises UnknownExpertError."""

    def serves(self, uid: str) -> bool:
        """Whether calls to an expert are taken and its device computes. Raises UnknownExpertError."""

    async def ready(self) -> bool:
        """Whether a real forward pass of some expert went through just now."""

    @property
    def draining(self) -> bool:
        """Whether the node is about to leave and takes no new calls."""


class AgingService(Service, Protocol):
    """A service whose experts learn: replies say how old the expert is. Others need not have it."""

    def age_of(self, uid: str) -> dict[str, Any]:
        """`parameters` of a reply of an expert: `incarnation`, `run`, `updates`; empty for one that is unknown."""


class Doorkeeper(Protocol):
    """Who may call a node. `address` is always that of the connection, never what a header says of it."""

    def identify(self, authorization: str | None, address: str) -> Caller:
        """Who sends a request with this `Authorization` header. Costs a look-up for a token that was seen before.

        Raises:
            AuthenticationError: a session is needed, or the token is not one of this node's, or it has ended.
        """

    def make_nonce(self, address: str) -> SessionNonce:
        """The first step of the handshake."""

    def open_session(self, request: SessionRequest, address: str) -> SessionToken:
        """The second step.

        Raises:
            AuthenticationError: nonce or signature are wrong.
            AccessDeniedError: this peer may not call.
            OverloadedError: too many handshakes.
        """

    def is_admin(self, authorization: str | None) -> bool:
        """Whether this `Authorization` header is an admin's."""


class Transport(Protocol):
    """How a caller reaches services. One instance belongs to one event loop."""

    def exchange(
        self, endpoint: Endpoint, frames: Sequence[EncodedFrame], inspect: Callable[[ResponseHeader], bool]
    ) -> AsyncGenerator[Reply, None]:
        """Send call frames in one exchange; yields result and error frames in completion order.

        `inspect` sees each header before memory is allocated for its tensors; False skips that frame. If it is an
        `Inspector`, it is told of frames that are wrong in themselves or over our limits; else these end the exchange.

        Raises:
            PeerUnreachableError: nobody answers, or the connection broke.
            CallError: the node refused the exchange as a whole.
            DecodeError: the answer is no sequence of frames.
        """

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        """A JSON document of the node. Raises PeerUnreachableError, CallError, DecodeError."""

    async def close(self) -> None:
        """Close every connection."""


@runtime_checkable
class ProvingTransport(Protocol):
    """A transport that knows what it can vouch for. One without this is taken to prove every sender."""

    def proves(self, endpoint: Endpoint) -> bool:
        """Whether what comes from there can be nobody's but the endpoint's peer's: not a proxy's, not a bystander's."""


@runtime_checkable
class BlockingTransport(Protocol):
    """A transport that can also be used by a thread that has no event loop."""

    def try_exchange(
        self,
        endpoint: Endpoint,
        frames: Sequence[EncodedFrame],
        inspect: Callable[[ResponseHeader], bool],
        deadline: Deadline,
    ) -> Generator[Reply, None, None] | None:
        """`Transport.exchange` by the calling thread, which blocks meanwhile. Any thread; close the generator.

        None when this cannot be had now (the peer is new, or wants a new session): use `exchange`.

        Raises (also while the frames are read) as `exchange` does, and TimeoutError when the deadline has passed.
        """


def proving(transport: object) -> Callable[[Endpoint], bool]:
    """What a transport says of endpoints; see `ProvingTransport`."""
    return transport.proves if isinstance(transport, ProvingTransport) else lambda endpoint: True  # noqa: ARG005
