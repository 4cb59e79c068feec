"""Keeps a node's experts announced: declares them, refreshes before they expire, withdraws them at the end.

Knows a directory and uids; nothing of calls or devices.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping

from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.directory import ExpertDirectory
from p2pmoe.faults import unexpected
from p2pmoe.types import Endpoint

logger = logging.getLogger(__name__)

_RETRY_S = 2.0  # after a declaration that reached nobody


class Announcer:
    """Announces `schemas` (uid -> schema digest) at `endpoint` every `refresh_s` ± 20 %."""

    def __init__(
        self,
        directory: ExpertDirectory,
        schemas: Mapping[str, str],
        endpoint: Endpoint,
        *,
        ttl_s: float,
        refresh_s: float,
    ) -> None:
        self._directory = directory
        self._schemas = dict(schemas)
        self._endpoint = endpoint
        self._ttl_s = ttl_s
        self._refresh_s = refresh_s
        self._task: asyncio.Task[None] | None = None
        self._failing = False

    def __repr__(self) -> str:
        return f"<Announcer {self._endpoint}: {len(self._schemas)} experts>"

    async def start(self) -> None:
        """Declare once, then keep refreshing in the background."""
        if not self._schemas:
            return
        declared = await self._declare()
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
                await self._directory.withdraw(list(self._schemas))
        except (P2PMoEError, TimeoutError) as error:
            logger.info("could not withdraw %d experts: %s; their records expire", len(self._schemas), error)

    async def _refresh(self, declared: bool) -> None:
        while True:
            # Jitter keeps a swarm that started together from refreshing together.
            pause_s = self._refresh_s * random.uniform(0.8, 1.2) if declared else _RETRY_S  # noqa: S311
            await asyncio.sleep(pause_s)
            declared = await self._declare()

    async def _declare(self) -> bool:
        try:
            await self._directory.declare(self._schemas, self._endpoint, self._ttl_s)
        except P2PMoEError as error:
            if not self._failing:  # one line, not one every try
                logger.warning("could not declare %d experts: %s; trying on", len(self._schemas), error)
            self._failing = True
            return False
        except Exception as error:  # noqa: BLE001 - a node that stops announcing is lost to its swarm
            unexpected(f"declaring {len(self._schemas)} experts", error, by_a_stranger=True)
            self._failing = True
            return False
        if self._failing:
            logger.info("declared %d experts again", len(self._schemas))
        self._failing = False
        return True
