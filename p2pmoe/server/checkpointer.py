"""Writes checkpoints of what has changed, on a thread of its own. Knows devices and folders; nothing of calls.

An expert is due after `every_updates` updates, or `every_s` seconds after the first one since its last checkpoint. Its
device copies it between two batches; the thread writes the copy, then takes the next: there is never more than one.
A disk that is full or read-only is told in a line now and then, tried again, and hurts no call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pmoe import forks
from p2pmoe.config import StateConfig
from p2pmoe.errors import StateError, describe
from p2pmoe.faults import unexpected
from p2pmoe.seldom import Seldom
from p2pmoe.server.applied_calls import AppliedCalls
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.checkpoints import Checkpoint, TensorFile
from p2pmoe.server.expert_state import ExpertState, made_of, take
from p2pmoe.server.runtime import Runtime
from p2pmoe.server.state_folder import StateFolder
from p2pmoe.server.task_pool import Task
from p2pmoe.server.tensor_file import encode_tensors
from p2pmoe.types import WIRE_VERSION

logger = logging.getLogger(__name__)

_TAKE_TIMEOUT_S: Final = 30.0
_LOCK_TIMEOUT_S: Final = 1.0  # nobody but the device thread should have it
_AGAIN_S: Final = 5.0
"""After a failure nothing is copied for so long."""
_left_in_parents: list[object] = []


@dataclass(slots=True, eq=False)
class _Watched:
    backend: ExpertBackend
    changes: int = 0
    """Batches that it was trained with since it was last copied."""
    due_at: float = 0.0
    hopeless: bool = False
    """It holds what no file can."""


@dataclass(slots=True, eq=False)
class _Copying:
    """One expert on its way from its device."""

    watched: _Watched
    applied: AppliedCalls
    ended: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False
    changes: int = 0
    state: ExpertState | None = None
    calls: list[tuple[str, float]] = field(default_factory=list)
    error: Exception | None = None

    def __call__(self) -> None:
        """On the device thread."""
        watched = self.watched
        try:
            with watched.backend.at_rest(_LOCK_TIMEOUT_S) as is_at_rest:
                if not self.abandoned and is_at_rest:
                    self.state = take(watched.backend)
                    self.calls = self.applied.of(watched.backend.name)
                    self.changes, watched.changes = watched.changes, 0
        except Exception as error:  # noqa: BLE001 - modules and optimizers of the user's have a say in it
            self.error = error
        finally:
            self.ended.set()


class Checkpointer:
    """Of one node.

    Args:
        folder: open for writing; it is closed with this.
        config: how often.
        swarm: written into each checkpoint.
        runtimes: the device of each expert.
        applied: the backward calls that experts have seen.
    """

    def __init__(
        self,
        folder: StateFolder,
        config: StateConfig,
        *,
        swarm: str,
        runtimes: Mapping[ExpertBackend, Runtime],
        applied: AppliedCalls,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._config, self._swarm, self._applied = folder, config, swarm, applied
        self._runtimes = dict(runtimes)
        self._clock = clock
        self._watched = {backend.name: _Watched(backend) for backend in runtimes}
        self._dirty: dict[str, _Watched] = {}
        self._wake = threading.Event()
        self._closing_at: float | None = None
        self._thread: threading.Thread | None = None
        self._again_at = 0.0
        self._seldom = Seldom()
        self.written = self.failed = 0
        """Checkpoints since the start."""
        forks.tell(self)

    def __repr__(self) -> str:
        return f"<Checkpointer {self._folder}: {len(self._dirty)} to write, {self.written} written>"

    def start(self, unsaved: Sequence[str] = ()) -> None:
        """Begin to write; `unsaved` are experts that have no checkpoint yet."""
        now = self._clock()
        for uid in unsaved:
            self._mark(self._watched[uid], now)
        self._thread = threading.Thread(target=self._run, name="p2pmoe-checkpoints", daemon=True)
        self._thread.start()

    def note(self, uid: str, tasks: Sequence[Task]) -> None:
        """An expert was trained with these calls. On its device thread."""
        self._applied.add(uid, [task.call_id for task in tasks if task.call_id])
        watched = self._watched[uid]
        watched.changes += 1
        if watched.changes == 1:
            self._mark(watched, self._clock())
            self._wake.set()
        elif watched.changes == self._config.every_updates:
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Write what has changed, for at most `timeout_s`, and give the folder back. Devices may have ended."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing_at = self._clock() + timeout_s
        self._wake.set()
        thread.join(timeout_s + 1.0)
        left = [uid for uid, watched in self._dirty.items() if not watched.hopeless]
        if left:
            logger.warning(
                "%d experts have learnt what is in no checkpoint: there were %.1f s to write it in",
                len(left),
                timeout_s,
            )
        if not thread.is_alive():
            self._folder.close()

    def became_a_child(self) -> None:
        """See `forks`."""
        self._thread = None
        _left_in_parents.append(self._folder.became_a_child())

    # -- private

    def _mark(self, watched: _Watched, now: float) -> None:
        watched.due_at = now + self._config.every_s
        self._dirty[watched.backend.name] = watched

    def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                watched, delay_s = self._next()
                if watched is not None:
                    self._keep(watched)
                    continue
            except Exception as error:  # noqa: BLE001 - the thread has nobody above it
                self._postpone(unexpected("writing checkpoints", error))
                delay_s = _AGAIN_S
            if self._closing_at is not None:
                return
            self._wake.wait(delay_s)

    def _next(self) -> tuple[_Watched | None, float | None]:
        """The expert to write now, or when to look again."""
        now = self._clock()
        waiting = [each for each in list(self._dirty.values()) if not each.hopeless]
        closing_at = self._closing_at
        if not waiting:
            return None, None
        most = max(waiting, key=lambda each: each.changes)
        if closing_at is not None:
            return (most if now < closing_at and now >= self._again_at else None), 0.0
        if now < self._again_at:
            return None, self._again_at - now
        first = min(waiting, key=lambda each: each.due_at)
        if first.due_at <= now:
            return first, 0.0
        if most.changes >= self._config.every_updates:
            return most, 0.0
        return None, first.due_at - now

    def _keep(self, watched: _Watched) -> None:
        backend = watched.backend
        copying = _Copying(watched, self._applied)
        self._dirty.pop(backend.name, None)
        self._runtimes[backend].between_batches(copying)
        copying.ended.wait(self._patience_s())
        copying.abandoned = True
        if copying.state is None:
            self._mark(watched, self._clock())
            if copying.error is not None:
                self._give_up(watched, copying.error)
            else:
                self._postpone(f"{backend.name} is being computed all the time")
            return
        try:
            self._write(backend, copying.state, copying.calls)
        except (OSError, StateError) as error:
            watched.changes += copying.changes
            self._mark(watched, self._clock())
            if isinstance(error, StateError):
                self._give_up(watched, error)
            else:
                self._postpone(error.strerror or str(error))
        else:
            self.written += 1
            self._seldom.reset()

    def _patience_s(self) -> float:
        if self._closing_at is None:
            return _TAKE_TIMEOUT_S
        return max(0.0, min(_TAKE_TIMEOUT_S, self._closing_at - self._clock()))

    def _write(self, backend: ExpertBackend, taken: ExpertState, calls: list[tuple[str, float]]) -> None:
        saved_at = time.time()

        def describe_it(sequence: int, tensors: TensorFile) -> Checkpoint:
            return Checkpoint(
                uid=backend.name,
                sequence=sequence,
                swarm=self._swarm,
                incarnation=backend.birth.incarnation,
                updates=taken.updates,
                schedule_step=taken.schedule_step,
                saved_at=saved_at,
                wire_version=WIRE_VERSION,
                made=made_of(backend),
                state=taken.state,
                applied=calls,
                tensors=tensors,
            )

        self._folder.write(backend.name, encode_tensors(taken.tensors), describe_it)

    def _give_up(self, watched: _Watched, error: Exception) -> None:
        self.failed += 1
        watched.hopeless = True
        logger.warning(
            "%s cannot be kept, and what it learns is lost when the node ends: %s",
            watched.backend.name,
            describe(error),
        )

    def _postpone(self, reason: object) -> None:
        self.failed += 1
        self._again_at = self._clock() + _AGAIN_S
        if (note := self._seldom.note()) is not None:
            logger.warning(
                "checkpoints cannot be written to %s: %s; serving goes on, %d experts have learnt what is in none%s",
                self._folder.path,
                reason,
                len(self._dirty),
                note,
            )
