"""Turns known inputs into new ones: blind changes of bytes, and changes of the values that a format holds.

Every mutator is a function `(data, dice) -> bytes` that never raises; `MUTATORS` names them.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any, Final

import msgspec

Mutator = Callable[[bytes, random.Random], bytes]

ODD_NUMBERS: Final = (
    0, 1, -1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 1023, 1024, 4096, 65535, 65536,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63),
    0.5, -0.0, 1e-320, 1.5e300, 1e308,
)  # fmt: skip
ODD_TEXTS: Final = (
    "", "0", "\0", "a\0b", "\x1b[2J", "\n", "é", "\u202e", "\uffff", "\U0001f600", "..", "../../etc/passwd", "%00",
    "FP32", "BF16", "BOOL", "INT64", "fp16", "raw", "forward", "backward", "tensor", "dict", "list", "ffn.0", "ffn.*",
    "::1", "256.1.1.1", "127.0.0.1", "a..b", "NaN", "Infinity", "__class__", "{0.__class__}", "%s%n", "A" * 257,
    "9" * 400,
)  # fmt: skip
ODD_TOKENS: Final = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1", b"-0", b"01", b"1.", b".5", b"9" * 400, b"9" * 5000,
    b'"\\ud800"', b'"\\ud800\\udc00"', b'"\\u0000"', b'"\xff"', b'"\xed\xa0\x80"', b"null", b"true", b"{}", b"[]",
    b"[[]]", b"[" * 300, b"[" * 2000 + b"]" * 2000, b'{"a":' * 600, b"[" + b"0," * 3000 + b"0]",
    b"[" + b"[]," * 800 + b"[]]", b",", b":", b"=", b"#", b'"', b"'''", b"\n", b"\r", b"\xef\xbb\xbf",
    b"18446744073709551616", b"9223372036854775808", b"inf", b"nan", b"2020-13-01", b"1979-05-27T07:32:00Z",
    b"a." * 1500, b"[[a]]\n", b"[a]\n", b"0x7f", b"1_000",
)  # fmt: skip
_PREFIX: Final = struct.Struct("<II")


def mutate_bytes(data: bytes, dice: random.Random) -> bytes:
    """Some blind changes."""
    changed = bytearray(data)
    for _ in range(1 << dice.randrange(5)):
        _BLIND[dice.randrange(len(_BLIND))](changed, dice)
    return bytes(changed)


def mutate_text(data: bytes, dice: random.Random) -> bytes:
    """Blind changes, or odd tokens in the place of tokens."""
    if dice.randrange(4) == 0:
        return mutate_bytes(data, dice)
    for _ in range(dice.randrange(1, 4)):
        start = dice.randrange(len(data) + 1)
        stop = min(len(data), start + dice.choice((0, 0, 1, 2, 4, 16)))
        data = data[:start] + dice.choice(ODD_TOKENS) + data[stop:]
    return data


def mutate_json(data: bytes, dice: random.Random) -> bytes:
    """Other values in the document, or other text."""
    if dice.randrange(3) == 0:
        return mutate_text(data, dice)
    try:
        return msgspec.json.encode(_change_tree(msgspec.json.decode(data), dice))
    except (ValueError, RecursionError, TypeError):
        return mutate_text(data, dice)


def mutate_msgpack(data: bytes, dice: random.Random) -> bytes:
    """Other values in the message, or other bytes."""
    if dice.randrange(3) == 0:
        return mutate_bytes(data, dice)
    try:
        return msgspec.msgpack.encode(_change_tree(msgspec.msgpack.decode(data), dice))
    except (ValueError, RecursionError, TypeError, OverflowError):
        return mutate_bytes(data, dice)


def mutate_frames(data: bytes, dice: random.Random) -> bytes:
    """`u16 chunking | frames`: other headers with lengths that fit, frames twice, in another order, cut, or spoilt."""
    frames = split_frames(data[2:])
    if not frames or dice.randrange(4) == 0:
        return mutate_bytes(data, dice)
    index = dice.randrange(len(frames))
    header, body = frames[index]
    choice = dice.randrange(8)
    if choice < 4:
        header = mutate_json(header, dice)
    elif choice == 4:
        body = mutate_bytes(body, dice)
    elif choice == 5:
        frames.insert(dice.randrange(len(frames) + 1), dice.choice(frames))
    elif choice == 6:
        body = body[: dice.randrange(len(body) + 1)]
    else:
        frames = frames * dice.choice((2, 3, 8))
    frames[index] = header, body
    joined = b"".join(_PREFIX.pack(len(head), len(tail)) + head + tail for head, tail in frames)
    if dice.randrange(8) == 0:
        joined = joined[: dice.randrange(len(joined) + 1)]
    return dice.randbytes(2) + joined


def mutate_datagrams(data: bytes, dice: random.Random) -> bytes:
    """`u8 source | u16 length | datagram`, again and again: other values in one, other sources, another order."""
    datagrams = split_datagrams(data)
    if not datagrams or dice.randrange(6) == 0:
        return mutate_bytes(data, dice)
    index = dice.randrange(len(datagrams))
    source, datagram = datagrams[index]
    choice = dice.randrange(8)
    if choice < 5:
        datagram = datagram[:5] + mutate_msgpack(datagram[5:], dice)
    elif choice == 5:
        source = dice.randrange(256)
    elif choice == 6:
        datagrams.insert(dice.randrange(len(datagrams) + 1), dice.choice(datagrams))
    else:
        datagrams = datagrams * dice.choice((2, 4))
    datagrams[index] = source, datagram
    return join_datagrams(datagrams)


def split_frames(data: bytes) -> list[tuple[bytes, bytes]]:
    """Header and body of each frame, as far as the lengths go."""
    frames = []
    while len(data) >= _PREFIX.size:
        header_bytes, body_bytes = _PREFIX.unpack_from(data)
        end = _PREFIX.size + header_bytes + body_bytes
        frames.append((data[_PREFIX.size : _PREFIX.size + header_bytes], data[_PREFIX.size + header_bytes : end]))
        data = data[end:]
    return frames


def split_datagrams(data: bytes) -> list[tuple[int, bytes]]:
    """Source and content of each datagram; a last one that is cut off is given as far as it goes."""
    datagrams = []
    while len(data) >= 3:
        length = int.from_bytes(data[1:3], "little")
        datagrams.append((data[0], data[3 : 3 + length]))
        data = data[3 + length :]
    return datagrams


def join_datagrams(datagrams: list[tuple[int, bytes]]) -> bytes:
    """The inverse of `split_datagrams`."""
    return b"".join(
        bytes([source]) + len(each[:65535]).to_bytes(2, "little") + each[:65535] for source, each in datagrams
    )


# ------------------------------------------------------------------------------------------------- trees


def _change_tree(tree: Any, dice: random.Random) -> Any:
    for _ in range(dice.randrange(1, 4)):
        tree = _change_one(tree, dice)
    return tree


def _change_one(tree: Any, dice: random.Random) -> Any:
    """Walk down at random and change the value that the walk ends at."""
    if isinstance(tree, dict) and tree and dice.randrange(5):
        key = dice.choice(list(tree))
        if dice.randrange(12) == 0:
            return {each: value for each, value in tree.items() if each != key}
        return {**tree, key: _change_one(tree[key], dice)}
    if isinstance(tree, list) and tree and dice.randrange(5):
        index = dice.randrange(len(tree))
        choice = dice.randrange(12)
        if choice == 0:
            return tree[:index] + tree[index + 1 :]
        if choice == 1:
            return tree[:index] + [tree[index]] * dice.choice((2, 3, 20, 300)) + tree[index + 1 :]
        return [*tree[:index], _change_one(tree[index], dice), *tree[index + 1 :]]
    return _odd_value(tree, dice)


def _odd_value(value: Any, dice: random.Random) -> Any:
    if isinstance(value, bytes) and dice.randrange(3):
        return mutate_bytes(value, dice)
    if isinstance(value, int) and dice.randrange(3) == 0:
        return min(value + dice.choice((-1, 1, 2, 1000)), 2**64 - 1)
    choice = dice.randrange(8)
    if choice < 3:
        return dice.choice(ODD_NUMBERS)
    if choice < 5:
        return dice.choice(ODD_TEXTS)
    if choice == 5:
        return dice.choice((None, True, False, [], {}, [[]], {"": 0}))
    if choice == 6:
        return value * dice.choice((2, 10)) if isinstance(value, str | bytes) else [value]
    for _ in range(dice.choice((1, 5, 40, 400))):
        value = [value] if dice.randrange(2) else {"items": value}
    return value


# ------------------------------------------------------------------------------------------------- bytes


def _flip(data: bytearray, dice: random.Random) -> None:
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _set(data: bytearray, dice: random.Random) -> None:
    if data:
        data[dice.randrange(len(data))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))


def _set_number(data: bytearray, dice: random.Random) -> None:
    size = dice.choice((2, 4, 8))
    if len(data) >= size:
        start = dice.randrange(len(data) - size + 1)
        number = int(dice.choice(ODD_NUMBERS[:36])) % (1 << 8 * size)
        data[start : start + size] = number.to_bytes(size, dice.choice(("little", "big")))


def _insert(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data) + 1)
    data[start:start] = dice.randbytes(dice.choice((1, 1, 2, 4, 16)))


def _delete(data: bytearray, dice: random.Random) -> None:
    if data:
        start = dice.randrange(len(data))
        del data[start : start + dice.choice((1, 1, 2, 4, 16, 64))]


def _repeat(data: bytearray, dice: random.Random) -> None:
    if data:
        start = dice.randrange(len(data))
        part = data[start : start + dice.choice((1, 4, 16, 64))]
        data[start:start] = part * dice.choice((1, 2, 16))


def _cut(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data) + 1) :]


_BLIND: Final = (_flip, _flip, _set, _set, _set_number, _insert, _delete, _repeat, _cut)

MUTATORS: Final[dict[str, Mutator]] = {
    "bytes": mutate_bytes,
    "text": mutate_text,
    "json": mutate_json,
    "msgpack": mutate_msgpack,
    "frames": mutate_frames,
    "datagrams": mutate_datagrams,
}
