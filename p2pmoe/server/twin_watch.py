"""Looks for others who announce our uids, asks whether they are there, and says what follows. Rules are in `twins.py`.

One DHT query a prefix and look, and at most `MAX_ASKED` small requests to peers, only where a uid is undecided.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Final

from p2pmoe.errors import (
    InsecureEndpointError,
    P2PMoEError,
    PeerIdentityError,
    PeerUnreachableError,
    UnknownExpertError,
)
from p2pmoe.experts.directory import ExpertDirectory, Provider
from p2pmoe.experts.uid import parse_uid
from p2pmoe.server.twins import Answer, Twins, Verdict
from p2pmoe.types import WIRE_VERSION, Endpoint, PeerId

logger = logging.getLogger(__name__)

MAX_ASKED: Final = 128
"""Peers asked in one look; anybody may announce our uids under any number of keys. The others count as alive."""
ASKED_AT_A_TIME: Final = 32
ASK_TIMEOUT_S: Final = 3.0
LOG_EVERY_S: Final = 60.0
MAX_TOLD: Final = 1024
_SHOWN: Final = 3

GetJson = Callable[[Endpoint, str], Awaitable[Any]]
"""`Transport.get_json`."""


class TwinWatch:
    """One for each node, on its event loop.

    Args:
        directory: where uids are looked up.
        get_json: asks a peer for a document.
        peer_id, endpoint: our own.
        schemas: what we host, uid to schema digest.
    """

    def __init__(
        self,
        directory: ExpertDirectory,
        get_json: GetJson,
        peer_id: PeerId,
        endpoint: Callable[[], Endpoint],
        schemas: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._get_json = get_json
        self._peer_id = peer_id
        self._endpoint = endpoint
        self._schemas = dict(schemas)
        self._prefixes = list(dict.fromkeys(parse_uid(uid).prefix for uid in schemas))
        self._twins = Twins(peer_id, schemas)
        self._clock = clock
        self._told: dict[PeerId, None] = {}
        self._told_at = float("-inf")
        self._said_waiting = 0

    def __repr__(self) -> str:
        return f"<TwinWatch: {self._twins!r}>"

    @property
    def announced(self) -> list[str]:
        """The uids that are to be declared."""
        return self._twins.announced

    @property
    def waiting(self) -> list[str]:
        """The uids that somebody else serves."""
        return self._twins.waiting

    @property
    def is_settling(self) -> bool:
        """Whether some announced uid may have a twin that came at the same time: look again soon."""
        return len(self._twins.undecided) > len(self._twins.waiting)

    async def look(self) -> list[str]:
        """Decide anew what is to be announced; returns what is to be withdrawn. Raises as `get_prefixes`."""
        found = await self._directory.get_prefixes(self._prefixes, fresh=True)
        twins: dict[str, list[Provider]] = {}
        others: dict[str, list[Provider]] = {}
        for uid, digest in self._schemas.items():
            parsed = parse_uid(uid)
            for provider in found[parsed.prefix].get(parsed.suffix, ()):
                if provider.schema_digest and not self._is_us(provider):
                    (twins if provider.schema_digest == digest else others).setdefault(uid, []).append(provider)
        answers = await self._ask_all(twins)
        verdict = self._twins.look(twins, answers)
        self._say_what_waits(verdict)
        there = {
            uid: [each for each in twins[uid] if answers.get(each.peer_id) == "hosts"]
            for uid in self._twins.held
            if uid in twins
        }
        self._tell(there, "as well, and came later: calls and updates may now go to experts that were not trained")
        self._tell(others, "with another schema: callers take one of the two; are kind and hidden_dim the swarm's?")
        return verdict.yielded

    def _is_us(self, provider: Provider) -> bool:
        """Our own key, or a key that we had before at this very address."""
        own = self._endpoint()
        return provider.peer_id == self._peer_id or (provider.endpoint.host, provider.endpoint.port) == (
            own.host,
            own.port,
        )

    async def _ask_all(self, twins: Mapping[str, Collection[Provider]]) -> dict[PeerId, Answer]:
        """Each peer once, for an undecided uid if it announces any; of the others those that we have not told of."""
        undecided = self._twins.undecided
        to_ask = {provider.peer_id: (uid, provider) for uid in undecided for provider in twins.get(uid, ())}
        for uid, providers in twins.items():
            for provider in providers:
                if provider.peer_id not in self._told:
                    to_ask.setdefault(provider.peer_id, (uid, provider))
        slots = asyncio.Semaphore(ASKED_AT_A_TIME)

        async def ask(uid: str, provider: Provider) -> Answer:
            async with slots:
                return await self._ask(uid, provider)

        chosen = list(to_ask.items())[:MAX_ASKED]
        answers = await asyncio.gather(*(ask(uid, provider) for _, (uid, provider) in chosen))
        return {peer_id: answer for (peer_id, _), answer in zip(chosen, answers, strict=True)}

    async def _ask(self, uid: str, provider: Provider) -> Answer:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await self._get_json(provider.endpoint, f"/p2pmoe/v{WIRE_VERSION}/experts/{uid}")
        except (UnknownExpertError, PeerIdentityError, InsecureEndpointError):
            return "gone"
        except (PeerUnreachableError, TimeoutError) as error:
            return "refused" if _is_refusal(error) else "silent"
        except P2PMoEError:
            pass  # whoever holds the key is there, whatever it thinks of the question
        return "hosts"

    # -- what is said

    def _say_what_waits(self, verdict: Verdict) -> None:
        waiting = self._twins.waiting
        if verdict.yielded or (waiting and not self._said_waiting):
            uid = waiting[0]
            nothing = "; this node announces nothing now" if len(waiting) == len(self._schemas) else ""
            logger.warning(
                "%d of %d experts wait, because others serve them already, e.g. %s by %s: %s%s. They are announced "
                "when nobody else serves them; experts.twins = 'serve' announces them at once",
                len(waiting),
                len(self._schemas),
                uid,
                _whom(verdict.by_uid[uid]),
                _few(waiting),
                nothing,
            )
        elif verdict.announce and self._said_waiting:
            logger.info(
                "announcing %d experts that nobody else serves any more: %s",
                len(verdict.announce),
                _few(verdict.announce),
            )
        self._said_waiting = len(waiting)

    def _tell(self, found: Mapping[str, Sequence[Provider]], what: str) -> None:
        """One line for each new peer, and no more than one a minute."""
        new = {
            each.peer_id: each for providers in found.values() for each in providers if each.peer_id not in self._told
        }
        now = self._clock()
        if not new or now - self._told_at < LOG_EVERY_S:
            return
        self._told_at = now
        if len(self._told) + len(new) > MAX_TOLD:
            self._told.clear()
        self._told.update(dict.fromkeys(new))
        peer_id, provider = next(iter(new.items()))
        uids = [uid for uid, providers in found.items() if any(each.peer_id == peer_id for each in providers)]
        more = f" (and {len(new) - 1} more peers do so)" if len(new) > 1 else ""
        logger.warning("%s serves %s %s%s", _whom(provider), _few(uids), what, more)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether the machine is there and its port is closed."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = getattr(error, "os_error", None) or error.__cause__
    return False


def _whom(provider: Provider) -> str:
    return f"peer {provider.peer_id} at {provider.endpoint}"


def _few(uids: Sequence[str]) -> str:
    return ", ".join(uids[:_SHOWN]) + (f" and {len(uids) - _SHOWN} more" if len(uids) > _SHOWN else "")
