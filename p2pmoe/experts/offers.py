"""What the records below one name say as a whole: how much speaks for each schema, and which grid there is.

No I/O and no clock. Anybody may announce anything under any uid, so nothing here believes a single record:

1. Keys are free, and so are uids; networks are not. A schema's weight is the number of uids that it is announced for
   times the number of networks (/24, IPv6 /48) that announce it. A burst of keys from one machine is one voice.
2. Times inside records are not used: a signer writes them, and a refreshed record is always young. A network counts
   for more the longer we have seen it ourselves, up to eleven times as much after ten minutes.
3. Whether somebody is there at all no record proves. `client/schema_choice.py` asks, and counts who answered.
4. That a grid is larger than the caller's is believed when those who serve most of the cells inside serve more cells
   outside, or when most cells are outside. For that count nobody serves more cells outside than inside, or than others
   serve there on average: who announces thousands of cells elsewhere locks nobody out. The signers of one network are
   one, save on local networks, where a whole swarm may be in one.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from p2pmoe.experts.children import Provider
from p2pmoe.experts.uid import ExpertUid
from p2pmoe.types import PeerId

FULL_AGE_S: Final = 600.0
"""After this time a network that we have seen counts most."""
AGE_STEP_S: Final = 60.0
_V4_PREFIX: Final = 24
_V6_PREFIX: Final = 48


@dataclass(frozen=True, slots=True)
class Offer:
    """One expert at one provider, as a record says."""

    uid: ExpertUid
    provider: Provider


@dataclass(frozen=True, slots=True)
class SchemaVote:
    """What speaks for one schema. `offers` are all that announce it."""

    schema_digest: str
    weight: float
    uids: int
    networks: int
    offers: tuple[Offer, ...]

    def offers_of(self, peer_id: PeerId) -> list[Offer]:
        """What one provider offers."""
        return [offer for offer in self.offers if offer.provider.peer_id == peer_id]

    def providers_by_network(self) -> dict[str, list[Offer]]:
        """One offer of each provider, by the network that it says to be in."""
        first: dict[PeerId, Offer] = {}
        for offer in self.offers:
            first.setdefault(offer.provider.peer_id, offer)
        by_network: dict[str, list[Offer]] = {}
        for offer in first.values():
            by_network.setdefault(network_of(offer.provider.endpoint.host), []).append(offer)
        return by_network


@lru_cache(maxsize=4096)
def network_of(host: str) -> str:
    """Whose voice a host is: its /24 or /48; all of loopback is one, and of names the last two labels."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ".".join(host.lower().rstrip(".").split(".")[-2:])
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback:
        return "loopback"
    prefix = _V4_PREFIX if address.version == 4 else _V6_PREFIX
    return str(ipaddress.ip_network((address, prefix), strict=False))


def weigh_schemas(offers: Iterable[Offer], seen_for_s: Callable[[PeerId], float]) -> list[SchemaVote]:
    """What speaks for each schema, most first; `seen_for_s` is how long we have known a peer."""
    by_digest: dict[str, list[Offer]] = {}
    for offer in offers:
        by_digest.setdefault(offer.provider.schema_digest, []).append(offer)
    votes = [_weigh(digest, tuple(each), seen_for_s) for digest, each in by_digest.items()]
    # Of equals the digest decides, so that two readers of the same records agree.
    return sorted(votes, key=lambda vote: (-vote.weight, vote.schema_digest))


def _weigh(digest: str, offers: tuple[Offer, ...], seen_for_s: Callable[[PeerId], float]) -> SchemaVote:
    ages: dict[str, float] = {}
    for provider in {offer.provider.peer_id: offer.provider for offer in offers}.values():
        network = network_of(provider.endpoint.host)
        ages[network] = max(ages.get(network, 0.0), seen_for_s(provider.peer_id))
    voices = sum(1.0 + min(age_s, FULL_AGE_S) / AGE_STEP_S for age_s in ages.values())
    uids = len({offer.uid for offer in offers})
    return SchemaVote(digest, uids * voices, uids, len(ages), offers)


def _voice(provider: Provider) -> str:
    """Whose word an offer is where a grid is judged."""
    host = provider.endpoint.host
    try:
        is_local = ipaddress.ip_address(host.partition("%")[0]).is_private
    except ValueError:
        is_local = False
    return provider.peer_id if is_local else network_of(host)


# -- the grid


@dataclass(frozen=True, slots=True)
class GridView:
    """The uids below one name. `extents` holds, for each number of coordinates, how far each of them reaches."""

    name: str
    extents: Mapping[int, tuple[int, ...]]
    counts: Mapping[int, int]

    @property
    def usual_depth(self) -> int:
        """How many coordinates most uids have; 0 without any."""
        return max(self.counts, key=lambda depth: (self.counts[depth], -depth), default=0)

    def __str__(self) -> str:
        depth = self.usual_depth
        if not depth:
            return f"there are no uids below {self.name}"
        s = "s" * (depth > 1)
        return f"uids below {self.name} have {depth} coordinate{s}, {format_grid(self.extents[depth])}"


def format_grid(sizes: Sequence[int]) -> str:
    """`8 × 8`."""
    return " × ".join(map(str, sizes))


def view_grid(name: str, offers: Iterable[Offer]) -> GridView:
    """Which grid these offers are from."""
    extents: dict[int, tuple[int, ...]] = {}
    uids = {offer.uid for offer in offers}
    for uid in uids:
        depth = len(uid.coordinates)
        known = extents.get(depth, (0,) * depth)
        extents[depth] = tuple(max(size, number + 1) for size, number in zip(known, uid.coordinates, strict=True))
    return GridView(name, extents, Counter(len(uid.coordinates) for uid in uids))


def is_inside(uid: ExpertUid, grid: Sequence[int]) -> bool:
    """Whether a uid is one of this grid's cells."""
    return len(uid.coordinates) == len(grid) and all(
        number < size for number, size in zip(uid.coordinates, grid, strict=True)
    )


def _lies_elsewhere(inside: Mapping[str, set[ExpertUid]], outside: Mapping[str, set[ExpertUid]]) -> bool:
    """Whether most of a swarm is outside of a grid, by signer. Rule 4."""
    total = sum(map(len, inside.values()))
    if 2 * sum(len(uids) for who, uids in inside.items() if len(outside.get(who, ())) > len(uids)) > total:
        return True
    count = len(set().union(*inside.values()))
    share = count / len(inside)
    return sum(min(len(uids), len(inside.get(who, ())) or share) for who, uids in outside.items()) > count


def why_not_this_grid(name: str, offers: Sequence[Offer], grid: Sequence[int], *, partial: bool = False) -> str | None:
    """What is wrong with a caller's grid, in words with both values; None where nothing is known to be.

    What is announced shows how large a grid is at least: cells that nobody serves now are no fault. `partial` lets
    the caller use some of the experts only.
    """
    if not offers:
        return None
    inside: dict[str, set[ExpertUid]] = {}
    outside: dict[str, set[ExpertUid]] = {}
    for offer in offers:
        side = inside if is_inside(offer.uid, grid) else outside
        side.setdefault(_voice(offer.provider), set()).add(offer.uid)
    if inside and (partial or not _lies_elsewhere(inside, outside)):
        return None
    same_depth = [offer for offer in offers if len(offer.uid.coordinates) == len(grid)]
    is_of_this_depth = view_grid(name, offers).usual_depth == len(grid)
    return f"{view_grid(name, same_depth if is_of_this_depth else offers)}; you asked for {format_grid(grid)}"
