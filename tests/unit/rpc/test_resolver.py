"""Names become addresses: within a time limit, one look-up at a time, on no loop's account."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
from swarm_kit import WAIT_S

from p2pmoe.errors import NameLookupError
from p2pmoe.rpc.resolver import MAX_ADDRESSES, MAX_LOOKUPS, Resolver, host_of


def answering(*hosts: str):
    """A resolver of the system that knows every name."""

    def getaddrinfo(name, port, **options):
        found = []
        for host in hosts:
            bare, _, scope = host.partition("%")
            if ":" in host:
                found.append((socket.AF_INET6, socket.SOCK_DGRAM, 17, "", (bare, 0, 0, int(scope or 0))))
            else:
                found.append((socket.AF_INET, socket.SOCK_DGRAM, 17, "", (host, 0)))
        return found

    return getaddrinfo


async def test_all_addresses_of_a_name_in_their_order_each_in_its_one_spelling():
    resolver = Resolver(answering("2001:DB8::1", "::ffff:192.0.2.7", "192.0.2.7", "fe80::1%4"))
    expected = ["2001:db8::1", "192.0.2.7", "fe80::1%4"]
    assert await resolver.addresses("alice.example", timeout_s=WAIT_S) == expected
    assert await asyncio.to_thread(resolver.addresses_blocking, "alice.example", timeout_s=WAIT_S) == expected


async def test_an_address_is_not_looked_up():
    resolver = Resolver(lambda *_, **__: pytest.fail("asked"))
    assert await resolver.addresses("[::ffff:127.0.0.1]", timeout_s=WAIT_S) == ["127.0.0.1"]
    assert resolver.addresses_blocking("0x7f.1", timeout_s=WAIT_S) == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"), "'no.such' does not resolve: Name or service not known"),
        (UnicodeError("label too long"), "'no.such' does not resolve: label too long"),
        (None, "'no.such' does not resolve: it has no address"),
    ],
)
async def test_a_name_that_does_not_resolve_says_so(fault, said):
    def getaddrinfo(*_, **__):
        if fault is not None:
            raise fault
        return []

    resolver = Resolver(getaddrinfo)
    with pytest.raises(NameLookupError, match=said):
        await resolver.addresses("no.such", timeout_s=WAIT_S)
    with pytest.raises(NameLookupError, match=said):
        resolver.addresses_blocking("no.such", timeout_s=WAIT_S)


async def test_a_name_server_that_is_silent_holds_nobody_up_and_is_asked_once(no_new_threads):
    asked: list[str] = []
    answer = threading.Event()

    def getaddrinfo(name, port, **options):
        asked.append(name)
        assert answer.wait(WAIT_S)
        return answering("192.0.2.7")(name, port)

    resolver = Resolver(getaddrinfo)
    for _ in range(3):
        with pytest.raises(NameLookupError, match="no answer of the name server within"):
            await resolver.addresses("slow.example", timeout_s=0.01)
    with pytest.raises(NameLookupError, match="no answer"):
        resolver.addresses_blocking("Slow.Example.", timeout_s=0.01)
    assert asked == ["slow.example"]
    waiting = asyncio.create_task(resolver.addresses("slow.example", timeout_s=WAIT_S))
    await asyncio.sleep(0)
    answer.set()
    assert await waiting == ["192.0.2.7"]


async def test_no_more_than_so_many_threads_wait_for_name_servers(no_new_threads):
    answer = threading.Event()

    def getaddrinfo(name, port, **options):
        assert answer.wait(WAIT_S)
        return [each for number in range(100) for each in answering(f"192.0.2.{number}")(name, port)]

    resolver = Resolver(getaddrinfo)
    waiting = [asyncio.create_task(resolver.addresses(f"n{i}.example", timeout_s=WAIT_S)) for i in range(MAX_LOOKUPS)]
    await asyncio.sleep(0)
    with pytest.raises(NameLookupError, match=f"{MAX_LOOKUPS} names still wait"):
        await resolver.addresses("one.more.example", timeout_s=WAIT_S)
    answer.set()
    assert {len(found) for found in await asyncio.gather(*waiting)} == {MAX_ADDRESSES}


@pytest.mark.parametrize(
    ("address", "host"),
    [
        (("127.0.0.1", 1), "127.0.0.1"),
        (("::ffff:127.0.0.1", 1, 0, 0), "127.0.0.1"),
        (("fe80::1", 1, 0, 4), "fe80::1%4"),
        (("fe80::1%eth0", 1, 0, 4), "fe80::1%eth0"),
        (("2001:db8::1", 1, 0, 4), "2001:db8::1"),
    ],
)
def test_the_host_of_a_sockets_address(address, host):
    assert host_of(address) == host
