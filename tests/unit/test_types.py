"""Small values: endpoints and addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.config import parse_host_port
from p2pmoe.errors import ConfigError
from p2pmoe.types import Endpoint, canonical_host, format_host_port, is_host, is_loopback, source_of


def test_an_endpoint_carries_its_scheme_and_its_peers_key() -> None:
    endpoint = Endpoint("alice.example", 80)
    assert endpoint.url == str(endpoint) == "http://alice.example:80"
    assert Endpoint("::1", 443, "https").url == "https://[::1]:443"
    keyed = endpoint.with_public_key(b"k" * 32)
    assert keyed.public_key == b"k" * 32
    assert keyed != endpoint
    assert len({endpoint, keyed, Endpoint("alice.example", 80)}) == 2


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("127.0.0.1:31337", ("127.0.0.1", 31337)),
        (" host:1 ", ("host", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:9", ("fe80::1%eth0", 9)),
        ("[FE80:0::1%eth0]:9", ("fe80::1%eth0", 9)),
        ("[::ffff:127.0.0.1]:7", ("127.0.0.1", 7)),
        ("[::FFFF:7f00:1]:7", ("127.0.0.1", 7)),
        ("127.0.0.1:00080", ("127.0.0.1", 80)),
        ("127.1:80", ("127.0.0.1", 80)),
        ("0x7f.1:80", ("127.0.0.1", 80)),
        ("2130706433:80", ("127.0.0.1", 80)),
        ("Node.Example.ORG.:80", ("node.example.org", 80)),
        ("bücher.example:80", ("xn--bcher-kva.example", 80)),
        ("my_service:80", ("my_service", 80)),
        ("\t192.0.2.1:80\n", ("192.0.2.1", 80)),
    ],
)
def test_addresses_are_read(text: str, pair: tuple[str, int]) -> None:
    assert parse_host_port(text) == pair
    assert parse_host_port(format_host_port(*pair)) == pair


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        ":31337",
        "host:0",
        "host:65536",
        "host:-1",
        "host:1.5",
        "::1:80",
        "h:１",
        "h:+5",
        "http://127.0.0.1:80",
        "a b:80",
        "a..b:80",
        "256.1.1.1:80",
        "1.2.3.4.5:80",
        "[zz::1]:80",
        "[::1%e t]:80",
        "-a:80",
        f"{'a' * 64}:80",
        "\x00:80",
        "host :80x",
        "08.1.1.1:80",
        "[]:80",
        "user@host:80",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"initial peer .*31337"):
        parse_host_port(text, what="initial peer")


@given(st.text(max_size=20))
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    try:
        host, port = parse_host_port(text)
    except ConfigError:
        return
    assert host
    assert 1 <= port <= 65535


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("not an address", "not an address"),
        ("x" * 1000, "x" * 64),
    ],
)
def test_what_is_counted_together(address: str, source: str) -> None:
    assert source_of(address) == source


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("2001:db8::1%eth0", "2001:db8::1"),
        ("[::1]", "::1"),
        ("LOCALHOST", "localhost"),
        ("alice.example.", "alice.example"),
        ("127.0.0.1.", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("１２７.0.0.1", "127.0.0.1"),
        (" 10.0.0.1 ", "10.0.0.1"),
    ],
)
def test_a_host_has_one_spelling_by_which_peers_are_told_apart(one: str, other: str) -> None:
    assert canonical_host(one) == canonical_host(other) == other
    assert len({Endpoint(one, 1), Endpoint(other, 1)}) == 1
    assert Endpoint(one, 1).url == Endpoint(other, 1).url
    assert is_loopback(one) == is_loopback(other)


@given(st.text(max_size=40))
def test_a_spelling_is_its_own_spelling(text: str) -> None:
    host = canonical_host(text)
    if is_host(text):
        assert canonical_host(host) == host
        assert is_host(host)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost.", "127.1", "127.255.0.1", "::1", "::ffff:127.0.0.1", "0x7f000001"]
)
def test_what_stays_on_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example", "128.0.0.1", "::ffff:192.0.2.1", "127.0.0.1.example", "", "::"])
def test_what_does_not(host: str) -> None:
    assert not is_loopback(host)
