"""What one mixture knows of its grid: which schema its experts have, and which of them are alive now.

The schema is decided once (`discovery.py`) and kept while its experts live, whatever else is announced; it is looked
up again only while rows find nobody, for a swarm may change what it serves. Shapes: B rows, G grid size.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine, Generator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch

from p2pmoe.client.beam_search import BeamSearch, Found, MaskCache, read_within
from p2pmoe.client.directory import ExpertInfo
from p2pmoe.client.discovery import Wanted, discover
from p2pmoe.client.patience import Patience, may_pass, patiently
from p2pmoe.client.schema_choice import describe_schema
from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import ExpertNotFoundError, P2PMoEError, PeerUnreachableError
from p2pmoe.experts.directory import Children
from p2pmoe.experts.uid import prefix_of
from p2pmoe.protocol.schema import format_schema

logger = logging.getLogger(__name__)

_SEARCHES: Final = 3  # for one result, each without the prefixes that were barren before
_WIDER: Final = 4
BARREN_S: Final = 5.0
"""How long a prefix without experts of our schema is passed over."""
MAX_BARREN: Final = 65_536
LOOK_AGAIN_S: Final = 5.0
"""How often the schema is looked up again at most, while rows find nobody."""
SAY_AGAIN_S: Final = 60.0
READ_AGAIN: Final = 64
"""Prefixes that a waiting pass reads from the network, at a time."""

Reads = Generator[Coroutine[Any, Any, Mapping[str, Children]], Any, Found]
"""A search: yields what is to be run on the swarm's loop."""


