"""Standing: how evidence adds up, fades, and decides who is asked. Time is a number."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.client import standing as rules
from p2pmoe.client.standing import HALF_LIFE_S, SEVERAL, Standing
from p2pmoe.experts.directory import Provider
from p2pmoe.types import Endpoint, PeerId

ALICE, BOB, CAROL, DAVE = (PeerId(name) for name in ("alice", "bob", "carol", "dave"))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def standing(clock: Clock) -> Standing:
    return Standing(clock)


def providers(*names: str) -> tuple[Provider, ...]:
    return tuple(Provider(PeerId(name), Endpoint(name, 1), "digest", math.inf, 1) for name in names)


def order(standing: Standing, *names: str) -> list[str]:
    return [each.peer_id for each in standing.order(providers(*names))]


def shun(standing: Standing, peer_id: PeerId) -> None:
    while standing.note(peer_id, "broken_reply") != "shunned":
        pass


def test_nobody_is_suspected_at_first(standing: Standing) -> None:
    everybody = providers("bob", "alice")
    assert standing.order(everybody) is everybody
    assert standing.verdict(ALICE) == "good"
    assert standing.shunned_for_s(ALICE) == 0
    assert standing.snapshot() == []


def test_one_lie_puts_a_peer_last_and_the_third_shuns_it(standing: Standing, clock: Clock) -> None:
    assert standing.note(ALICE, "broken_reply") == "last"
    assert order(standing, "alice", "bob", "carol") == ["bob", "carol", "alice"]
    clock.now += 5
    assert standing.note(ALICE, "broken_reply") == "last"
    clock.now += 5
    assert standing.note(ALICE, "broken_reply") == "shunned"
    assert order(standing, "alice", "bob") == ["bob"]
    assert order(standing, "alice") == []
    assert standing.shunned_for_s(ALICE) == rules.SHUN_S
    (held,) = standing.snapshot()
    assert (held.peer_id, held.verdict, held.counts) == (ALICE, "shunned", {"broken_reply": 3})


def test_a_shunned_peer_comes_back_last_and_is_shunned_longer_for_the_next_lie(
    standing: Standing, clock: Clock
) -> None:
    shun(standing, ALICE)
    clock.now += rules.SHUN_S - 1
    assert standing.verdict(ALICE) == "shunned"
    clock.now += 1
    assert order(standing, "alice", "bob") == ["bob", "alice"]
    for doubled in (2, 4, 8):
        while standing.note(ALICE, "broken_reply") != "shunned":
            pass
        assert standing.shunned_for_s(ALICE) == pytest.approx(rules.SHUN_S * doubled)
        clock.now += standing.shunned_for_s(ALICE)


def test_shuns_are_never_longer_than_an_hour(standing: Standing, clock: Clock) -> None:
    for _ in range(40):
        shun(standing, ALICE)
        assert standing.shunned_for_s(ALICE) <= rules.MAX_SHUN_S
        clock.now += standing.shunned_for_s(ALICE)
    assert standing.verdict(ALICE) != "shunned"


def test_evidence_fades_and_is_forgiven(standing: Standing, clock: Clock) -> None:
    standing.note(ALICE, "broken_reply")
    forgiven_s = rules.HALF_LIFE_S * math.log2(1 / rules.LAST_AT)
    clock.now += forgiven_s - 1
    assert standing.verdict(ALICE) == "last"
    clock.now += 2
    assert standing.verdict(ALICE) == "good"
    for _ in range(1000):
        standing.note(BOB, "broken_reply")
    clock.now += 5 * rules.HALF_LIFE_S
    assert standing.verdict(BOB) == "good", "the score is capped, so even the worst is forgiven in time"


def test_non_finite_numbers_count_half(standing: Standing, clock: Clock) -> None:
    verdicts = []
    for _ in range(5):
        verdicts.append(standing.note(ALICE, "non_finite"))
        clock.now += 5
        assert standing.verdict(ALICE) == verdicts[-1]
    assert verdicts == ["last"] * 4 + ["shunned"]


def test_an_honest_peer_beside_one_liar_stays_good_however_often_they_meet(standing: Standing) -> None:
    for _ in range(1000):
        standing.note_contradiction(ALICE, BOB)
    assert standing.verdict(ALICE) == standing.verdict(BOB) == "good"
    assert all(each.score == pytest.approx(rules.CONTRADICTION) for each in standing.snapshot())


def test_who_contradicts_different_peers_sinks_and_they_do_not(standing: Standing) -> None:
    honest = [PeerId(f"honest-{index}") for index in range(20)]
    for index, peer_id in enumerate(honest):
        standing.note_contradiction(DAVE, peer_id)
        assert standing.verdict(DAVE) == ("good" if index == 0 else "last")
    assert {standing.verdict(peer_id) for peer_id in honest} == {"good"}
    assert standing.verdict(DAVE) == "last", "contradictions alone never shun: trained apart is no lie"
    assert standing.note(DAVE, "broken_reply") == "shunned", "with proof of a lie they do"


def test_opponents_are_bounded(standing: Standing) -> None:
    for index in range(10 * rules.MAX_OPPONENTS):
        standing.note_contradiction(DAVE, PeerId(f"peer-{index}"))
    assert len(standing._entries[DAVE].opponents) == rules.MAX_OPPONENTS


def test_a_flood_of_new_names_pushes_out_no_proof(standing: Standing, clock: Clock) -> None:
    shun(standing, ALICE)
    standing.note(BOB, "outvoted")
    standing.note(BOB, "outvoted")
    for index in range(2 * rules.MAX_PEERS):
        standing.note(PeerId(f"new-{index}"), "broken_reply")
        assert len(standing._entries) <= rules.MAX_PEERS
    assert standing.verdict(ALICE) == "shunned"
    assert standing.verdict(BOB) == "last"


def test_faded_entries_make_room_first(standing: Standing, clock: Clock) -> None:
    for index in range(rules.MAX_PEERS - 1):
        standing.note(PeerId(f"old-{index}"), "broken_reply")
    clock.now += 10 * rules.HALF_LIFE_S
    standing.note(ALICE, "non_finite")
    standing.note(BOB, "non_finite")
    assert set(standing._entries) == {ALICE, BOB}


def test_forgetting(standing: Standing) -> None:
    shun(standing, ALICE)
    standing.forget(ALICE)
    standing.forget(BOB)
    assert standing.verdict(ALICE) == "good"
    assert "0 peers" in repr(standing)


def test_the_worst_comes_first(standing: Standing) -> None:
    standing.note(ALICE, "non_finite")
    shun(standing, BOB)
    standing.note(CAROL, "outvoted")
    assert [each.peer_id for each in standing.snapshot()] == [BOB, CAROL, ALICE]
    assert "1 shunned" in repr(standing)


NAMES = st.sampled_from(["alice", "bob", "carol", "dave"])
EVENTS = st.one_of(
    st.tuples(st.just("note"), NAMES, st.sampled_from(sorted(rules.WEIGHTS))),
    st.tuples(st.just("contradict"), NAMES, NAMES),
    st.tuples(st.just("wait"), st.floats(0, 5000), st.none()),
)


@given(st.lists(EVENTS, max_size=60))
def test_whatever_happens_the_order_is_by_verdict_and_everything_is_forgiven(events: list[tuple]) -> None:
    clock = Clock()
    standing = Standing(clock)
    for kind, first, second in events:
        if kind == "note":
            standing.note(first, second)
        elif kind == "contradict":
            standing.note_contradiction(first, second)
        else:
            clock.now += first
        asked = standing.order(providers("alice", "bob", "carol", "dave"))
        verdicts = [standing.verdict(each.peer_id) for each in asked]
        assert verdicts == sorted(verdicts), "good before last"
        assert "shunned" not in verdicts
        assert len(asked) == 4 - sum(each.verdict == "shunned" for each in standing.snapshot())
    clock.now += rules.MAX_SHUN_S + 10 * rules.HALF_LIFE_S
    assert {standing.verdict(PeerId(name)) for name in ("alice", "bob", "carol", "dave")} == {"good"}


def test_readers_need_no_lock() -> None:
    standing = Standing(Clock())
    stop = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                standing.order(providers("alice", "bob"))
                standing.snapshot()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for index in range(2000):
        standing.note_contradiction(ALICE, PeerId(f"peer-{index % 40}"))
        standing.note(BOB, "non_finite")
        standing.forget(BOB)
    stop.set()
    for reader in readers:
        reader.join(5)
    assert not errors


# ------------------------------------------------------------------------------------------- single experts


def test_what_one_expert_did_is_held_against_that_expert(standing: Standing, clock: Clock) -> None:
    standing.note_experts(ALICE, ["ffn.0"], "broken_reply")
    assert (standing.verdict(ALICE, "ffn.0"), standing.verdict(ALICE, "ffn.1")) == ("last", "good")
    for _ in range(2):
        standing.note_experts(ALICE, ["ffn.0"], "broken_reply")
    assert (standing.verdict(ALICE, "ffn.0"), standing.verdict(ALICE, "ffn.1")) == ("shunned", "good")
    assert standing.verdict(ALICE) == "last", "a peer with a bad expert is looked at, and asked"
    assert (standing.shunned_for_s(ALICE), standing.shunned_for_s(ALICE, "ffn.0")) == (0.0, rules.SHUN_S)
    both = providers("alice", "bob")
    assert [each.peer_id for each in standing.order(both, "ffn.0")] == ["bob"]
    assert standing.order(both, "ffn.1") == both
    (held,) = standing.snapshot()
    assert (held.verdict, held.score, held.counts, held.experts) == (
        "last", 0.0, {"broken_reply": 3}, {"ffn.0": rules.SHUN_S},
    )  # fmt: skip
    clock.now += rules.SHUN_S
    assert standing.verdict(ALICE, "ffn.0") == "last"
    standing.note_experts(ALICE, ["ffn.0"], "broken_reply")
    assert standing.shunned_for_s(ALICE, "ffn.0") == pytest.approx(2 * rules.SHUN_S)
    standing.forget(ALICE)
    assert standing.verdict(ALICE, "ffn.0") == "good"
    assert standing.snapshot() == []


def test_many_bad_experts_are_one_count_and_never_shun_their_peer(standing: Standing) -> None:
    uids = [f"ffn.{index}" for index in range(100)]
    for _ in range(10):
        standing.note_experts(ALICE, uids, "broken_reply")
    assert {standing.verdict(ALICE, uid) for uid in uids} == {"shunned"}
    assert standing.verdict(ALICE) == "last"
    assert standing.verdict(ALICE, "other.0") == "good"
    assert standing.snapshot()[0].counts == {"broken_reply": 10}


def test_a_shunned_peer_is_shunned_with_all_its_experts(standing: Standing) -> None:
    standing.note_experts(ALICE, ["ffn.0"], "non_finite")
    shun(standing, ALICE)
    assert standing.verdict(ALICE, "ffn.0") == standing.verdict(ALICE, "ffn.1") == "shunned"
    assert standing.shunned_for_s(ALICE, "ffn.1") == rules.SHUN_S


def test_what_is_only_counted_changes_nothing(standing: Standing) -> None:
    for _ in range(100):
        standing.count(ALICE, "broken_reply")
    assert standing.verdict(ALICE) == "good"
    assert standing.snapshot()[0].counts == {"broken_reply": 100}


def test_experts_are_bounded_and_the_worst_are_kept(standing: Standing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_EXPERTS", 16)
    for _ in range(3):
        standing.note_experts(BOB, ["ffn.7"], "broken_reply")
    for index in range(200):
        standing.note_experts(ALICE, [f"ffn.{index}"], "broken_reply")
    assert len(standing._experts) <= 16
    assert standing.verdict(BOB, "ffn.7") == "shunned"


def test_numbers_of_one_expert_are_its_own_and_of_several_their_peers(standing: Standing, clock: Clock) -> None:
    for _ in range(20):
        standing.note_experts(ALICE, ["ffn.0"], "non_finite", is_proven=True)
        standing.note_experts(ALICE, ["ffn.1"], "non_finite", is_proven=True)
    assert standing.verdict(ALICE, "ffn.0") == "shunned"
    assert (standing.verdict(ALICE), standing.verdict(ALICE, "ffn.2")) == ("last", "good")
    for _ in range(20):
        standing.note_experts(BOB, [f"ffn.{index}" for index in range(SEVERAL)], "non_finite")
    assert standing.verdict(BOB, "ffn.9") == "good", "not proven"
    clock.now += 2 * HALF_LIFE_S
    standing.note_experts(ALICE, ["ffn.2"], "non_finite", is_proven=True)
    assert standing.verdict(ALICE, "ffn.9") == "good", "the others are long ago"
    for index in range(3):
        standing.note_experts(ALICE, [f"ffn.{index}"], "non_finite", is_proven=True)
    assert standing.verdict(ALICE, "ffn.9") == "last"
    for _ in range(3):
        standing.note_experts(ALICE, ["ffn.7", "ffn.8"], "non_finite", is_proven=True)
    assert standing.verdict(ALICE, "ffn.9") == "shunned"
    held = {each.peer_id: each.counts for each in standing.snapshot()}
    assert held[ALICE] == {"non_finite": 47}, "once for each time"
