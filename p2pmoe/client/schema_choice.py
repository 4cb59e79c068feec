"""Which of several announced schemas a caller takes: what the caller says, else what most of the swarm says.

Where all announce one schema, one provider is asked for it. Where several are announced, records alone decide nothing:
of each schema some providers are asked, each in a network of its own, for the document of an expert that they
announce. A schema counts with its weight (`experts/offers.py`) times the cube of the share that answered, over a
connection that proves their key. All on the swarm's loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from p2pmoe.client.acquaintance import Acquaintance
from p2pmoe.client.directory import ExpertInfo
from p2pmoe.errors import DeadlineError, ExpertNotFoundError, P2PMoEError, SchemaError
from p2pmoe.experts.offers import Offer, SchemaVote, weigh_schemas
from p2pmoe.protocol.schema import format_schema
from p2pmoe.types import PeerId

logger = logging.getLogger(__name__)

MAX_SCHEMAS: Final = 8
"""Schemas that are looked into: the weightiest by what the records say."""
MAX_WITNESSES: Final = 8
"""Providers asked for each."""
WITNESS_TIMEOUT_S: Final = 5.0
REMEMBERED_S: Final = 30.0
"""How long it is remembered that a provider has answered."""
MAX_REMEMBERED: Final = 4096
DOUBT: Final = 3
"""The power of the share that answered: records of nodes that are not there cost nothing, and a few real ones among
them must not speak for all."""
LOG_EVERY_S: Final = 60.0

Fits = Callable[[ExpertInfo], str | None]
"""What is wrong with a schema for the caller, in words; None when it fits."""


@dataclass(slots=True)
class _Inquiry:
    """What came of asking the providers of one schema."""

    vote: SchemaVote
    asked: int = 0
    answered: int = 0
    waiting: int = 0
    info: ExpertInfo | None = None
    unfit: str | None = None
    error: P2PMoEError | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def weight(self) -> float:
        """What is certain by now."""
        return self._weight(self.answered)

    @property
    def possible_weight(self) -> float:
        """What it may become, nothing once the schema is known not to fit."""
        return 0.0 if self.unfit else self._weight(self.answered + self.waiting)

    def _weight(self, answered: int) -> float:
        return self.vote.weight * (answered / self.asked) ** DOUBT


class SchemaChoice:
    """One for each swarm.

    Args:
        fetch: asks the provider of an offer for the schemas of that expert. Raises P2PMoEError.
        acquaintance: how long each peer has been known.
    """

    def __init__(
        self,
        fetch: Callable[[Offer], Awaitable[ExpertInfo]],
        acquaintance: Acquaintance,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._acquaintance = acquaintance
        self._clock = clock
        self._answered: OrderedDict[tuple[PeerId, str], tuple[float, ExpertInfo]] = OrderedDict()
        self._logged: dict[str, float] = {}
        self._dice = random.Random()  # noqa: S311 - so that nobody can arrange to be the one who is asked

    def __repr__(self) -> str:
        return f"<SchemaChoice: {len(self._answered)} answers remembered>"

    async def choose(
        self, name: str, offers: Sequence[Offer], fits: Fits, *, among: Collection[str] | None = None
    ) -> ExpertInfo:
        """The schema to use of those that are offered below `name`.

        Args:
            name: what messages call the place.
            offers: everything that is announced there.
            fits: the caller's own demands; schemas that do not meet them are ignored.
            among: digests of the only ones that come into question; all offers still say who has how much weight.

        Raises:
            ExpertNotFoundError: nobody offers anything.
            SchemaError: none that is offered is wanted, or fits.
            PeerUnreachableError, DeadlineError, CallError, DecodeError: nobody answered.
        """
        if not offers:
            raise ExpertNotFoundError(f"no expert below {name} is alive")
        for offer in offers:
            self._acquaintance.meet(offer.provider.peer_id)
        votes = weigh_schemas(offers, self._acquaintance.seen_for_s)
        wanted = [vote for vote in votes if among is None or vote.schema_digest in among]
        if not wanted:
            raise SchemaError(
                f"nobody below {name} has the schema {' or '.join(sorted(among or ()))}; they have "
                + ", ".join(vote.schema_digest for vote in votes[:MAX_SCHEMAS])
            )
        inquiries = [_Inquiry(vote) for vote in wanted[:MAX_SCHEMAS]]
        try:
            await self._inquire(inquiries, fits)
        finally:
            await _cancel([task for inquiry in inquiries for task in inquiry.tasks])
        chosen = max(
            (each for each in inquiries if each.info and not each.unfit), key=lambda each: each.weight, default=None
        )
        if chosen is None:
            raise _nothing_fits(name, inquiries)
        assert chosen.info is not None
        self._log_ignored(name, chosen, votes, inquiries)
        return chosen.info

    async def _inquire(self, inquiries: list[_Inquiry], fits: Fits) -> None:
        """Ask until one schema has more weight than any other can get."""
        alone = len(inquiries) == 1
        for inquiry in inquiries:
            for witness in _in_order(inquiry.vote) if alone else self._witnesses(inquiry.vote):
                inquiry.asked += 1
                known = self._remembered(witness)
                if known is not None:
                    _note(inquiry, known, fits)
                else:
                    inquiry.waiting += 1
                    inquiry.tasks.append(asyncio.create_task(self._ask(inquiry, witness, fits)))
                    # Where nobody contradicts it, the first answer will do.
                    if alone:
                        await inquiry.tasks[-1]
                if alone and inquiry.info:
                    return
        pending = {task for inquiry in inquiries for task in inquiry.tasks if not task.done()}
        while pending and not _is_settled(inquiries):
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # what nobody foresaw fails the choice, loudly

    def _witnesses(self, vote: SchemaVote) -> list[Offer]:
        """Whom to ask: one provider of each network, in random order; further ones where there are few networks."""
        lines = list(vote.providers_by_network().values())
        for line in lines:
            self._dice.shuffle(line)
        self._dice.shuffle(lines)
        by_turn = (line[turn] for turn in range(MAX_WITNESSES) for line in lines if turn < len(line))
        chosen = [offer for offer, _ in zip(by_turn, range(MAX_WITNESSES), strict=False)]
        # Any of the experts that it announces, so that it must have them all.
        return [self._dice.choice(vote.offers_of(offer.provider.peer_id)) for offer in chosen]

    async def _ask(self, inquiry: _Inquiry, witness: Offer, fits: Fits) -> None:
        try:
            async with asyncio.timeout(WITNESS_TIMEOUT_S):
                info = await self._fetch(witness)
        except P2PMoEError as error:
            inquiry.error = error
        except TimeoutError:
            inquiry.error = DeadlineError(f"{witness.uid} at {witness.provider.endpoint} did not say what it takes")
        else:
            self._remember(witness, info)
            _note(inquiry, info, fits)
        finally:
            inquiry.waiting -= 1

    def _remembered(self, witness: Offer) -> ExpertInfo | None:
        at, info = self._answered.get((witness.provider.peer_id, witness.provider.schema_digest), (0.0, None))
        return info if info is not None and self._clock() - at < REMEMBERED_S else None

    def _remember(self, witness: Offer, info: ExpertInfo) -> None:
        self._answered[witness.provider.peer_id, witness.provider.schema_digest] = self._clock(), info
        while len(self._answered) > MAX_REMEMBERED:
            self._answered.popitem(last=False)

    def _log_ignored(
        self, name: str, chosen: _Inquiry, votes: Sequence[SchemaVote], inquiries: Sequence[_Inquiry]
    ) -> None:
        """One line a minute for a name, however many strangers there are."""
        ignored = [vote for vote in votes if vote is not chosen.vote]
        now = self._clock()
        if not ignored or now - self._logged.get(name, float("-inf")) < LOG_EVERY_S:
            return
        if len(self._logged) >= MAX_REMEMBERED:
            self._logged.clear()
        self._logged[name] = now
        assert chosen.info is not None
        other = ignored[0]
        known = next((each.info for each in inquiries if each.vote is other), None)
        records = sum(len(vote.offers) for vote in votes)
        logger.warning(
            "below %s: %d of %d records are of another schema than %s and are ignored, e.g. %s of peer %s: %s "
            "(say in_features, schema_digest or --hidden-dim to choose yourself)",
            name,
            records - len(chosen.vote.offers),
            records,
            describe_schema(chosen.info),
            other.offers[0].uid,
            other.offers[0].provider.peer_id,
            "it does not answer" if known is None else describe_schema(known),
        )


def describe_schema(info: ExpertInfo) -> str:
    """`(FP32[batch, 64]) -> (FP32[batch, 64])`."""
    return f"{format_schema(info.inputs)} -> {format_schema(info.outputs)}"


def _in_order(vote: SchemaVote) -> list[Offer]:
    """One offer of each provider, in the order given: where all agree nobody has a reason to be drawn by lot."""
    first = {offer.provider.peer_id: offer for offer in reversed(vote.offers)}
    return list(dict.fromkeys(first[offer.provider.peer_id] for offer in vote.offers))[:MAX_WITNESSES]


def _note(inquiry: _Inquiry, info: ExpertInfo, fits: Fits) -> None:
    inquiry.answered += 1
    if inquiry.info is None:
        inquiry.info, inquiry.unfit = info, fits(info)


def _is_settled(inquiries: Sequence[_Inquiry]) -> bool:
    leader = max(inquiries, key=lambda each: each.weight if each.info and not each.unfit else -1.0)
    if leader.info is None or leader.unfit:
        return False
    # Equals are all waited for, so that the order of their answers decides nothing.
    return all(each is leader or not each.waiting or leader.weight > each.possible_weight for each in inquiries)


def _nothing_fits(name: str, inquiries: Sequence[_Inquiry]) -> P2PMoEError:
    unfit = sorted((each for each in inquiries if each.unfit), key=lambda each: -each.weight)
    if unfit:
        more = f" (and {len(unfit) - 1} more schemas do not fit either)" if len(unfit) > 1 else ""
        return SchemaError(f"experts below {name}: {unfit[0].unfit}{more}")
    errors = [each.error for each in inquiries if each.error]
    return errors[0] if errors else ExpertNotFoundError(f"no expert below {name} is alive")


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.gather(*tasks, return_exceptions=True)
