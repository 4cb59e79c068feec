"""All of a node that has to do with checkpoints, from its start to its end. Puts the rooms around it together."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from p2pmoe.config import Fresh, StateConfig
from p2pmoe.errors import ConfigError, StateError
from p2pmoe.metrics import NodeMetrics
from p2pmoe.server.applied_calls import AppliedCalls
from p2pmoe.server.backend import ExpertBackend
from p2pmoe.server.checkpointer import Checkpointer
from p2pmoe.server.handlers import ExpertHandlers
from p2pmoe.server.replay import ReplayWindow
from p2pmoe.server.restoring import Restoration, restore_experts
from p2pmoe.server.runtime import Runtime
from p2pmoe.server.state_folder import StateFolder
from p2pmoe.server.trial import in_short_thread

logger = logging.getLogger(__name__)

_NO_WRITING: Final = ("EROFS", "EACCES", "EPERM", "ENOSPC", "EDQUOT")  # not every system has all of them


class Keeping:
    """Of one node; it does nothing where `state.path` is None.

    Args:
        config: where and how often.
        fresh: `[experts] fresh`.
        swarm: whose experts these are.
    """

    def __init__(self, config: StateConfig, fresh: Fresh, swarm: str) -> None:
        self._config, self._fresh, self._swarm = config, fresh, swarm
        self._folder: StateFolder | None = None
        self._checkpointer: Checkpointer | None = None
        self._restoration = Restoration()
        self._applied = AppliedCalls()
        self._is_writable = True
        self.replay = ReplayWindow()
        """Knows the calls that restored experts have seen."""

    def __repr__(self) -> str:
        return f"<Keeping {self._checkpointer or self._config.path}>"

    def restore(self, backends: Sequence[ExpertBackend]) -> None:
        """Let experts go on from what is kept, before any call comes.

        Raises:
            ConfigError: `fresh = "never"` without a folder.
            StateError: another node has the folder, or an expert must not be served; see `restoring.py`.
        """
        path = self._config.path
        if path is None:
            if self._fresh == "never" and backends:
                raise ConfigError("experts.fresh = 'never' needs state.path, the folder with the experts' checkpoints")
            return
        if not backends:
            return
        folder = StateFolder(Path(path), keep=self._config.keep)
        self._open(folder)
        self._folder = folder
        try:
            restored = in_short_thread(lambda: restore_experts(folder, backends, swarm=self._swarm, fresh=self._fresh))
        except BaseException:
            folder.close()
            self._folder = None
            raise
        pools = {backend.name: backend.backward_pool for backend in backends}
        self.replay.restore(restored.applied, pools.__getitem__)
        self._applied.restore(restored.applied)
        self._restoration = restored
        if self._is_writable:
            logger.info(
                "checkpoints in %s: %s; of each expert at most %d updates or %g s are lost if this node dies",
                path,
                restored.describe(),
                self._config.every_updates,
                self._config.every_s,
            )
        else:
            logger.info("checkpoints in %s: %s; none will be written", path, restored.describe())

    def start(self, handlers: ExpertHandlers, runtimes: Mapping[ExpertBackend, Runtime]) -> None:
        """Begin to write checkpoints."""
        if self._folder is None or not self._is_writable:
            return
        self._checkpointer = Checkpointer(
            self._folder, self._config, swarm=self._swarm, runtimes=runtimes, applied=self._applied
        )
        handlers.on_applied = self._checkpointer.note
        self._checkpointer.start([*self._restoration.begun, *self._restoration.thrown_away])

    def watch(self, metrics: NodeMetrics) -> None:
        """Let the checkpoints be counted."""
        if (checkpointer := self._checkpointer) is not None:
            metrics.watch_counts(
                "p2pmoe_checkpoints",
                "Checkpoints of experts, and attempts that failed.",
                "result",
                lambda: {"written": checkpointer.written, "failed": checkpointer.failed},
            )

    def close(self, timeout_s: float) -> None:
        """Write what is in no checkpoint yet, for at most `timeout_s`; nothing is computed any more."""
        if self._checkpointer is not None:
            self._checkpointer.close(timeout_s)
        elif self._folder is not None:
            self._folder.close()
        self._checkpointer = self._folder = None

    # -- private

    def _open(self, folder: StateFolder) -> None:
        """Take the folder; where nothing can be written in it, see what is there."""
        try:
            folder.open()
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) not in _NO_WRITING:
                raise StateError(
                    f"state.path: {folder.path} cannot be used: {error.strerror or error}; name a folder"
                ) from error
            logger.warning(
                "checkpoints cannot be written to %s: %s; what the experts learn is lost when this node ends",
                folder.path,
                error.strerror,
            )
            self._is_writable = False
            if folder.path.is_dir():
                folder.look()
