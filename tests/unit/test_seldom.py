"""What could be said all the time is said once, then now and then with a count."""

from __future__ import annotations

from p2pmoe.seldom import Seldom


def test_once_then_in_ten_minutes_with_a_count_and_anew_when_it_was_over():
    now = [0.0]
    seldom = Seldom(clock=lambda: now[0])
    assert seldom.note() == ""
    for _ in range(30):
        now[0] += 19
        assert seldom.note() is None
    now[0] = 600.0
    assert seldom.note() == " (and 30 times in the last 10 min)"
    now[0] = 601.0
    assert seldom.note() is None
    assert repr(seldom) == "<Seldom: 1 unsaid>"
    now[0] = 1300.0
    assert seldom.note() == " (and once in the last 12 min)"
    seldom.reset()
    assert seldom.note() == ""
