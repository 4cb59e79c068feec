"""Every error that p2pmoe raises on purpose. One tree; a message says the cause and what to do about it.

    P2PMoEError
    ├── LocalError                  our own side: the caller, the file, the machine
    │   ├── ConfigError             node.toml, an environment variable or a flag is wrong
    │   ├── UsageError              an argument of the command line is none
    │   ├── IdentityError           the key file cannot be read, parsed or trusted
    │   │   └── DelegationError     our delegation for a closed swarm is missing, over, or covers less
    │   ├── AddressInUseError       a port to listen on is taken or not allowed
    │   ├── InvalidUidError         an expert uid or pattern breaks the grammar
    │   ├── SchemaError             arguments do not fit an expert's schema
    │   ├── EncodeError             our own value cannot be written in the wire format
    │   ├── NonFiniteResultError    a pass or a step gave NaN or infinity, and was undone
    │   ├── UnexpectedError         a callback or a task of this process raised what nobody foresaw
    │   ├── TorchModeError          torch is to record, transform or differentiate what it cannot see: a remote call
    │   ├── NotPicklableError       an object with threads and connections was to be pickled
    │   ├── StateError              a kept expert is torn, tampered with, or another one than is to be hosted
    │   ├── MemoryRefusedError      the system gives this process no memory for a tensor
    │   └── ClosedError             used after close()
    │       └── ForkedError         used in a process that was forked from the one that opened it
    └── RemoteError                 a peer's side: what it sent, what it answered, that it is silent
        ├── DecodeError             bytes that are no value of the wire format
        │   └── NonFiniteReplyError NaN or infinity where a call asked for numbers
        ├── PeerUnreachableError    nobody answers at that endpoint
        │   ├── NameLookupError     a host name has no address, or nobody said so in time
        │   ├── BootstrapError      none of the initial peers answered
        │   ├── PeerIdentityError   whoever answers there cannot prove the expected key
        │   └── InsecureEndpointError   the record offers only what may not be spoken
        ├── DeadlineError           no answer in time
        ├── ExpertNotFoundError     no live provider of that uid is known
        ├── ExpertRebornError       an expert has lost what it had learnt, or some of it; only where that was asked for
        ├── ExpertsUnavailableError rows of a batch that too few experts answered
        ├── RecordError             a DHT record that must not be believed
        │   ├── BadSignatureError
        │   ├── NotDelegatedError   the owner of the closed swarm did not allow it
        │   ├── ExpiredRecordError
        │   └── StaleRecordError
        └── CallError               a node answered a call with an error
            ├── BadRequestError         400  the call does not fit the expert's schema, or is malformed
            │   ├── NonFiniteError           its tensors hold NaN or infinity
            │   └── OutlierGradientError     its gradients are far over the expert's usual ones
            ├── AuthenticationError     401  the node serves known callers only, or the session has ended
            ├── AccessDeniedError       403  the node does not serve this caller
            ├── UnknownExpertError      404
            ├── ReplayConflictError     409  a backward id was used before, its answer is gone or differs
            ├── TooLargeError           413
            ├── WireVersionError        426
            ├── OverloadedError         429
            ├── ExpertFailedError       500  the expert raised; only its own batch is hurt
            ├── DrainingError           503
            │   └── OutOfMemoryError         the system gives the node no memory for the call
            └── ExpiredCallError        504  the call's deadline passed before the device took it

`CallError` has one class per status code of the wire format; `call_error(code, message)` picks it. Those under
BadRequestError and DrainingError exist on the node alone: a caller sees their code and message.
"""

from __future__ import annotations

import errno
import re
from typing import ClassVar, Final

_NO_MEMORY: Final = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|cannot allocate memory", re.IGNORECASE
)
_NO_MEMORY_PAUSE_S: Final = 1.0
MAX_MESSAGE_CHARS: Final = 1000
"""Of an error that a peer answered."""
_MAX_NAME_CHARS: Final = 100
_MAX_NESTED: Final = 3


class P2PMoEError(Exception):
    """Root of the tree. `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1


class LocalError(P2PMoEError):
    """Our own side is at fault: the caller, a file, this machine."""


class ConfigError(LocalError, ValueError):
    """A setting is wrong: the message names the file, the key path and what was expected."""

    exit_code = 3


class UsageError(LocalError, ValueError):
    """An argument of the command line cannot be what it stands for."""

    exit_code = 2


class IdentityError(LocalError):
    """The key file cannot be read, parsed or trusted."""

    exit_code = 4


class DelegationError(IdentityError):
    """Our delegation for a closed swarm is missing, over, somebody else's, or covers less than what we declare."""


