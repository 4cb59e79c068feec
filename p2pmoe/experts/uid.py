"""The grammar of expert uids and of the patterns that find them. Knows nothing of the DHT.

    uid     = name "." int *3("." int)            ffn.3.17        at most 128 characters
    name    = [A-Za-z_][A-Za-z0-9_-]*             at most 64 characters
    int     = 0 | [1-9][0-9]*                     at most 2**31 - 1
    prefix  = name "." *3(int ".")                ffn.   ffn.3.
    pattern = uid | prefix | name | name 1*4("." (int | "*" | "[" int ":" int "]"))

A prefix, a bare name and a final `*` reach everything below them; any other `*` stands for one coordinate, and
`[0:4]` for 0, 1, 2 and 3.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from p2pmoe.errors import InvalidUidError

MAX_UID_CHARS: Final = 128
MAX_COORDINATES: Final = 4
MAX_COORDINATE: Final = 2**31 - 1
MAX_EXPANSION: Final = 65_536

_NAME: Final = r"[A-Za-z_][A-Za-z0-9_-]{0,63}"
_INT: Final = r"(?:0|[1-9][0-9]{0,9})"
_UID_RE: Final = re.compile(rf"({_NAME})((?:\.{_INT}){{1,{MAX_COORDINATES}}})", re.ASCII)
_PREFIX_RE: Final = re.compile(rf"({_NAME})\.((?:{_INT}\.){{0,{MAX_COORDINATES - 1}}})", re.ASCII)
_SEGMENT_RE: Final = re.compile(rf"({_INT})|(\*)|\[({_INT}):({_INT})\]", re.ASCII)
_EXAMPLE: Final = "a uid looks like ffn.3.17: a name, then 1 to 4 numbers"


class ExpertUid(NamedTuple):
    """A parsed uid. `str()` gives the text back."""

    name: str
    coordinates: tuple[int, ...]

    @property
    def prefix(self) -> str:
        """The prefix whose record lists this expert: `ffn.3.` of `ffn.3.17`."""
        return prefix_of(self.name, self.coordinates[:-1])

    @property
    def suffix(self) -> int:
        """The last coordinate: 17 of `ffn.3.17`."""
        return self.coordinates[-1]

    def __str__(self) -> str:
        return self.prefix + str(self.suffix)


def prefix_of(name: str, coordinates: Sequence[int]) -> str:
    """`prefix_of("ffn", (3,))` is `ffn.3.`."""
    return ".".join([name, *map(str, coordinates), ""])


def parse_uid(text: str) -> ExpertUid:
    """Raises InvalidUidError for whatever is no uid."""
    match = _UID_RE.fullmatch(text) if isinstance(text, str) and len(text) <= MAX_UID_CHARS else None
    if match is None:
        raise InvalidUidError(f"{_shown(text)} is no expert uid; {_EXAMPLE}")
    return ExpertUid(match[1], _coordinates(match[2][1:].split("."), text))


def is_valid_uid(text: str) -> bool:
    """True when `parse_uid` would take it."""
    try:
        parse_uid(text)
    except InvalidUidError:
        return False
    return True


def parse_prefix(text: str) -> tuple[str, tuple[int, ...]]:
    """Name and coordinates of a prefix such as `ffn.` or `ffn.3.`. Raises InvalidUidError."""
    match = _PREFIX_RE.fullmatch(text) if isinstance(text, str) and len(text) <= MAX_UID_CHARS else None
    if match is None:
        raise InvalidUidError(f"{_shown(text)} is no prefix; a prefix looks like ffn. or ffn.3. and ends with a dot")
    return match[1], _coordinates(match[2].split(".")[:-1], text)


def expand_pattern(pattern: str) -> list[str]:
    """Every uid of a pattern of numbers and ranges: `ffn.[0:2].7` is `ffn.0.7` and `ffn.1.7`.

    Raises:
        InvalidUidError: no such pattern, it has a `*`, an empty range, or more than 65,536 uids.
    """
    name, segments = _parse_segments(pattern)
    if not segments or any(segment is None for segment in segments):
        raise InvalidUidError(f"{_shown(pattern)} names no finite set of experts; write ranges such as ffn.[0:4].[0:4]")
    ranges = [segment for segment in segments if segment is not None]
    count = math.prod(map(len, ranges))
    if count > MAX_EXPANSION:
        raise InvalidUidError(f"{_shown(pattern)} stands for {count} uids; at most {MAX_EXPANSION} are taken, split it")
    parse_uid(str(ExpertUid(name, tuple(numbers[-1] for numbers in ranges))))  # the longest one
    texts = [tuple(map(str, numbers)) for numbers in ranges]
    return [".".join((name, *coordinates)) for coordinates in itertools.product(*texts)]


def expand_patterns(patterns: Iterable[str]) -> list[str]:
    """Every uid of several patterns, in their order.

    Raises:
        InvalidUidError: as `expand_pattern`, or they are more than 65,536 together.
    """
    uids: list[str] = []
    for pattern in patterns:
        uids += expand_pattern(pattern)
        if len(uids) > MAX_EXPANSION:
            raise InvalidUidError(f"over {MAX_EXPANSION} uids up to {_shown(pattern)}; spread them over more nodes")
    return uids


def first_repeated(uids: Iterable[str]) -> str | None:
    """The first uid that was there before."""
    seen: set[str] = set()
    for uid in uids:
        if uid in seen:
            return uid
        seen.add(uid)
    return None


@dataclass(frozen=True, slots=True)
class UidPattern:
    """What a look-up asks for: an exact uid, everything below a prefix, or a glob."""

    text: str
    name: str
    segments: tuple[range | None, ...]
    """One per coordinate; None takes any."""
    open_end: bool
    """Further coordinates may follow."""

    @classmethod
    def parse(cls, text: str) -> UidPattern:
        """Raises InvalidUidError for whatever is no pattern."""
        if isinstance(text, str) and re.fullmatch(_NAME, text, re.ASCII):
            return cls(text, text, (None,), open_end=True)
        if isinstance(text, str) and text.endswith("."):
            name, coordinates = parse_prefix(text)
            return cls(text, name, (*(range(number, number + 1) for number in coordinates), None), open_end=True)
        name, segments = _parse_segments(text)
        # A final star reaches everything below, and at least one coordinate.
        open_end = segments[-1] is None
        return cls(text, name, segments, open_end=open_end)

    def matches(self, uid: str | ExpertUid) -> bool:
        """True when the uid is one of those meant; False for whatever is no uid."""
        if not isinstance(uid, ExpertUid):
            try:
                uid = parse_uid(uid)
            except InvalidUidError:
                return False
        count = len(uid.coordinates)
        if uid.name != self.name or count < len(self.segments) or (count > len(self.segments) and not self.open_end):
            return False
        return self._fits(uid.coordinates)

    def may_contain(self, name: str, coordinates: Sequence[int]) -> bool:
        """True when a uid that starts with this name and these coordinates, and goes on, may match."""
        if name != self.name or len(coordinates) >= MAX_COORDINATES:
            return False
        return (self.open_end or len(coordinates) < len(self.segments)) and self._fits(coordinates)

    @property
    def root(self) -> str:
        """The longest prefix below which every match lies."""
        fixed = itertools.takewhile(lambda segment: segment is not None and len(segment) == 1, self.segments)
        coordinates = [segment.start for segment in fixed if segment is not None]
        if len(coordinates) == len(self.segments) and not self.open_end:
            coordinates.pop()
        return prefix_of(self.name, coordinates[: MAX_COORDINATES - 1])

    def _fits(self, coordinates: Sequence[int]) -> bool:
        return all(
            segment is None or number in segment for segment, number in zip(self.segments, coordinates, strict=False)
        )

    def __str__(self) -> str:
        return self.text


def _parse_segments(text: str) -> tuple[str, tuple[range | None, ...]]:
    if not isinstance(text, str) or len(text) > MAX_UID_CHARS:
        raise InvalidUidError(f"{_shown(text)} is no pattern; it has at most {MAX_UID_CHARS} characters")
    name, *parts = text.split(".")
    matches = [_SEGMENT_RE.fullmatch(part) for part in parts]
    if not re.fullmatch(_NAME, name, re.ASCII) or not 1 <= len(parts) <= MAX_COORDINATES or not all(matches):
        raise InvalidUidError(
            f"{_shown(text)} is no pattern of expert uids; write ffn.3.17, ffn.3., ffn.3.* or ffn.[0:4].[0:4]"
        )
    return name, tuple(_segment(match, text) for match in matches if match is not None)


def _segment(match: re.Match[str], text: str) -> range | None:
    if match[2]:
        return None
    start, stop = (int(match[1]), int(match[1]) + 1) if match[1] else (int(match[3]), int(match[4]))
    if not start < stop <= MAX_COORDINATE + 1:
        raise InvalidUidError(f"{_shown(text)}: range {match[0]} is empty or goes beyond {MAX_COORDINATE}")
    return range(start, stop)


def _coordinates(parts: Sequence[str], text: str) -> tuple[int, ...]:
    coordinates = tuple(map(int, parts))
    if any(number > MAX_COORDINATE for number in coordinates):
        raise InvalidUidError(f"{_shown(text)}: a coordinate is over {MAX_COORDINATE}")
    return coordinates


def _shown(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "…'"
