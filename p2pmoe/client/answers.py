"""What comes back for the calls of one exchange, and what of it is a lie. Knows neither sockets nor loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from p2pmoe.client.calls import Call
from p2pmoe.errors import DecodeError, P2PMoEError, PeerUnreachableError
from p2pmoe.faults import attempt, unexpected
from p2pmoe.protocol.frames import Frame
from p2pmoe.protocol.messages import ResponseHeader
from p2pmoe.rpc.base import Flat
from p2pmoe.types import Endpoint, PeerId

_MAX_STRAYS: Final = 16  # frames of one exchange that answer no call; errors for the exchange as a whole are among them


class Answers:
    """The calls of one exchange that have no answer yet. Belongs to the thread that reads the exchange.

    Args:
        endpoint, calls: who was asked, and what.
        finish: told each call's result, once.
        on_lie: told at most once, when the peer's replies break the wire format or the schema, or answer what nobody
            asked.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        calls: Sequence[Call],
        finish: Callable[[Call, Flat | P2PMoEError], None],
        on_lie: Callable[[PeerId, DecodeError], None],
    ) -> None:
        self.missing: dict[str, Call] = {call.id: call for call in calls}
        """By id."""
        self._peer_id = calls[0].peer_id
        self._finish = finish
        self._on_lie = on_lie
        self._strays = 0
        self._lied = False
        self._reason: P2PMoEError = PeerUnreachableError(f"{endpoint} ended the exchange without answering every call")

    def __repr__(self) -> str:
        return f"<Answers: {len(self.missing)} missing>"

    def inspect(self, header: ResponseHeader) -> bool:
        """Whether the tensors of a frame are wanted. Raises DecodeError for a node that does not stop to lie."""
        call = self.missing.get(header.id)
        if call is None:
            return self._inspect_stray(header)
        try:
            call.check(header)
        except DecodeError as error:
            self._note_lie(error)
            self._settle(call, error)
            return False
        except Exception as error:  # noqa: BLE001 - this call's failure, not its neighbours'
            self._settle(call, unexpected(f"looking at an answer of {call.uid}", error))
            return False
        return True

    def receive(self, frame: Frame[ResponseHeader]) -> None:
        """Give a call its result. An error without a call's id stands for all that have none in the end."""
        call = self.missing.get(frame.header.id)
        try:
            frame.header.raise_for_error()
        except P2PMoEError as error:
            if call is not None:
                self._settle(call, error)
            elif not frame.header.id:
                self._reason = error
        else:
            if call is not None:
                self._settle(call, frame.tensors)

    def fail(self, error: P2PMoEError) -> None:
        """The exchange ended with this."""
        self._reason = error
        if isinstance(error, DecodeError):
            self._note_lie(error)

    def close(self) -> None:
        """No more answers will come: the rest get the reason."""
        for call in list(self.missing.values()):
            self._settle(call, self._reason)

    # -- private

    def _inspect_stray(self, header: ResponseHeader) -> bool:
        """A frame that answers no call: an error for the exchange as a whole, or nothing that was asked for."""
        stands_for_all = not header.id and header.code != 200 and not header.outputs
        if not stands_for_all:
            self._note_lie(DecodeError(f"a reply {header.id[:64]!r} that nobody asked for, or a second one"))
        self._strays += 1
        if self._strays > _MAX_STRAYS:  # else a node could keep its reader busy with empty frames for ever
            raise DecodeError(f"more than {_MAX_STRAYS} frames of an exchange answer no call of it")
        return stands_for_all

    def _note_lie(self, error: DecodeError) -> None:
        if self._peer_id is not None and not self._lied:
            self._lied = True
            attempt("noting a lie", self._on_lie, self._peer_id, error)

    def _settle(self, call: Call, result: Flat | P2PMoEError) -> None:
        if self.missing.pop(call.id, None) is None:
            return
        group = call.group
        try:
            self._finish(call, result)
        except BaseException as error:
            call.result = fault = unexpected(f"handing over an answer of {call.uid}", error)
            if group is not None:
                group.fail(fault)
            if not isinstance(error, Exception):  # Ctrl-C, in a caller's own thread
                raise