class AddressInUseError(LocalError, OSError):
    """A port to listen on is taken or not allowed."""

    exit_code = 5


class InvalidUidError(LocalError, ValueError):
    """An expert uid or a pattern of uids breaks the grammar."""

    exit_code = 2


class SchemaError(LocalError, ValueError):
    """Arguments do not fit the schema of the expert they are meant for, or a grid is not the swarm's."""

    exit_code = 3


class EncodeError(LocalError, ValueError):
    """A value of ours cannot be written in the wire format."""


class NonFiniteResultError(LocalError, ArithmeticError):
    """A pass of an expert or a step of its optimizer gave NaN or infinity; nothing was changed by it."""


class UnexpectedError(LocalError, RuntimeError):
    """Code of this process raised what nobody foresaw, where no caller sees it; `__cause__` is that exception."""


class TorchModeError(LocalError, RuntimeError):
    """torch is to record, transform or differentiate twice what happens on another machine; it would be wrong."""


class NotPicklableError(LocalError, TypeError):
    """An object that holds threads and connections was to be pickled."""


class StateError(LocalError):
    """What is kept of an expert cannot be read, cannot be written, or belongs to another expert than is hosted."""

    exit_code = 8


class MemoryRefusedError(LocalError, MemoryError):
    """The system gives this process no memory for a tensor that is allowed to come."""


class ClosedError(LocalError, RuntimeError):
    """The object was used after it was closed, or before it was started."""


class ForkedError(ClosedError):
    """The object was opened by the process that this one was forked from: threads and connections stayed there."""


class RemoteError(P2PMoEError):
    """A peer is at fault: what it sent, what it answered, or that it is silent."""

    exit_code = 6


