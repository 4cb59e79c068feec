"""Finds out what is served below a name, and whether it is what the caller wants: prefix, grid and schema.

For callers of whole grids: the mixture, and training tasks. What does not fit is said at once, with both values.
"""

from __future__ import annotations

import asyncio
import difflib
from dataclasses import dataclass
from typing import Final

from p2pmoe.client.directory import Directory, ExpertInfo
from p2pmoe.client.offers import read_offers
from p2pmoe.client.schema_choice import Fits
from p2pmoe.client.swarm import Swarm
from p2pmoe.errors import ExpertNotFoundError, P2PMoEError, SchemaError
from p2pmoe.experts.offers import format_grid, is_inside, why_not_this_grid

NAMES_TIMEOUT_S: Final = 2.0
MAX_NAMES: Final = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller wants to find.

    name: in front of the coordinates, "ffn" of "ffn.3.17".
    grid: sizes of its dimensions.
    schema_digest: the only schema that will do; None takes the one that has most weight of those that fit.
    partial_grid: the caller knows that the swarm's grid is larger and wants a part of it.
    """

    name: str
    grid: tuple[int, ...]
    schema_digest: str | None = None
    partial_grid: bool = False


async def discover(
    swarm: Swarm, wanted: Wanted, fits: Fits, timeout_s: float, *, name_others: bool = True, again: bool = False
) -> ExpertInfo:
    """The schema of a grid's experts. On the swarm's loop.

    `name_others`: an empty name's error says which there are. `again`: by records from the network, whatever is cached.

    Raises:
        ExpertNotFoundError: nothing is alive below the name.
        SchemaError: the grid is another one, or no schema that is served there fits.
        RemoteError: nobody answered.
    """
    offers = await read_offers(swarm.directory, wanted.name, timeout_s, again=again)
    if not offers:
        others = await _other_names(swarm.directory, wanted.name) if name_others else ""
        raise ExpertNotFoundError(
            f"no expert below {wanted.name}. is alive in grid {format_grid(wanted.grid)}{others}; "
            f"run `p2pmoe lookup '{wanted.name}.*'` to see who is there"
        )
    reason = why_not_this_grid(wanted.name, offers, wanted.grid, partial=wanted.partial_grid)
    if reason is not None:
        raise SchemaError(f"{reason}; ask for the swarm's grid, or say that a part of it is meant (partial_grid)")
    inside = [offer for offer in offers if is_inside(offer.uid, wanted.grid)]
    among = None if wanted.schema_digest is None else (wanted.schema_digest,)
    return await swarm.schemas.choose(wanted.name, inside, fits, among=among)


async def _other_names(directory: Directory, name: str) -> str:
    """Which names there are instead, those most alike first; nothing where that cannot be had quickly."""
    find_names = getattr(directory, "find_names", None)  # a directory of one's own need not know
    if find_names is None:
        return ""
    try:
        async with asyncio.timeout(NAMES_TIMEOUT_S):
            names = [each for each in await find_names() if each != name]
    except (P2PMoEError, TimeoutError):
        return ""
    alike = difflib.get_close_matches(name, names, n=MAX_NAMES, cutoff=0.0)
    return f"; there are experts below {', '.join(alike)}" if alike else ""


def takes_rows_of(width: int | None) -> Fits:
    """For experts that take one row of features and give one of the same width; None takes any width."""

    def fits(info: ExpertInfo) -> str | None:
        inputs, outputs = info.inputs, info.outputs
        if len(inputs) != 1 or len(inputs[0].shape) != 1 or inputs[0].is_free:
            return (
                f"they take {', '.join(map(str, inputs))}, and a task needs one row of features, as kind = 'ffn' takes"
            )
        if len(outputs) != 1 or outputs[0].shape != inputs[0].shape:
            return f"they make {', '.join(map(str, outputs))} of {inputs[0]}, and a task needs the same width"
        if width is not None and inputs[0].shape[0] != width:
            return f"they take {inputs[0]}, and you asked for a width of {width}"
        return None

    return fits
