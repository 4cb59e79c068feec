"""Experts of a closed swarm: members declare within their scope, and readers see nothing beyond it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from p2pmoe.config import DHTConfig
from p2pmoe.dht.node import DHTNode
from p2pmoe.errors import DelegationError
from p2pmoe.experts.bundles import Bundle, encode_bundle
from p2pmoe.experts.children import children_of
from p2pmoe.experts.directory import ExpertDirectory
from p2pmoe.identity import Identity
from p2pmoe.protocol.delegations import delegate, format_delegation
from p2pmoe.protocol.records import key_of, sign_record
from p2pmoe.types import Endpoint

OWNER = Identity.from_seed(b"owner".ljust(32, b"\0"))
HERE = Endpoint("127.0.0.1", 8080)
FFN = "ab" * 32


@pytest.fixture
def make_directory(tmp_path):
    nodes: list[DHTNode] = []

    def make(
        name: str, *, scope: str | None = "", owner: bytes | None = OWNER.public_key, **options
    ) -> ExpertDirectory:
        identity = Identity.from_seed(name.encode().ljust(32, b"\0"))
        path = None
        if scope is not None:
            path = tmp_path / f"{name}.txt"
            given = delegate(
                OWNER, "p2pmoe", identity.public_key, expires_at_ms=int(time.time() + 3600) * 1000, scope=scope
            )
            path.write_text(format_delegation(given, identity.public_key, "p2pmoe", ""))
        config = DHTConfig(
            initial_peers=(nodes[0].dht_address,) if nodes else (),
            owner=owner.hex() if owner else None,
            delegation_path=str(path) if path else None,
        )
        nodes.append(DHTNode(identity, config, **options))
        nodes[-1].start()
        return ExpertDirectory(nodes[-1])

    yield make
    for node in reversed(nodes):
        node.close()


async def test_members_declare_within_their_scope_and_are_found(make_directory):
    alice = make_directory("alice")
    bob = make_directory("bob", scope="ffn.3.")
    carol = make_directory("carol", scope=None, client_mode=True)
    await alice.declare({f"ffn.0.{j}": FFN for j in range(4)}, HERE)
    await bob.declare({f"ffn.3.{j}": FFN for j in range(4)}, HERE)
    found = await carol.find_experts("ffn.*")
    assert [(record.uid, record.scope) for record in found] == [
        *((f"ffn.0.{j}", "") for j in range(4)),
        *((f"ffn.3.{j}", "ffn.3.") for j in range(4)),
    ]
    with pytest.raises(DelegationError, match=r"covers ffn\.3\.\*, not ffn\.4\.0"):
        await bob.declare({"ffn.3.9": FFN, "ffn.4.0": FFN}, HERE)
    with pytest.raises(DelegationError):
        await bob.declare({"ffn.3": FFN}, HERE)
    assert len(bob.declared_uids) == 4, "a refused declaration changes nothing"
    await bob.withdraw(["ffn.3.0"])
    carol.invalidate()
    assert len(await carol.find_experts("ffn.3.*")) == 3
    assert carol.undelegated_records == 0


async def test_somebody_without_a_delegation_is_neither_stored_nor_found(make_directory):
    alice = make_directory("alice")
    mallory = make_directory("mallory", scope=None, owner=None)
    # Every other node refuses; mallory's own copy is handed to whoever asks it.
    await mallory.declare({"ffn.0.0": FFN}, HERE)
    assert len(mallory.dht.server.storage) == 3
    assert len(alice.dht.server.storage) == 0
    assert await alice.find_experts("ffn.*") == []
    assert alice.undelegated_records > 0


async def test_a_full_prefix_fits_beside_the_delegation(make_directory):
    alice = make_directory("alice", scope="ffn.")
    carol = make_directory("carol", scope=None, client_mode=True)
    await alice.declare({f"ffn.{7 * j}": FFN for j in range(2000)}, HERE)
    assert len(await carol.find_experts("ffn.*")) == 2000


@pytest.mark.parametrize(
    ("prefix", "scope", "digest", "children", "kept"),
    [
        ("ffn.", None, "", (1, 3), {1, 3}),
        ("ffn.", "", "", (1, 3), {1, 3}),
        ("ffn.", "ffn.", FFN, (1, 3), {1, 3}),
        ("ffn.", "ffn.3.", "", (1, 3), {3}),
        ("ffn.", "ffn.3.", FFN, (1, 3), set()),
        ("ffn.", "ffn.3.7.", "", (3, 7), {3}),
        ("ffn.3.", "ffn.3.", FFN, (1, 3), {1, 3}),
        ("ffn.3.", "ffn.4.", FFN, (1, 3), set()),
        ("ffn.3.", "ffn.33.", "", (3,), set()),
    ],
)
def test_above_its_scope_a_member_names_only_the_way_there(prefix, scope, digest, children, kept):
    value = encode_bundle(Bundle(HERE, digest, children))
    record = sign_record(OWNER, key_of("p2pmoe", prefix), value, sequence=1, expires_at_ms=1)
    assert set(children_of([replace(record, scope=scope)], prefix)) == kept