class DecodeError(RemoteError, ValueError):
    """Foreign bytes are no value of the wire format. `code` is the HTTP status that refuses them.

    `is_proof`: no honest peer sends such a reply, whatever happens to its experts or on the way, so that it is held
    against whoever is proven to have sent it.
    """

    def __init__(self, message: str, *, code: int = 400, is_proof: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_proof = is_proof


class NonFiniteReplyError(DecodeError):
    """A reply has NaN or infinite values. `is_evidence`: nothing that was sent explains them."""

    is_evidence: bool = False


class PeerUnreachableError(RemoteError, ConnectionError):
    """Nobody answers at an endpoint, or the connection broke before the answer was complete."""


class NameLookupError(PeerUnreachableError):
    """A host name has no address, or the name server did not say in time."""


class BootstrapError(PeerUnreachableError):
    """None of the initial peers answered."""


class PeerIdentityError(PeerUnreachableError):
    """Whoever answers at an endpoint cannot prove the key of the peer that was meant: nothing was sent to it."""


class InsecureEndpointError(PeerUnreachableError):
    """A record offers plain HTTP outside this machine, or TLS without a key to pin: nothing is sent there."""


class DeadlineError(RemoteError, TimeoutError):
    """No answer came before the deadline."""


class ExpertNotFoundError(RemoteError, LookupError):
    """No live provider of that uid is known. `may_appear`: one was, and may be back soon."""

    exit_code = 7
    may_appear: bool = False


class ExpertRebornError(RemoteError):
    """An expert has lost what it had learnt, or its last updates. `Swarm(on_rebirth="raise")` asks for it."""


class ExpertsUnavailableError(RemoteError):
    """Too few experts answered for some rows of a batch. `rows` lists their indices."""

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.rows = rows


class RecordError(RemoteError, ValueError):
    """A DHT record that must not be believed."""


class BadSignatureError(RecordError):
    """The signature does not fit the public key and the bytes."""


class NotDelegatedError(RecordError):
    """In a closed swarm: the record carries no delegation of the owner that is in force and covers it."""


class ExpiredRecordError(RecordError):
    """The record is past its expiry, or expires further ahead than is allowed."""


class StaleRecordError(RecordError):
    """A newer record of the same slot is known, or the same sequence with other bytes."""


class CallError(RemoteError):
    """A node answered a call with an error. `code` is the status code of the wire format."""

    code: ClassVar[int] = 500
    retry_after_s: float | None = None


class BadRequestError(CallError, ValueError):
    """The call is malformed or does not fit the expert's schema."""

    code = 400


class NonFiniteError(BadRequestError):
    """A tensor of the call holds NaN or infinity."""


class OutlierGradientError(BadRequestError):
    """The call's gradients are far over those that the expert usually gets."""


class AuthenticationError(CallError):
    """The caller has not proved who it is, or its session has ended."""

    code = 401


class AccessDeniedError(CallError):
    """The node knows who calls and does not serve that caller."""

    code = 403


class UnknownExpertError(CallError, LookupError):
    """The node does not host that uid."""

    code = 404
    exit_code = 7


class ReplayConflictError(CallError):
    """A backward id came again and its first answer cannot be repeated."""

    code = 409


class TooLargeError(CallError, ValueError):
    """A declared size is over the node's limit."""

    code = 413


class WireVersionError(CallError):
    """The two sides speak different wire versions."""

    code = 426


class OverloadedError(CallError):
    """A queue is full or the caller is over one of its limits; try again after `retry_after_s`."""

    code = 429


class ExpertFailedError(CallError):
    """The expert raised while it computed the batch."""

    code = 500


class DrainingError(CallError):
    """The node takes no calls now: it is shutting down, or this one not now (then there is a `retry_after_s`)."""

    code = 503


class OutOfMemoryError(DrainingError, ExpertFailedError):
    """The system gave the node no memory for this call; another node has some, or this one soon.

    It has a `retry_after_s`, by which a caller tells it from a node that leaves.
    """


class ExpiredCallError(CallError):
    """The call's deadline passed before the device took it."""

    code = 504


_BY_CODE: dict[int, type[CallError]] = {
    kind.code: kind
    for kind in (
        BadRequestError,
        AuthenticationError,
        AccessDeniedError,
        UnknownExpertError,
        ReplayConflictError,
        TooLargeError,
        WireVersionError,
        OverloadedError,
        ExpertFailedError,
        DrainingError,
        ExpiredCallError,
    )
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system refused memory; torch and the libraries below say so in words only. Never raises."""
    kind = type(error)  # asking what it is an instance of would call what a user may have written
    try:
        if issubclass(kind, OSError):
            return bool(getattr(error, "errno", None) == errno.ENOMEM)
        return issubclass(kind, MemoryError) or (
            issubclass(kind, RuntimeError) and bool(_NO_MEMORY.search(str(error.args[0]) if error.args else ""))
        )
    except BaseException:  # noqa: BLE001 - a text that cannot be had says nothing of memory
        return False


def out_of_memory(error: BaseException) -> OutOfMemoryError:
    """What a caller is told when the system refused memory for its call."""
    refusal = OutOfMemoryError(
        f"the node's system gives it no memory for this call now ({_name_of(type(error))}); send fewer rows a call, or "
        f"ask another provider"
    )
    refusal.retry_after_s = _NO_MEMORY_PAUSE_S
    return refusal


def shown(text: str) -> str:
    """A stranger's text as it may go to a terminal or a log: one line, no control characters, 1,000 at most."""
    text = "".join(
        each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text[: MAX_MESSAGE_CHARS + 1]
    )
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


def message_of(error: BaseException) -> str:
    """What an exception says, as `shown` makes it: whatever it is or does, this gives a text that can be sent.

    Somebody else's exception may have a `__str__` that raises anything, or that gives a lone surrogate, which no
    encoding takes, a megabyte, or a subclass of str with ideas of its own.
    """
    try:
        return shown(str.__str__(str(error)))
    except BaseException:  # noqa: BLE001 - SystemExit too: nothing that is said of an error may be another one
        return "an error whose text cannot be had"


def describe(error: BaseException, limit: int = 500) -> str:
    """Kind and first line of an exception, of a group also its first member: "KeyError: 'x'". Never raises."""
    try:
        parts = [_described(error)]
        while issubclass(type(error), BaseExceptionGroup) and len(parts) < _MAX_NESTED:
            error = BaseExceptionGroup.exceptions.__get__(error)[0]
            parts.append(_described(error))
        text = shown(": ".join(parts))
    except BaseException:  # noqa: BLE001 - no memory, no stack: what is left is to say that there was an error
        return "an exception that cannot be described"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _described(error: BaseException) -> str:
    name = _name_of(type(error))
    try:
        lines = str.__str__(str(error))[: 4 * MAX_MESSAGE_CHARS].strip().splitlines()
    except BaseException:  # noqa: BLE001 - then the name must do
        return name
    return f"{name}: {lines[0]}" if lines else name


def _name_of(kind: type) -> str:
    """The name of a class, past whatever its metaclass says instead."""
    return shown(str.__str__(type.__dict__["__name__"].__get__(kind)))[:_MAX_NAME_CHARS]


def call_error(code: int, message: str, retry_after_s: float | None = None) -> CallError:
    """The error class for a status code a node answered with; unknown 4xx and 5xx fall back to 400 and 500."""
    kind = _BY_CODE.get(code) or (BadRequestError if 400 <= code < 500 else ExpertFailedError)
    error = kind(shown(message))
    error.retry_after_s = retry_after_s
    return error
