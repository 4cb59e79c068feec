"""TLS 1.3 of both sides: how a server answers, which endpoints a caller may speak to, and the proof of the peer's key.

The check is part of the handshake itself (in the objects and sockets that the pinned context makes), so that a
connection whose peer cannot prove its key never exists for the HTTP library, and no byte of a request is sent on it. A
context belongs to one key; pools tell connections apart by their context, so that two peers behind one address never
share one.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Self

from p2pmoe.errors import InsecureEndpointError, PeerIdentityError
from p2pmoe.identity import peer_id_of
from p2pmoe.identity.certificate import check_certificate
from p2pmoe.rpc.http.scratch import SCRATCH_BYTES, scratch
from p2pmoe.types import Endpoint, is_loopback

MAX_CONTEXTS: Final = 1024
_RECORD_BYTES: Final = 16384  # what one TLS record carries at most


class CertificateRefused(ssl.SSLCertVerificationError):
    """Carries our own error through the HTTP library, which knows only those of TLS."""

    def __init__(self, error: PeerIdentityError) -> None:
        super().__init__(str(error))
        self.error = error


class _PromptObject(ssl.SSLObject):
    """One end of a connection. Says goodbye without waiting until the other end does: a stranger might never."""

    def read(self, len: int = SCRATCH_BYTES, buffer: Any = None) -> Any:  # noqa: A002 - the base class names it so
        """As the base class, but many records at once instead of one record each."""
        if buffer is not None:
            return self._fill(memoryview(buffer)[:len], 1)
        if len < SCRATCH_BYTES:
            return super().read(len)
        view = scratch()
        return bytes(view[: self._fill(view, _RECORD_BYTES)])  # what is left of a record would cost one more read

    def _fill(self, view: memoryview, least: int) -> int:
        """Read while there is room for `least` bytes; how many came, 0 at the end of the stream."""
        read: Any = super().read  # its type does not know that it fills a memoryview too
        count, room = 0, view.nbytes
        try:
            while room - count >= least and (received := read(room - count, view[count:])):
                count += received
        except ssl.SSLWantReadError:
            if not count:
                raise
        return count

    def unwrap(self) -> None:
        # RFC 8446, 6.1: each side closes its own direction. The alert is on its way when reading is what is missing.
        with contextlib.suppress(ssl.SSLWantReadError):
            super().unwrap()


class _PinnedObject(_PromptObject):
    """The end of a caller that knows the peer's key, on an event loop."""

    def do_handshake(self) -> None:
        super().do_handshake()
        _check_peer(self.context, self.getpeercert(binary_form=True))


class _PinnedSocket(ssl.SSLSocket):
    """The same, for a thread that blocks."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _check_peer(self.context, self.getpeercert(binary_form=True))


def _check_peer(context: ssl.SSLContext, certificate: bytes | None) -> None:
    assert isinstance(context, PinnedContext)
    try:
        check_certificate(certificate, context.public_key, context.clock())
    except PeerIdentityError as error:
        raise CertificateRefused(error) from error


def server_context() -> ssl.SSLContext:
    """A server's TLS 1.3, without a certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslobject_class = _PromptObject
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nothing is resumed: every connection proves the key anew, no state is kept for strangers
    context.set_alpn_protocols(["http/1.1"])
    return context


class PinnedContext(ssl.SSLContext):
    """A client's TLS 1.3 that accepts the holder of one Ed25519 key and nobody else."""

    public_key: bytes
    clock: Callable[[], float]

    def __new__(cls, public_key: bytes, clock: Callable[[], float] = time.time) -> Self:
        context: Self = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context.public_key, context.clock = public_key, clock
        context.sslobject_class, context.sslsocket_class = _PinnedObject, _PinnedSocket
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        # No authority vouches for a peer and its address is no name: `_PinnedObject` checks what counts.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["http/1.1"])
        return context

    def __init__(self, *args: Any, **options: Any) -> None:
        """Everything is done in `__new__`, as the base class does it."""

    def __repr__(self) -> str:
        return f"<pinned to {peer_id_of(self.public_key)}>"


class Pins:
    """A context for every peer that is called, kept while it is among the last ones used."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._contexts: OrderedDict[bytes, PinnedContext] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Pins: {len(self._contexts)} keys>"

    def context_for(self, endpoint: Endpoint) -> ssl.SSLContext | bool:
        """What the HTTP library takes as `ssl`.

        Raises:
            InsecureEndpointError: plain HTTP to another machine, TLS without a known key, or another scheme.
        """
        if endpoint.scheme == "https" and endpoint.public_key is not None:
            return self._pinned(endpoint.public_key)
        if endpoint.scheme == "https":
            raise InsecureEndpointError(
                f"{endpoint} is not called: its peer's key is not known; take the endpoint from a signed record, or "
                f"give Endpoint(…, public_key=…)"
            )
        if endpoint.scheme != "http":
            raise InsecureEndpointError(f"{endpoint} is not called: {endpoint.scheme!r} is not spoken; use https")
        if not is_loopback(endpoint.host):
            raise InsecureEndpointError(
                f"{endpoint} is not called: plain HTTP is spoken on this machine only; its node must set [http] tls = "
                f"true"
            )
        return True

    def _pinned(self, public_key: bytes) -> PinnedContext:
        context = self._contexts.get(public_key)
        if context is None:
            context = self._contexts[public_key] = PinnedContext(public_key, self._clock)
            if len(self._contexts) > MAX_CONTEXTS:
                self._contexts.popitem(last=False)
        else:
            self._contexts.move_to_end(public_key)
        return context
