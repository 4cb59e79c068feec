"""Settings that cannot work together are refused when they are read, with both keys named."""

from __future__ import annotations

import re

import pytest

from p2pmoe import NodeConfig, config_rules
from p2pmoe.config import BatchingConfig, DHTConfig
from p2pmoe.dht.validation import MAX_TTL_S
from p2pmoe.errors import ConfigError

ALICE = "a" * 32
BOB = "b" * 32


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("[dht]\nttl_s = 10", ["dht.ttl_s = 10", "dht.refresh_s = 20"]),
        ("[dht]\nttl_s = 60\nrefresh_s = 50", ["dht.ttl_s = 60", "dht.refresh_s = 50"]),  # late by a fifth, it is gone
        ("[dht]\nttl_s = 3601", ["dht.ttl_s = 3601", "3600"]),
        (
            "[batching]\nmin_batch_size = 9\nmax_batch_size = 8",
            ["batching.min_batch_size = 9", "batching.max_batch_size = 8"],
        ),
        ("[batching]\nmin_batch_size = 2", ["batching.min_batch_size = 2", "batching.max_queue_delay_ms = 0"]),
        ("[optimizer]\ndecay = 'cosine'", ["optimizer.decay", "optimizer.total_steps"]),
        (
            "[optimizer]\ndecay = 'linear'\ntotal_steps = 5\nwarmup_steps = 5",
            ["optimizer.total_steps = 5", "optimizer.warmup_steps = 5"],
        ),
        ("devices = []", ["devices"]),
        (f"[access]\nallow = ['{ALICE}']\ndeny = ['{ALICE}', '{BOB}']", ["access.allow", "access.deny"]),
        ("identity_path = 'a'\n[dht]\nstate_path = 'a'", ["identity_path", "dht.state_path"]),
        ("[access]\nswarm_key_path = 'a'\n[admin]\ntoken_path = 'a'", ["access.swarm_key_path", "admin.token_path"]),
        (
            "[limits]\nmax_source_connections = 513",
            ["limits.max_source_connections = 513", "limits.max_connections = 512"],
        ),
        (
            "[limits]\nmax_source_handshakes_per_s = 101",
            ["limits.max_source_handshakes_per_s = 101", "limits.max_handshakes_per_s = 100"],
        ),
        (
            "[limits]\nmax_body_bytes = 2000\nmax_exchange_bytes = 1000",
            ["limits.max_body_bytes = 2000", "limits.max_exchange_bytes = 1000"],
        ),
    ],
)
def test_what_cannot_work_together_is_refused_with_both_keys(text: str, keys: list[str]) -> None:
    with pytest.raises(ConfigError, match=re.escape(keys[0])) as caught:
        NodeConfig.parse(text, source="my/node.toml")
    assert str(caught.value).startswith("my/node.toml: ")
    assert all(key in str(caught.value) for key in keys), caught.value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[dht]\nttl_s = 3600\nrefresh_s = 1200",
        "[dht]\nttl_s = 30",
        "[batching]\nmin_batch_size = 8\nmax_queue_delay_ms = 5.0",
        "[optimizer]\nwarmup_steps = 100\ntotal_steps = 10",  # no decay: nothing to be left out
        f"[access]\nallow = ['{ALICE}', '{BOB}']\ndeny = ['{ALICE}']",
        "[limits]\nmax_connections = 10",  # whoever lowers one limit need not lower those that it bounds anyway
        "[limits]\nmax_exchange_bytes = 1000",
    ],
)
def test_what_works_is_taken(text: str) -> None:
    NodeConfig.parse(text)


def test_settings_made_in_python_are_looked_at_too() -> None:
    with pytest.raises(ConfigError, match=r"dht\.refresh_s = 20 is too long for dht\.ttl_s = 5"):
        NodeConfig(dht=DHTConfig(ttl_s=5.0))
    with pytest.raises(ConfigError, match=r"batching\.min_batch_size = 5000"):
        NodeConfig(batching=BatchingConfig(min_batch_size=5000))


def test_the_rules_know_what_storers_take() -> None:
    assert config_rules.MAX_TTL_S == MAX_TTL_S
