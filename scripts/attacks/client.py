"""The runner's end of the honest client: starts its process, asks it, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

ANSWER_S = 30.0


class HonestClient:
    """`begin` and `end` a window of its measurements; `probe` the expert that nobody trains."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def begin(self) -> None:
        await self._ask("begin")

    async def end(self) -> dict[str, Any]:
        return await self._ask("end")

    async def probe(self) -> dict[str, Any]:
        return await self._ask("probe")

    async def measure(self, seconds: float) -> dict[str, Any]:
        """A window in which nothing else happens."""
        await self.begin()
        await asyncio.sleep(seconds)
        return await self.end()

    async def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        """Raises RuntimeError when the client has ended, TimeoutError when it is stuck."""
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_S):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the honest client has ended; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.asynccontextmanager
async def honest_client(**spec: Any) -> AsyncIterator[HonestClient]:
    """A client that calls steadily until the block is left."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "attacks.honest",
        json.dumps(spec),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        client = HonestClient(process)
        await client.answer()
        yield client
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
