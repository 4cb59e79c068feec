"""TLS records in a row: what one call reads and writes is not cut at the borders of records."""

from __future__ import annotations

import os
import ssl
import time

import pytest

from p2pmoe.identity import Identity
from p2pmoe.identity.certificate import install_certificate, make_certificate
from p2pmoe.rpc.http.tls import PinnedContext, server_context

ALICE = Identity.from_seed(b"alice".ljust(32, b"\0"))


def open_pair() -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A caller's and a node's end after their handshake, joined by memory."""
    context = server_context()
    install_certificate(context, ALICE, make_certificate(ALICE, time.time()))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = PinnedContext(ALICE.public_key).wrap_bio(down, up)
    node = context.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for end in (caller, node):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return caller, node


@pytest.mark.parametrize("size", [1, 16_384, 16_385, 1_000_000])
def test_everything_is_written_in_one_call_and_read_in_one(size: int) -> None:
    caller, node = open_pair()
    data = os.urandom(size)
    for sender, receiver in ((caller, node), (node, caller)):
        for given in (data, bytearray(data), memoryview(data)):
            assert sender.write(given) == size
            received = bytearray(size + 1)
            assert receiver.read(size + 1, received) == size
            assert received[:size] == data


def test_nothing_to_read_is_said_as_the_base_class_says_it() -> None:
    caller, node = open_pair()
    with pytest.raises(ssl.SSLWantReadError):
        node.read(10, bytearray(10))
    assert caller.write(b"") == 0
    caller.unwrap()
    assert node.read(10, bytearray(10)) == 0
