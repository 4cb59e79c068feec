"""What we send to others: functions that make a request once its id, sender and token are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from p2pmoe.dht.tokens import AMPLIFICATION
from p2pmoe.protocol.datagrams import MAX_DATAGRAM_BYTES, Find, Page, Ping, Prove, Request, Store

PADDED_BYTES: Final = MAX_DATAGRAM_BYTES // AMPLIFICATION
FIND_BYTES: Final = 45
"""What a Find takes besides its sender and its padding, a few bytes short."""

MakeRequest = Callable[[bytes, bytes, bytes], Request]
"""`(call id, sender, token)` to a request."""


def ping_message(call_id: bytes, sender: bytes, _token: bytes) -> Request:
    """A Ping; its padding lets the answer carry the address it came from."""
    return Ping(call_id, sender, bytes(16))


def prove_message(call_id: bytes, sender: bytes, _token: bytes) -> Request:
    """A Prove; its padding lets the answer carry a signature."""
    return Prove(call_id, sender, bytes(40))


def find_message(key: bytes, want: int) -> MakeRequest:
    """A Find; without a token it is padded, so that three times its length is a whole datagram."""

    def make(call_id: bytes, sender: bytes, token: bytes) -> Request:
        padding = b"" if token else bytes(PADDED_BYTES - FIND_BYTES - len(sender))
        return Find(call_id, sender, token, key, want, padding)

    return make


def page_message(key: bytes, index: int) -> MakeRequest:
    """A Page."""
    return lambda call_id, sender, token: Page(call_id, sender, token, key, index)


def store_message(key: bytes, records: list[bytes]) -> MakeRequest:
    """A Store of raw records, together at most one page."""
    return lambda call_id, sender, token: Store(call_id, sender, token, key, records)
