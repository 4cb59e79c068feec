"""Whether a node lost anything: what is asked before the first attack and after every one. Judges, attacks nothing."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from attacks.client import HonestClient
from attacks.context import Context
from attacks.target import Target
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import DecodeError, P2PMoEError
from p2pmoe.experts.bundles import decode_bundle
from p2pmoe.experts.uid import parse_uid
from p2pmoe.rpc.expert_pages import follow_pages

GROWN_BYTES: Final = 96 * 1024 * 1024
"""How much more memory the node may hold than when it was quiet: buffers that the allocator keeps, no more."""
MORE_FILES: Final = 8
SETTLE_S: Final = 3.0
REPLAY_FRESH_S: Final = 60.0
BAD_LOG: Final = re.compile(
    r"Traceback|exception was never retrieved|Unhandled exception|Error handling request|"
    r"Task was destroyed|Fatal error|\bcritical\b",
    re.IGNORECASE,
)


class State:
    """What must stay as it is.

    Args:
        target: the node.
        uids: `honest`, `victim`, `untouched`.
        public_key: whose records the node's are.
        dht: a DHT node in client mode that reads the records afresh.
    """

    def __init__(
        self, target: Target, uids: dict[str, str], every_uid: list[str], public_key: bytes, dht: DHTNode
    ) -> None:
        self._target, self._uids, self._every_uid = target, uids, every_uid
        self._public_key, self._dht = public_key, dht
        self._digest = ""
        self._updates: dict[str, int] = {}
        self._memory: int | None = None
        self._files: int | None = None
        self._log_at = 0
        self._replay: tuple[str, bytes, list[tuple[dict[str, Any], bytes]], float] | None = None

    async def remember(self, client: HonestClient, ctx: Context) -> None:
        """Take the quiet values."""
        probe = await client.probe()
        self._digest, self._updates = probe["digest"], await self._count_updates(probe)
        self._memory, self._files = self._target.resident_bytes(), self._target.open_files()
        await self._remember_backward(ctx)

    async def losses(self, client: HonestClient, attack: Context, ctx: Context) -> list[str]:
        """What is no longer as it was after `attack`, in words; an empty list when nothing is lost."""
        lost = [
            *await self._lost_records(),
            *await self._lost_parameters(client, attack.updates),
            *await self._lost_replay(ctx),
            *self._lost_calm(),
        ]
        deadline = time.monotonic() + SETTLE_S
        while (swollen := self._swollen()) and time.monotonic() < deadline:  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.1)
        return lost + swollen

    # -- private

    async def _lost_records(self) -> list[str]:
        found: set[str] = set()
        for prefix in {parse_uid(uid).prefix for uid in self._every_uid}:
            try:
                records = await self._dht.get(prefix)
            except P2PMoEError as error:
                return [f"the records under {prefix} cannot be read: {error}"]
            for record in records:
                try:
                    bundle = decode_bundle(record.value, record.public_key)
                except DecodeError:
                    continue
                if record.public_key == self._public_key:
                    found |= {f"{prefix}{child}" for child in bundle.children}
        missing = sorted(set(self._every_uid) - found)
        return [f"{len(missing)} experts are no longer found: {missing[:3]}"] if missing else []

    async def _lost_parameters(self, client: HonestClient, allowed: Counter[str]) -> list[str]:
        lost = []
        try:
            probe = await client.probe()
            updates = await self._count_updates(probe)
        except (RuntimeError, OSError, TimeoutError) as error:
            return [f"the node no longer answers: {type(error).__name__}: {error}"]
        for uid, count in updates.items():
            moved = count - self._updates[uid]
            if moved != allowed[uid]:
                lost.append(f"{uid} was trained {moved} times, {allowed[uid]} were right")
        self._updates = updates
        if probe["digest"] != self._digest:
            lost.append(f"{self._uids['untouched']} answers otherwise than before: {probe['digest'][:80]}")
        return lost

    async def _count_updates(self, probe: dict[str, Any]) -> dict[str, int]:
        """Updates by uid, without those of the honest client, which pauses after a probe."""
        pages = follow_pages(self._target.get_json)
        counts = {uid: info.updates or 0 async for page in pages for uid, info in page.items()}
        counts[self._uids["honest"]] -= probe["updates"]
        return counts

    async def _remember_backward(self, ctx: Context) -> None:
        call_id = secrets.token_hex(16)
        call = ctx.call(self._uids["victim"], "backward", call_id=call_id)
        reply = await ctx.exchange(call)
        if reply.seen_frames != "frame 200":
            raise RuntimeError(f"a right backward call was answered {reply.seen_frames}")
        self._updates[self._uids["victim"]] = await ctx.update_count(self._uids["victim"])
        self._replay = call_id, call, reply.answers, time.monotonic()

    async def _lost_replay(self, ctx: Context) -> list[str]:
        """A backward call of before, sent again: the first answer, and no second update."""
        assert self._replay is not None
        _, call, answer, at = self._replay
        before = await ctx.update_count(self._uids["victim"])
        reply = await ctx.exchange(call)
        lost = []
        if reply.answers != answer:
            lost.append(f"a repeated backward call was answered {reply.seen_frames}, not as the first time")
        if await ctx.update_count(self._uids["victim"]) != before:
            lost.append("a repeated backward call was applied again")
        if lost or time.monotonic() - at > REPLAY_FRESH_S:
            await self._remember_backward(ctx)
        return lost

    def _lost_calm(self) -> list[str]:
        """Lines in the node's log that say a stranger's bytes got further than they should."""
        if self._target.log_path is None:
            return []
        text = Path(self._target.log_path).read_text(encoding="utf-8", errors="replace")
        new, self._log_at = text[self._log_at :], len(text)
        bad = [line for line in new.splitlines() if BAD_LOG.search(line)]
        return [f"the node's log has {len(bad)} such lines: {bad[0][:200]}"] if bad else []

    def _swollen(self) -> list[str]:
        swollen = []
        memory, files = self._target.resident_bytes(), self._target.open_files()
        if memory is not None and self._memory is not None and memory > self._memory + GROWN_BYTES:
            swollen.append(f"memory grew from {self._memory >> 20} to {memory >> 20} MiB")
        if files is not None and self._files is not None and files > self._files + MORE_FILES:
            swollen.append(f"open files grew from {self._files} to {files}")
        return swollen
