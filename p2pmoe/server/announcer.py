"""Keeps a node's experts announced: declares them, refreshes before they expire, withdraws them at the end.

Knows a directory and uids; nothing of calls or devices.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from typing import Final

from p2pmoe.config_rules import REFRESH_JITTER
from p2pmoe.errors import DelegationError, EncodeError, InvalidUidError, P2PMoEError
from p2pmoe.experts.directory import ExpertDirectory
from p2pmoe.faults import unexpected
from p2pmoe.server.twin_watch import TwinWatch
from p2pmoe.types import Endpoint

logger = logging.getLogger(__name__)

FOR_GOOD: Final = (InvalidUidError, EncodeError, DelegationError)
"""What trying again does not mend by itself."""
_RETRY_S = 2.0  # after a declaration that reached nobody; twice as long after each further one, up to a refresh
_RETRY_FOR_GOOD_S = 60.0  # somebody may have replaced the delegation
_SETTLE_S = 2.0  # until it is looked again whether somebody has begun to announce the same at the same time


class Announcer:
    """Announces `schemas` (uid -> schema digest) at `endpoint` every `refresh_s` ± 20 %.

    With a watch only those that it lets through: others may serve some of the uids already.
    """

    def __init__(
        self,
        directory: ExpertDirectory,
        schemas: Mapping[str, str],
        endpoint: Endpoint,
        *,
        ttl_s: float,
        refresh_s: float,
        watch: TwinWatch | None = None,
    ) -> None:
        self._directory = directory
        self._schemas = dict(schemas)
        self._endpoint = endpoint
        self._ttl_s = ttl_s
        self._refresh_s = refresh_s
        self._watch = watch
        self._task: asyncio.Task[None] | None = None
        self._failing = False
        self._retry_s = _RETRY_S

    def __repr__(self) -> str:
        return f"<Announcer {self._endpoint}: {len(self._schemas)} experts>"

    @property
    def waiting(self) -> list[str]:
        """Experts that are hosted and not announced, because others serve them."""
        return [] if self._watch is None else self._watch.waiting

    @property
    def is_settling(self) -> bool:
        """Whether somebody may have begun to announce the same at the same time."""
        return self._watch is not None and self._watch.is_settling

    async def start(self) -> None:
        """Look who is there, declare once, then keep refreshing in the background.

        Raises:
            InvalidUidError, EncodeError: they can never be announced.
            DelegationError: in a closed swarm, the owner does not let us.
        """
        if not self._schemas:
            return
        declared = await self._declare(first=True)
        self._task = asyncio.create_task(self._refresh(declared), name="p2pmoe-announcer")

    async def close(self, timeout_s: float = 2.0) -> None:
        """Stop refreshing and withdraw, so that nobody is sent here any more."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        try:
            async with asyncio.timeout(timeout_s):
                await self._directory.withdraw(list(self._schemas) if self._watch is None else self._watch.announced)
        except (P2PMoEError, TimeoutError) as error:
            why = str(error) or f"no answer within {timeout_s:.0f} s"  # a TimeoutError has no text
            logger.info("could not withdraw %d experts: %s; their records expire", len(self._schemas), why)

    async def _refresh(self, declared: bool) -> None:
        while True:
            # Jitter keeps a swarm that started together from refreshing together.
            jitter = random.uniform(2 - REFRESH_JITTER, REFRESH_JITTER)  # noqa: S311
            pause_s = jitter * self._pause_s() if declared else self._retry_s
            self._retry_s = _RETRY_S if declared else min(2 * self._retry_s, max(self._refresh_s, _RETRY_S))
            await asyncio.sleep(pause_s)
            declared = await self._declare()

    def _pause_s(self) -> float:
        return min(self._refresh_s, _SETTLE_S) if self.is_settling else self._refresh_s

    async def _declare(self, *, first: bool = False) -> bool:
        """Whether everything that may be announced was, and is known to be no one else's."""
        try:
            schemas, failed = await self._look()
            if schemas:
                await self._directory.declare(schemas, self._endpoint, self._ttl_s)
        except FOR_GOOD as error:
            if first:
                raise
            if not self._failing:
                logger.error("%d experts are announced no more: %s", len(self._schemas), error)  # noqa: TRY400
            self._failing = True
            self._retry_s = _RETRY_FOR_GOOD_S
            return False
        except P2PMoEError as error:
            failed = error
        except Exception as error:  # noqa: BLE001 - a node that stops announcing is lost to its swarm
            unexpected(f"declaring {len(self._schemas)} experts", error, by_a_stranger=True)
            self._failing = True
            return False
        if failed is not None and not self._failing:  # one line, not one every try
            logger.warning("could not declare %d experts: %s; trying on", len(self._schemas), failed)
        if failed is None and self._failing:
            logger.info("declared %d experts again", len(schemas))
        self._failing = failed is not None
        return failed is None

    async def _look(self) -> tuple[dict[str, str], P2PMoEError | None]:
        """What may be announced, and why nobody could look, if so: what was announced before stays announced."""
        if self._watch is None:
            return self._schemas, None
        failed: P2PMoEError | None = None
        try:
            yielded = await self._watch.look()
            if yielded:
                await self._directory.withdraw(yielded)
        except P2PMoEError as error:
            failed = error
        return {uid: self._schemas[uid] for uid in self._watch.announced}, failed
