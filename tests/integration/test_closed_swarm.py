"""A swarm with an owner and a secret, between real processes: `p2pmoe id`, `p2pmoe node`, `p2pmoe lookup`."""

import json
from pathlib import Path

import pytest
from cli_processes import Command, run_command

pytestmark = pytest.mark.timeout(150)


def make(*arguments: str | Path) -> dict:
    code, out, err = run_command("id", *map(str, arguments), "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.slow
def test_only_members_with_the_key_get_in_and_only_delegated_experts_are_found(tmp_path: Path) -> None:
    owner = make("new", tmp_path / "owner.pem")["public_key"]
    alice = make("new", tmp_path / "alice.pem")["public_key"]
    make("swarm-key", "new", tmp_path / "swarm.key")
    make("swarm-key", "new", tmp_path / "other.key")
    given = tmp_path / "alice.txt"
    make("delegate", tmp_path / "owner.pem", alice, "--scope", "ffn.0.", "--out", given)
    keys = ["--swarm-key", str(tmp_path / "swarm.key")]
    closed = [*keys, "--owner", owner]
    hosting = ["--hidden-dim", "8", "--torch-threads", "1", "--json"]

    delegated = ["--identity", str(tmp_path / "alice.pem"), "--delegation", str(given), "--experts", "ffn.0.[0:2]"]
    with Command("node", *closed, *delegated, *hosting) as first:
        description = json.loads(first.stdout.next())
        assert f"--owner {owner}" in description["join"]
        peers = ["--initial-peers", description["dht_address"]]
        # She has the key, and was not given leave: her own store holds what she says, nobody believes it.
        with Command("node", *keys, *peers, "--experts", "ffn.0.7", *hosting) as mallory:
            mallory.stdout.next()

            code, out, err = run_command("lookup", "ffn.*", *peers, *closed, "--json")

            assert code == 0, err
            found = json.loads(out)
            assert [(each["uid"], each["public_key"], each["delegated_scope"]) for each in found] == [
                ("ffn.0.0", alice, "ffn.0."),
                ("ffn.0.1", alice, "ffn.0."),
            ]
            assert "without a delegation of the swarm's owner were left out" in err

        for outsider in ([], ["--swarm-key", str(tmp_path / "other.key")]):
            code, out, err = run_command("lookup", "ffn.*", *peers, *outsider, P2PMOE_DHT_JOIN_TIMEOUT_S="0.5")
            assert (code, out) == (6, "")
            assert "a private swarm answers only those who have its key" in err


def test_a_node_with_a_delegation_for_somebody_else_does_not_start(tmp_path: Path) -> None:
    owner = make("new", tmp_path / "owner.pem")["public_key"]
    given = tmp_path / "alice.txt"
    make("delegate", tmp_path / "owner.pem", "ab" * 32, "--out", given)

    code, out, err = run_command("node", "--owner", owner, "--delegation", str(given))

    assert (code, out) == (4, "")
    assert "was not given by dht.owner to our key" in err
    assert "while starting: dht" in err
    assert err.count("\n") == 1