class GridFinder:
    """One for each mixture. Any thread.

    Args:
        swarm: where the experts are.
        wanted: which grid.
        in_features, out_features: the widths that experts must have; None takes any.
        beam_size, k_best: as in `RemoteMixtureOfExperts`.
        allow_nobody: that nobody is there is said in the log instead of raised. What is there and does not fit raises.
        timeout_s: how long one search may wait for the DHT.
    """

    def __init__(
        self,
        swarm: Swarm,
        wanted: Wanted,
        *,
        in_features: int,
        out_features: int | None,
        beam_size: int,
        k_best: int,
        allow_nobody: bool,
        timeout_s: float,
    ) -> None:
        self.info: ExpertInfo | None = None
        """The schema in use, once it is found."""
        self._swarm, self._wanted = swarm, wanted
        self._in_features, self._out_features = in_features, out_features
        self._beam_size, self._k_best = beam_size, k_best
        self._allow_nobody, self._timeout_s = allow_nobody, timeout_s
        self._masks = MaskCache()
        self._barren: dict[tuple[str, str], float] = {}
        """Schema and prefix, and until when it is passed over."""
        self._look_again_at = self._say_again_at = 0.0
        self.has_served = False
        """Every row had its experts once: if they are gone, they may be back."""

    def __repr__(self) -> str:
        return f"<GridFinder {self._wanted.name}: {'no schema yet' if self.info is None else self.info.schema_digest}>"

    # -- the schema, on the swarm's loop

    async def check(self) -> None:
        """Find the schema now, whether or not anybody may be missing. Raises as `discover`."""
        self.info = await self._find(None)

    async def find(self, x: torch.Tensor, deadline: float) -> None:
        """Find the schema for an input [B, …]; see `patience` for how long somebody is waited for.

        Raises as `discover`. Where nobody is allowed, that nobody is there or answers raises nothing, and nobody is
        waited for either.
        """
        fixed = self._allow_nobody or self._swarm.directory.is_fixed
        try:
            self.info = await patiently(lambda again: self._find(x, again=again), deadline, fixed=fixed)
        except P2PMoEError as error:
            if not self._allow_nobody or not (isinstance(error, ExpertNotFoundError) or may_pass(error)):
                raise
            self.say_seldom(f"{error}; rows are zeros until that changes")

    async def look_again(self, x: torch.Tensor) -> None:
        """Find the schema anew; where that fails the old one stays."""
        old = self.info
        try:
            new = await self._find(x)
        except P2PMoEError as error:
            # No reason to end a run: the experts may come back. But whoever waits for them should know.
            self.say_seldom(f"some rows find no expert, and looking again failed: {error}")
            return
        self.info = new
        if old is not None and new.schema_digest != old.schema_digest:
            logger.warning(
                "experts below %s. are no longer %s but %s; going on with these",
                self._wanted.name,
                describe_schema(old),
                describe_schema(new),
            )
            self._swarm.ages.forget(f"{self._wanted.name}.")

    def should_look_again(self, found: Found) -> bool:
        """Whether a row has found nobody; True at most once in some seconds."""
        now = time.monotonic()
        if now < self._look_again_at or bool(found.valid.any(1).all()):
            return False
        self._look_again_at = now + LOOK_AGAIN_S
        return True

    async def _find(self, x: torch.Tensor | None, *, again: bool = False) -> ExpertInfo:
        # Who goes on without anybody looks at every call: one read more each time would be too much.
        name_others = x is None or not self._allow_nobody
        fits = partial(self._why_unfit, x=x)
        try:
            return await discover(
                self._swarm, self._wanted, fits, self._timeout_s, name_others=name_others, again=again
            )
        except ExpertNotFoundError as error:
            error.may_appear = self.awaits([prefix_of(self._wanted.name, ())])
            raise

    def _why_unfit(self, info: ExpertInfo, x: torch.Tensor | None) -> str | None:
        """What is wrong with a schema for this mixture and, if there is one, this input."""
        shape = info.inputs[0].shape
        if not shape or shape[-1] != self._in_features:
            return f"they take {format_schema(info.inputs)}; this mixture has in_features={self._in_features}"
        whole = next((str(proto) for proto in info.outputs if not proto.dtype.is_floating_point), None)
        if whole is not None:
            return (
                f"they give {whole}: a mixture weights its experts' outputs and sums them, which integers cannot take. "
                f"Call the expert itself, swarm.expert(…), or host experts that give floats only"
            )
        if self._out_features is not None and info.outputs[0].shape[-1:] != (self._out_features,):
            return f"they give {format_schema(info.outputs)}; this mixture has out_features={self._out_features}"
        if x is not None and (len(shape) >= x.ndim or not info.inputs[0].takes(x.shape[-len(shape) :])):
            return f"they take {format_schema(info.inputs)}; an input of {list(x.shape)} is no batch of that"
        return None

    def say_seldom(self, message: str) -> None:
        """A warning in the log, of this mixture one a minute."""
        now = time.monotonic()
        if now >= self._say_again_at:
            self._say_again_at = now + SAY_AGAIN_S
            logger.warning("%s", message)

    # -- who is alive

    def search(self, scores: Sequence[torch.Tensor], schema_digest: str, looked: list[str]) -> Reads:
        """The best live experts of this schema; `scores` are on the CPU, [B, G] for each dimension.

        The prefixes that are looked at are put into `looked`.
        """
        deadline = time.monotonic() + self._timeout_s
        for attempt in range(_SEARCHES):
            # Wider each time: each search can pass over no more prefixes than the one before has followed.
            beam_size = self._beam_size * _WIDER**attempt
            search = BeamSearch(
                scores, self._wanted.name, beam_size, self._masks, schema_digest, self._barren_for(schema_digest)
            )
            yield from self._follow(search, deadline, looked)
            found = search.found(self._k_best)
            # Anybody may announce prefixes with nothing of use below; they must not keep rows from those that have.
            if bool(found.valid.all()) or not (barren := search.barren()):
                break
            until = time.monotonic() + BARREN_S
            self._barren = {**self._barren, **{(schema_digest, prefix): until for prefix in barren}}
        return found

    def _follow(
        self, search: BeamSearch, deadline: float, looked: list[str]
    ) -> Generator[Coroutine[Any, Any, Any], Any, None]:
        directory = self._swarm.directory
        while wanted := search.wanted():
            looked += wanted
            children = {prefix: directory.cached_prefix(prefix) for prefix in wanted}
            if missing := [prefix for prefix, known in children.items() if known is None]:
                left_s = max(1e-3, deadline - time.monotonic())
                children.update((yield self._read(missing, left_s)))
            search.advance({prefix: known or {} for prefix, known in children.items()})

    async def _read(self, prefixes: Sequence[str], budget_s: float) -> Mapping[str, Children]:
        try:
            return await read_within(self._swarm.directory, prefixes, budget_s)
        except PeerUnreachableError:
            if not self.has_served:
                raise
            return {}  # the DHT is not there now; the pass waits for it as for any other peer

    # -- waiting for those who are not

    def awaits(self, looked: Sequence[str]) -> bool:
        """Whether experts that could fill rows were there before, or are left out for a while only."""
        if self.has_served:
            return True
        directory, verdict = self._swarm.directory, self._swarm.trust.standing.verdict
        for prefix in looked[:READ_AGAIN]:
            shown = directory.cached_prefix(prefix) or {}
            for child, providers in directory.announced(prefix).items():
                uid = f"{prefix}{child}"
                if child not in shown and any(verdict(each.peer_id, uid) != "shunned" for each in providers):
                    return True
        return False

    async def read_again(self, prefixes: Sequence[str], pause_s: float, patience: Patience) -> None:
        """See who is announced a little later. On the swarm's loop."""
        prefixes = list(dict.fromkeys(prefixes))[:READ_AGAIN]
        try:
            async with asyncio.timeout(max(1e-3, patience.left_s())):
                await asyncio.sleep(pause_s)
                await self._swarm.directory.read_again(prefixes)
        except (P2PMoEError, TimeoutError):
            pass  # what is known is looked at again
        read = frozenset(prefixes)
        self._barren = {key: until for key, until in self._barren.items() if key[1] not in read}

    def _barren_for(self, schema_digest: str) -> Collection[str]:
        if not self._barren:
            return ()
        now = time.monotonic()
        kept = {key: until for key, until in self._barren.items() if until > now}
        self._barren = kept if len(kept) <= MAX_BARREN else {}
        return [prefix for digest, prefix in self._barren if digest == schema_digest]
