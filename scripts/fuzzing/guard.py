"""Runs a target once and judges it: an untyped exception, too much memory or time, or code from the bytes."""

from __future__ import annotations

import hashlib
import re
import signal
import sys
import traceback
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from fuzzing.target import KIB, Target

SLACK_BYTES: Final = 512 * KIB
"""What Python itself takes for a call that fails: frames, tracebacks, messages."""
WAITING: Final = 10.0
"""How much longer than computing an input may wait."""
_ROOT: Final = Path(__file__).parents[2]
_CODE: Final = frozenset(
    {"pickle.find_class", "marshal.loads", "marshal.load", "exec", "compile", "import", "ctypes.dlopen",
     "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.getaddrinfo",
     "socket.gethostbyname", "socket.connect", "socket.bind"}
)  # fmt: skip
"""Audit events (PEP 578) that no bytes of a stranger may lead to: running code, or a look-up of a name of theirs."""


class TookTooLongError(BaseException):
    """Raised by the alarm inside the target. No `except Exception` may swallow it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect: `kind` and `where` name it, so that the same defect is reported once."""

    kind: str
    where: str
    detail: str
    data: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one input."""

    signature: str
    """Equal for inputs that the target treats alike, as far as can be seen from outside."""
    finding: Finding | None = None
    peak_bytes: int | None = None
    """Of Python's allocators, where it was measured."""


class Guard:
    """Runs one target. One per process and target: the audit hook stays for good."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.allowed_bytes = 2 * target.limit_bytes + SLACK_BYTES
        self._events: list[str] = []
        self._armed = False
        sys.addaudithook(self._audit)

    def __repr__(self) -> str:
        return f"<Guard {self.target.name}: at most {self.allowed_bytes} bytes>"

    def warm_up(self, inputs: Iterator[bytes]) -> None:
        """Run inputs unjudged, so that what is imported and cached on first use is there."""
        for data in inputs:
            try:
                self.target.run(data)
            except Exception:  # noqa: S112, BLE001 - judged when they are run again
                continue

    def run(self, data: bytes, *, measure: bool = False) -> Outcome:
        """Run the target on `data`; with `measure` its peak of Python memory as well."""
        resident = _peak_resident_bytes()
        if measure:
            tracemalloc.start()
        try:
            outcome = self._run(data)
        finally:
            peak = tracemalloc.get_traced_memory()[1] if measure else None
            if measure:
                tracemalloc.stop()
        # The resident peak only ever grows, and sees torch's memory too.
        grown = _peak_resident_bytes() - resident if not measure else 0
        if grown > self.allowed_bytes:  # the stack's own pages, once touched, stay: only what is taken again counts
            forget_peak()
            resident = _peak_resident_bytes()
            self._run(data)
            grown = _peak_resident_bytes() - resident
        if outcome.finding is None and max(peak or 0, grown) > self.allowed_bytes:
            what = f"took {max(peak or 0, grown)} bytes, {self.allowed_bytes} are allowed"
            return Outcome("memory", Finding("memory", self.target.name, what, data), peak)
        return Outcome(outcome.signature, outcome.finding, peak)

    def _run(self, data: bytes) -> Outcome:
        self._events.clear()
        try:
            with _alarm(self.target.deadline_s):
                self._armed = True
                try:
                    signature = self.target.run(data)
                finally:
                    self._armed = False
        except TookTooLongError as error:
            return self._found("time", f"no end after {self.target.deadline_s} s", error, data)
        except self.target.errors as error:
            signature = f"{type(error).__name__}: {_skeleton(str(error))}"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - this is what a fuzzer is for
            return self._found(type(error).__name__, str(error)[:300], error, data)
        if self._events:
            finding = Finding("code", self._events[0], f"led to {', '.join(self._events[:5])}", data)
            return Outcome("code", finding)
        return Outcome(signature)

    def _found(self, kind: str, detail: str, error: BaseException, data: bytes) -> Outcome:
        where = _last_line_of_ours(error)
        return Outcome(f"{kind} {where}", Finding(kind, where, detail, data))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._armed and event in _CODE:
            self._events.append(f"{event} {str(arguments[:1])[:80]}")


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises TookTooLongError inside the block; where there are no alarms, the parent's watchdog has to do.

    Seconds of computing: on a busy machine an input that is innocent may have to wait for its turn. Waiting itself
    has an end too, a later one.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise TookTooLongError

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, WAITING * seconds)}
    before = {each: signal.signal(each, ring) for each in timers}
    for timer, after_s in timers.values():
        signal.setitimer(timer, after_s)
    try:
        yield
    finally:
        for each, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(each, before[each])


def _peak_resident_bytes() -> int:
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Let the resident peak begin anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _skeleton(message: str) -> str:
    """A message without what the bytes put into it."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "q", message[:400])
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?|\b[0-9a-f]{6,}\b", "9", message)[:120]


def _last_line_of_ours(error: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(_ROOT / "p2pmoe"):
            return f"{path.relative_to(_ROOT).as_posix()}:{frame.name}"
    return "outside p2pmoe"
