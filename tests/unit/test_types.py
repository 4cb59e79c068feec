"""Small values: endpoints and addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.config import parse_host_port
from p2pmoe.errors import ConfigError
from p2pmoe.types import Endpoint, format_host_port, source_of


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
    ],
)
def test_addresses_are_read(text: str, pair: tuple[str, int]) -> None:
    assert parse_host_port(text) == pair
    assert parse_host_port(format_host_port(*pair)) == pair


@pytest.mark.parametrize(
    "text",
    ["", ":", "host", "host:", ":31337", "host:0", "host:65536", "host:-1", "host:1.5", "::1:80", "h:１", "h:+5"],
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
