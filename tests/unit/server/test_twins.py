"""Who may announce a uid that somebody else announces: the rules, and what is asked and said on the way."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from swarm_kit import WAIT_S

from p2pmoe.errors import (
    AccessDeniedError,
    BootstrapError,
    DecodeError,
    OverloadedError,
    PeerIdentityError,
    PeerUnreachableError,
    UnknownExpertError,
)
from p2pmoe.experts.directory import Children, Provider
from p2pmoe.server import announcer as announcer_module
from p2pmoe.server import twin_watch
from p2pmoe.server.announcer import Announcer
from p2pmoe.server.twin_watch import TwinWatch
from p2pmoe.server.twins import Answer, Twins
from p2pmoe.types import Endpoint, PeerId

A, B, C = (PeerId(name) for name in ("a" * 32, "b" * 32, "c" * 32))
US = Endpoint("192.0.2.1", 1)


def provider(peer_id: PeerId, digest: str = "aa", host: str | None = None) -> Provider:
    return Provider(peer_id, Endpoint(host or peer_id[0], 2), digest, math.inf, 1)


def look(twins: Twins, *peers: PeerId, answer: Answer = "hosts") -> tuple[list[str], list[str]]:
    """What a look at one uid changes: announced and yielded."""
    verdict = twins.look({"ffn.0": [provider(peer) for peer in peers]}, dict.fromkeys(peers, answer))
    return verdict.announce, verdict.yielded


# ---------------------------------------------------------------------------------------------- the rules


def test_nobody_else_is_there() -> None:
    twins = Twins(B, ["ffn.0"])
    assert look(twins) == (["ffn.0"], [])
    assert (twins.announced, twins.undecided, twins.held) == (["ffn.0"], ["ffn.0"], [])
    assert look(twins) == ([], [])
    assert (twins.announced, twins.undecided, twins.held) == (["ffn.0"], [], ["ffn.0"])


@pytest.mark.parametrize("other", [A, C])
def test_somebody_was_there_before(other: PeerId) -> None:
    twins = Twins(B, ["ffn.0"])
    for _ in range(5):
        assert look(twins, other) == ([], [])
        assert twins.waiting == ["ffn.0"]
    assert look(twins) == (["ffn.0"], []), "it has gone"


@pytest.mark.parametrize("other", [A, C])
def test_what_is_held_is_kept(other: PeerId) -> None:
    twins = Twins(B, ["ffn.0"])
    look(twins)
    look(twins)
    for _ in range(5):
        assert look(twins, other) == ([], [])
        assert twins.held == ["ffn.0"]


def test_of_two_that_began_at_once_the_larger_id_yields_at_once() -> None:
    small, large = Twins(A, ["ffn.0"]), Twins(B, ["ffn.0"])
    assert look(small) == look(large) == (["ffn.0"], [])
    assert look(small, B) == ([], [])
    assert look(large, A) == ([], ["ffn.0"])
    assert look(small) == ([], [])
    assert small.held == ["ffn.0"]


def test_the_smaller_id_yields_to_who_does_not() -> None:
    twins = Twins(A, ["ffn.0"])
    look(twins)
    assert [look(twins, B) for _ in range(4)] == [([], []), ([], []), ([], ["ffn.0"]), ([], [])]


@pytest.mark.parametrize("seed", range(30))
def test_any_number_that_begin_at_once_end_with_one(seed: int) -> None:
    """Looks in any order within an interval each, as jitter makes them; what was announced before a look is seen."""
    print("seed", seed)
    dice = random.Random(seed)
    nodes = {PeerId(name * 32): Twins(PeerId(name * 32), ["ffn.0"]) for name in "abcd"[: dice.randint(2, 4)]}
    blind = dice.randint(0, 2)  # the first looks see nobody: records are on their way
    turns = sorted((turn + dice.uniform(-0.2, 0.2), peer) for peer in nodes for turn in range(8))
    for number, (_, peer) in enumerate(turns):
        others = [other for other, twins in nodes.items() if other != peer and twins.announced]
        look(nodes[peer], *([] if number < blind * len(nodes) // 2 else others))
    assert [twins.announced for twins in nodes.values()].count(["ffn.0"]) == 1
    assert [twins.held for twins in nodes.values()].count(["ffn.0"]) == 1


def test_when_a_twin_counts_as_gone() -> None:
    for answers, announced_at in (
        (["gone"], 1),
        (["refused"], 1),  # a closed port at our start: most often the node that we are now
        (["silent"] * 3, 3),  # a hung host, a lost packet
        (["hosts", "gone"], 2),
        (["hosts", "refused", "refused"], 3),  # it may be restarting
        (["hosts", "refused", "hosts", "refused", "refused"], 5),
        (["hosts", "silent", "silent", "hosts", "silent", "silent", "silent"], 7),
    ):
        twins = Twins(B, ["ffn.0"])
        announced = [bool(look(twins, A, answer=answer)[0]) for answer in answers]  # type: ignore[arg-type]
        assert announced == [False] * (announced_at - 1) + [True], answers


def test_one_that_is_gone_does_not_hide_one_that_is_there() -> None:
    twins = Twins(B, ["ffn.0", "ffn.1"])
    both = {"ffn.0": [provider(A), provider(C)], "ffn.1": [provider(A)]}
    verdict = twins.look(both, {A: "gone", C: "hosts"})
    assert (verdict.announce, twins.waiting) == (["ffn.1"], ["ffn.0"])
    assert verdict.by_uid["ffn.0"].peer_id == C
    assert twins.look({"ffn.0": [provider(A)]}, {}).announce == [], "who was not asked counts as there"


# ----------------------------------------------------------------------------------------- looking and asking


class Swarm:
    """A directory and its peers, as far as a watch sees them."""

    def __init__(self) -> None:
        self.providers: dict[str, list[Provider]] = {}
        self.answers: dict[str, Exception | None] = {}
        self.asked: list[str] = []
        self.looks = 0
        self.broken = False
        self.declared: dict[str, str] = {}
        self.withdrawn: list[str] = []

    async def get_prefixes(self, prefixes: Sequence[str], *, fresh: bool) -> dict[str, Children]:
        assert fresh
        assert len(set(prefixes)) == len(prefixes)
        self.looks += len(prefixes)
        if self.broken:
            raise BootstrapError("nobody is there")
        children: dict[str, dict[int, tuple[Provider, ...]]] = {prefix: {} for prefix in prefixes}
        for uid, providers in self.providers.items():
            prefix, _, number = uid.rpartition(".")
            if f"{prefix}." in children:
                children[f"{prefix}."][int(number)] = tuple(providers)
        return children  # type: ignore[return-value]

    async def get_json(self, endpoint: Endpoint, path: str) -> Any:
        self.asked.append(f"{endpoint.host}{path}")
        error = self.answers.get(endpoint.host)
        if error is not None:
            raise error
        return {}

    async def declare(self, schemas: Mapping[str, str], endpoint: Endpoint, ttl_s: float) -> None:
        self.declared = dict(schemas)

    async def withdraw(self, uids: Sequence[str]) -> None:
        self.withdrawn += uids


def watch(swarm: Swarm, *uids: str, peer_id: PeerId = B) -> TwinWatch:
    schemas = dict.fromkeys(uids or ("ffn.0.0", "ffn.0.1", "ffn.1.0"), "aa")
    return TwinWatch(swarm, swarm.get_json, peer_id, lambda: US, schemas)  # type: ignore[arg-type]


def refused() -> PeerUnreachableError:
    error = PeerUnreachableError("closed")
    error.__cause__ = ConnectionRefusedError(111, "refused")
    return error


async def test_a_look_costs_a_query_a_prefix_and_a_request_a_peer(caplog: pytest.LogCaptureFixture) -> None:
    swarm = Swarm()
    swarm.providers = {"ffn.0.0": [provider(A)], "ffn.0.1": [provider(A)], "ffn.1.0": [provider(B)], "ffn.9.9": []}
    looking = watch(swarm)
    assert await looking.look() == []
    assert swarm.looks == 2
    assert len(swarm.asked) == 1
    assert swarm.asked[0].startswith("a/p2pmoe/v1/experts/ffn.0.")
    assert (looking.announced, looking.waiting) == (["ffn.1.0"], ["ffn.0.0", "ffn.0.1"])
    assert looking.is_settling
    await looking.look()
    assert not looking.is_settling
    assert caplog.messages == [
        f"2 of 3 experts wait, because others serve them already, e.g. ffn.0.0 by peer {A} at http://a:2: ffn.0.0, "
        "ffn.0.1. They are announced when nobody else serves them; experts.twins = 'serve' announces them at once"
    ]
    caplog.clear()
    caplog.set_level("INFO")
    swarm.providers = {}
    await looking.look()
    assert looking.waiting == []
    assert caplog.messages == ["announcing 2 experts that nobody else serves any more: ffn.0.0, ffn.0.1"]


async def test_a_node_that_has_nothing_to_announce_says_so(caplog: pytest.LogCaptureFixture) -> None:
    swarm = Swarm()
    swarm.providers = {f"ffn.0.{number}": [provider(A)] for number in range(5)}
    looking = watch(swarm, *swarm.providers)
    await looking.look()
    assert looking.announced == []
    assert "5 of 5 experts wait" in caplog.messages[0]
    assert "ffn.0.0, ffn.0.1, ffn.0.2 and 2 more; this node announces nothing now" in caplog.messages[0]


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (None, True),
        (AccessDeniedError("no"), True),
        (OverloadedError("busy"), True),
        (DecodeError("what?"), True),
        (PeerUnreachableError("no answer in time"), True),
        (TimeoutError(), True),
        (UnknownExpertError("not here"), False),
        (PeerIdentityError("somebody else"), False),
        (refused(), False),
    ],
)
async def test_what_an_answer_means(error: Exception | None, waits: bool) -> None:
    swarm = Swarm()
    swarm.providers, swarm.answers = {"ffn.0.0": [provider(A)]}, {"a": error}
    looking = watch(swarm, "ffn.0.0")
    await looking.look()
    assert looking.waiting == ["ffn.0.0"] * waits


async def test_our_own_records_and_those_of_our_own_address_are_no_twins() -> None:
    swarm = Swarm()
    former = Provider(A, US, "aa", math.inf, 1)
    swarm.providers = {"ffn.0.0": [provider(B, host="elsewhere"), former], "ffn.0.1": [provider(A, "")]}
    looking = watch(swarm)
    await looking.look()
    assert looking.waiting == []
    assert swarm.asked == []


async def test_another_schema_is_no_twin_but_is_said(caplog: pytest.LogCaptureFixture) -> None:
    swarm = Swarm()
    swarm.providers = {"ffn.0.0": [provider(A, "bb")]}
    looking = watch(swarm, "ffn.0.0")
    for _ in range(3):
        await looking.look()
    assert looking.announced == ["ffn.0.0"]
    assert caplog.messages == [
        f"peer {A} at http://a:2 serves ffn.0.0 with another schema: callers take one of the two; are kind and "
        "hidden_dim the swarm's?"
    ]


async def test_the_one_that_was_there_says_once_that_a_twin_turned_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = Swarm()
    looking = watch(swarm)
    await looking.look()
    await looking.look()
    swarm.providers = {"ffn.0.0": [provider(A)], "ffn.0.1": [provider(A), provider(C)]}
    swarm.answers = {"c": refused()}
    for _ in range(3):
        await looking.look()
    assert looking.waiting == []
    assert caplog.messages == [
        f"peer {A} at http://a:2 serves ffn.0.0, ffn.0.1 as well, and came later: calls and updates may now go to "
        "experts that were not trained"
    ]
    assert swarm.asked.count("a/p2pmoe/v1/experts/ffn.0.0") == 1


async def test_a_crowd_of_keys_costs_a_bounded_number_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin_watch, "MAX_ASKED", 10)
    swarm = Swarm()
    swarm.providers = {"ffn.0.0": [provider(PeerId(f"{number:032}"), host=f"h{number}") for number in range(500)]}
    await watch(swarm).look()
    assert len(swarm.asked) == 10


# ------------------------------------------------------------------------------------------------ announcing


async def run_announcer(swarm: Swarm, refresh_s: float = 0.01) -> Announcer:
    schemas = dict.fromkeys(("ffn.0.0", "ffn.0.1"), "aa")
    announcer = Announcer(swarm, schemas, US, ttl_s=60.0, refresh_s=refresh_s, watch=watch(swarm, *schemas))  # type: ignore[arg-type]
    await announcer.start()
    return announcer


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the state is a list that grows
            await asyncio.sleep(0.001)


async def test_only_what_nobody_serves_is_announced_and_the_rest_when_it_has_gone() -> None:
    swarm = Swarm()
    swarm.providers = {"ffn.0.0": [provider(A)]}
    announcer = await run_announcer(swarm)
    assert swarm.declared == {"ffn.0.1": "aa"}
    assert announcer.waiting == ["ffn.0.0"]
    swarm.providers = {}
    await until(lambda: swarm.declared == {"ffn.0.0": "aa", "ffn.0.1": "aa"})
    await announcer.close()
    assert sorted(swarm.withdrawn) == ["ffn.0.0", "ffn.0.1"]


async def test_who_yields_withdraws_and_at_the_end_only_what_it_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcer_module, "_SETTLE_S", 0.01)
    swarm = Swarm()
    announcer = await run_announcer(swarm, refresh_s=60.0)
    swarm.providers = {"ffn.0.0": [provider(A)]}  # before the second look, for nothing has been awaited
    await until(lambda: swarm.looks == 2 and swarm.declared == {"ffn.0.1": "aa"})
    assert swarm.withdrawn == ["ffn.0.0"]
    await announcer.close()
    assert swarm.withdrawn == ["ffn.0.0", "ffn.0.1"]


async def test_where_nobody_can_look_nothing_new_is_announced_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(announcer_module, "_RETRY_S", 0.01)
    swarm = Swarm()
    swarm.broken = True
    announcer = await run_announcer(swarm)
    assert swarm.declared == {}
    swarm.broken = False
    await until(lambda: len(swarm.declared) == 2)
    swarm.broken, swarm.declared = True, {}
    await until(lambda: len(swarm.declared) == 2)
    await announcer.close()
    assert [line for line in caplog.messages if "could not declare" in line].count(
        "could not declare 2 experts: nobody is there; trying on"
    ) == len(caplog.messages)


async def test_it_looks_again_soon_while_nothing_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcer_module, "_SETTLE_S", 0.005)
    swarm = Swarm()
    announcer = await run_announcer(swarm, refresh_s=60.0)
    await until(lambda: swarm.looks == 2)
    await asyncio.sleep(0.03)
    assert swarm.looks == 2, "from then on with the records"
    await announcer.close()


def test_uids_of_the_same_prefix_are_one_query() -> None:
    uids = [f"ffn.{row}.{column}" for row, column in itertools.product(range(3), range(50))]
    swarm = Swarm()
    asyncio.run(watch(swarm, *uids).look())
    assert swarm.looks == 3
