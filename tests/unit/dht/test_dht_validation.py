"""Every rule of RecordTrust, in its order, with the error and the status it gives."""

from __future__ import annotations

import pytest
from dht_swarm import identity_of

from p2pmoe.dht.store import RecordStore
from p2pmoe.dht.validation import NoRoomError, RecordTrust, TooFarError, status_of
from p2pmoe.errors import BadSignatureError, DecodeError, ExpiredRecordError, StaleRecordError
from p2pmoe.protocol.datagrams import Status
from p2pmoe.protocol.records import key_of, sign_record

ALICE, BOB = identity_of("alice"), identity_of("bob")
KEY = key_of("test", "ffn.")
NOW = 1_700_000_000.0


def record(who=ALICE, *, key=KEY, value=b"value", ahead_s=0.0, ttl_s=60.0, part=0):
    return sign_record(
        who, key, value, part=part, sequence=int((NOW + ahead_s) * 1e6), expires_at_ms=int((NOW + ttl_s) * 1000)
    )


@pytest.fixture
def trust() -> RecordTrust:
    return RecordTrust(RecordStore())


def admit(trust, raw, *, key=KEY, count_nearer=0, now=NOW):
    return trust.admit(key, raw, source="source", count_nearer=count_nearer, now=now)


def test_a_good_record_is_stored(trust):
    assert admit(trust, record().raw) == record()
    assert trust.store.records(KEY, NOW) == [record()]


@pytest.mark.parametrize(
    ("raw", "key", "error", "status"),
    [
        (b"", KEY, DecodeError, Status.MALFORMED),
        (bytes(2000), KEY, DecodeError, Status.MALFORMED),
        (record().raw + b"\0", KEY, DecodeError, Status.MALFORMED),
        (record().raw, b"short", DecodeError, Status.MALFORMED),
        (record(ttl_s=0).raw, KEY, ExpiredRecordError, Status.EXPIRED),
        (record(ttl_s=-1).raw, KEY, ExpiredRecordError, Status.EXPIRED),
        (record(ttl_s=3601).raw, KEY, ExpiredRecordError, Status.EXPIRED),
        (record(ahead_s=31).raw, KEY, StaleRecordError, Status.STALE),
        (record().raw, key_of("test", "ffn.3."), BadSignatureError, Status.BAD_SIGNATURE),
        (record().raw[:-1] + bytes([record().raw[-1] ^ 1]), KEY, BadSignatureError, Status.BAD_SIGNATURE),
    ],
)
def test_a_bad_record_is_refused_and_nothing_is_stored(trust, raw, key, error, status):
    with pytest.raises(error) as caught:
        admit(trust, raw, key=key)
    assert status_of(caught.value) == status
    assert len(trust.store) == 0


@pytest.mark.parametrize("ttl_s", [0.001, 3600])
def test_the_edges_of_the_time_are_inside(trust, ttl_s):
    admit(trust, record(ttl_s=ttl_s, ahead_s=30).raw)


def test_an_older_record_is_refused_and_an_equal_one_must_be_identical(trust):
    newer = record(ahead_s=1)
    admit(trust, newer.raw)
    assert admit(trust, newer.raw) is trust.store.get(KEY, newer.slot)
    for stale in (record(), record(ahead_s=1, value=b"other")):
        with pytest.raises(StaleRecordError) as caught:
            admit(trust, stale.raw)
        assert status_of(caught.value) == Status.STALE
    assert trust.store.records(KEY, NOW) == [newer]


def test_a_replayed_record_does_not_undo_a_withdrawal(trust):
    first, tombstone = record(value=b"here"), record(value=b"", ahead_s=1)
    admit(trust, first.raw)
    admit(trust, tombstone.raw)
    with pytest.raises(StaleRecordError):
        admit(trust, first.raw)


def test_nobody_writes_anothers_slot(trust):
    """Record theft: bob signs, but names alice's key."""
    alices = record()
    admit(trust, alices.raw)
    forged = sign_record(
        BOB, KEY, b"mine", sequence=int((NOW + 5) * 1e6), expires_at_ms=int((NOW + 60) * 1000)
    ).raw.replace(BOB.public_key, ALICE.public_key)
    with pytest.raises(BadSignatureError):
        admit(trust, forged)
    admit(trust, record(BOB).raw)
    assert {each.public_key for each in trust.store.records(KEY, NOW)} == {ALICE.public_key, BOB.public_key}


def test_too_far_is_refused_before_the_signature_is_looked_at(trust, monkeypatch):
    monkeypatch.setattr("p2pmoe.protocol.records.verify", lambda *_: pytest.fail("verified"))
    with pytest.raises(TooFarError) as caught:
        admit(trust, record().raw, count_nearer=16)
    assert status_of(caught.value) == Status.FAR


def test_a_full_key_is_refused_before_the_signature_is_looked_at(monkeypatch):
    trust = RecordTrust(RecordStore(max_slots_per_key=1))
    admit(trust, record(ttl_s=100).raw)
    monkeypatch.setattr("p2pmoe.protocol.records.verify", lambda *_: pytest.fail("verified"))
    with pytest.raises(NoRoomError) as caught:
        admit(trust, record(BOB, ttl_s=50).raw)
    assert status_of(caught.value) == Status.FULL


def test_a_signature_is_checked_once(trust, monkeypatch):
    admit(trust, record().raw)
    monkeypatch.setattr("p2pmoe.protocol.records.verify", lambda *_: pytest.fail("verified again"))
    trust.check_read(KEY, record().raw, NOW)


def test_a_verified_record_is_not_verified_under_another_key(trust):
    admit(trust, record().raw)
    with pytest.raises(BadSignatureError):
        trust.check_read(key_of("test", "other."), record().raw, NOW)


def test_readers_check_again(trust):
    for raw, error in [
        (b"junk", DecodeError),
        (record(ttl_s=-1).raw, ExpiredRecordError),
        (record(ahead_s=31).raw, StaleRecordError),
        (record(key=key_of("test", "other.")).raw, BadSignatureError),
    ]:
        with pytest.raises(error):
            trust.check_read(KEY, raw, NOW)


@pytest.mark.parametrize("skew_s", [-60, -20, 20, 60])
def test_clock_skew(trust, skew_s):
    """Within the margins a storer takes the record; beyond them the error says which clock to doubt."""
    now = NOW + skew_s
    if skew_s == 60:  # the storer is ahead: a record of 60 s has expired for it
        with pytest.raises(ExpiredRecordError):
            admit(trust, record().raw, now=now)
    elif skew_s == -60:  # the storer is behind: the record comes from its future
        with pytest.raises(StaleRecordError, match="clock"):
            admit(trust, record().raw, now=now)
    else:
        admit(trust, record().raw, now=now)
