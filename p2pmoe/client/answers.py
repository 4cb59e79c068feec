"""What comes back for the calls of one exchange, and what of it is a lie. Knows neither sockets nor loops.

Rules:
1. A reply that is wrong is the failure of its own call. What its expert may be at fault for, or a limit of our own, or
   the way that the bytes took, is no more than that: whoever made the call holds it against that expert of that peer.
2. What only the peer itself can have said, and no honest one says, is told to `on_lie` as proof: an answer in another
   expert's name, to nobody, or for the second time, an error with tensors, a header that is none. Over a way that does
   not prove the sender it is no proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from p2pmoe.client.ages import Ages
from p2pmoe.client.calls import Call
from p2pmoe.errors import DecodeError, P2PMoEError, PeerUnreachableError
from p2pmoe.faults import attempt, unexpected
from p2pmoe.protocol.frames import FrameRefused
from p2pmoe.protocol.messages import ResponseHeader
from p2pmoe.rpc.base import Flat, Reply
from p2pmoe.types import Endpoint, PeerId

_MAX_STRAYS: Final = 16  # frames of one exchange that answer no call; errors for the exchange as a whole are among them


class StrayReplyError(DecodeError):
    """A reply that answers no call of its exchange."""


class Answers:
    """The calls of one exchange that have no answer yet. Belongs to the thread that reads the exchange.

    Args:
        endpoint, calls: who was asked, and what.
        finish: told each call's result, once.
        on_lie: told at most once of proof, and at most once of anything else, when the peer's replies break the wire
            format or the schema, or answer what nobody asked.
        is_proven: whether the bytes can be nobody's but the peer's.
        ages: told what replies say of the age of their experts.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        calls: Sequence[Call],
        finish: Callable[[Call, Flat | P2PMoEError], None],
        on_lie: Callable[[PeerId, DecodeError], None],
        *,
        is_proven: bool = True,
        ages: Ages | None = None,
    ) -> None:
        self.missing: dict[str, Call] = {call.id: call for call in calls}
        """By id."""
        self._peer_id = calls[0].peer_id
        self._finish = finish
        self._on_lie = on_lie
        self._is_proven = is_proven
        self._ages = ages
        self._strays = 0
        self._told = set[bool]()
        self._stray: StrayReplyError | None = None
        self._is_blamed = False  # some call has failed by what came
        self._reason: P2PMoEError = PeerUnreachableError(f"{endpoint} ended the exchange without answering every call")

    def __repr__(self) -> str:
        return f"<Answers: {len(self.missing)} missing>"

    def __call__(self, header: ResponseHeader) -> bool:
        return self.inspect(header)

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

    def refuse(self, frame: FrameRefused) -> None:
        """A reply that is over a limit of ours, or wrong in itself: its call's failure. Raises as `inspect`."""
        call = self.missing.get(frame.call_id)
        if call is not None:
            self._note_lie(frame.error)
            self._settle(call, frame.error)
            return
        self._note_stray(frame.call_id)
        self._count_stray()

    def receive(self, frame: Reply) -> None:
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
                if self._ages is not None and frame.header.parameters:
                    self._ages.note(call.uid, frame.header.parameters)
                self._settle(call, frame.tensors)

    def fail(self, error: P2PMoEError) -> None:
        """The exchange ended with this."""
        self._reason = error
        if isinstance(error, StrayReplyError) and not self._is_proven:
            self._note_unproven(error)
        elif isinstance(error, DecodeError):
            self._note_lie(error)

    def close(self) -> None:
        """No more answers will come: the rest get the reason."""
        for call in list(self.missing.values()):
            self._settle(call, self._reason)
        if self._stray is not None and not self._is_blamed and self._peer_id is not None:
            attempt("noting a stray reply", self._on_lie, self._peer_id, self._stray)

    # -- private

    def _inspect_stray(self, header: ResponseHeader) -> bool:
        """A frame that answers no call: an error for the exchange as a whole, or nothing that was asked for."""
        stands_for_all = not header.id and header.code != 200 and not header.outputs
        if not stands_for_all:
            self._note_stray(header.id)
        self._count_stray()
        return stands_for_all

    def _note_stray(self, call_id: str) -> None:
        stray = StrayReplyError(f"a reply {call_id[:64]!r} that nobody asked for, or a second one", is_proof=True)
        if self._is_proven:
            self._note_lie(stray)
        else:
            self._note_unproven(stray)

    def _count_stray(self) -> None:
        self._strays += 1
        if self._strays > _MAX_STRAYS:  # else a node could keep its reader busy with empty frames for ever
            raise StrayReplyError(f"more than {_MAX_STRAYS} frames of an exchange answer no call of it", is_proof=True)

    def _note_unproven(self, stray: StrayReplyError) -> None:
        stray.is_proof = False
        self._stray = stray

    def _note_lie(self, error: DecodeError) -> None:
        error.is_proof = error.is_proof and self._is_proven
        if self._peer_id is not None and error.is_proof not in self._told:
            self._told.add(error.is_proof)
            attempt("noting a lie", self._on_lie, self._peer_id, error)

    def _settle(self, call: Call, result: Flat | P2PMoEError) -> None:
        if self.missing.pop(call.id, None) is None:
            return
        self._is_blamed = self._is_blamed or isinstance(result, DecodeError)
        group = call.group
        try:
            self._finish(call, result)
        except BaseException as error:
            call.result = fault = unexpected(f"handing over an answer of {call.uid}", error)
            if group is not None:
                group.fail(fault)
            if not isinstance(error, Exception):  # Ctrl-C, in a caller's own thread
                raise
