"""Who is waited for and who may write, without processes: values and times in, decisions out."""

import pytest

from tether.errors import NotWriterError
from tether.events import Standing
from tether.manager.feed import GONE, LAG, MOST, Followers
from tether.manager.tenure import MARGIN, Tenure

LEASE = 4.0
F = frozenset({"f"})
NOBODY = frozenset()


def following(change=5, now=0.0):
    followers = Followers()
    followers.joined("f", 1, now)
    followers.sent("f", change, now)
    followers.applied("f", change, now)
    return followers


def test_a_follower_is_in_step_once_it_has_all_that_was_acknowledged():
    followers = Followers()
    followers.acknowledged = 5
    followers.joined("f", 1, 0.0)
    assert not followers.in_step(0.0)
    followers.sent("f", 4, 0.0)
    followers.applied("f", 4, 0.1)
    assert not followers.in_step(0.1)
    assert followers.awaited == F
    followers.sent("f", 6, 0.1)
    followers.applied("f", 6, 0.2)
    assert followers.in_step(0.2) == F
    assert followers.have(F, 6)
    assert not followers.have(F, 7)


def test_one_that_needed_long_is_not_waited_for_before_it_was_quick():
    followers = Followers()
    followers.joined("f", 1, 0.0)
    followers.sent("f", 5, 0.0)
    followers.applied("f", 5, LAG)
    assert not followers.awaited
    assert followers.in_step(LAG) == F


def test_one_that_shows_no_progress_lags_and_one_that_does_has_longer_but_not_for_ever():
    followers = following()
    followers.sent("f", 6, 10.0)
    assert not followers.lagging(F, 10.0 + LAG - 0.1)
    assert followers.lagging(F, 10.0 + LAG) == F
    assert not followers.awaited
    followers.busy("f", 100, 10.0 + LAG)
    assert not followers.lagging(F, 10.0 + LAG)
    followers.busy("f", 100, 10.0 + 2 * LAG)
    assert followers.lagging(F, 10.0 + 2 * LAG) == F
    followers.busy("f", 200, 10.0 + MOST)
    assert followers.lagging(F, 10.0 + MOST) == F


def test_one_that_went_away_is_waited_for_a_moment_and_counts_anew_when_it_comes_back():
    followers = following()
    followers.joined("f", 2, 1.0)
    followers.left("f", 1, 1.0)
    assert not followers.lagging(F, 1.0 + GONE)
    assert not followers.have(F, 5)
    followers.left("f", 2, 2.0)
    assert not followers.lagging(F, 2.0 + GONE - 0.1)
    assert followers.lagging(F, 2.0 + GONE) == F
    assert not followers.in_step(2.0)


def test_one_that_nobody_knows_lags():
    assert Followers().lagging(F, 0.0) == F


# --- may this manager write


def standing(term=1, writer="w", in_step=()):
    return Standing(term, writer, None, in_step, LEASE)


def writing(*, in_step=NOBODY, now=0.0):
    tenure = Tenure("w", "tls://w", term=0, wrote=0)
    tenure.claim((0, 0), NOBODY, now)
    assert tenure.answered(standing())
    tenure.begin(1)
    tenure.require(in_step)
    tenure.claim((1, 1), NOBODY, now)
    assert not tenure.answered(standing(in_step=tuple(in_step)))
    return tenure


def test_a_manager_that_was_told_nothing_may_not_write():
    with pytest.raises(NotWriterError):
        Tenure("w", "tls://w", term=3, wrote=3).check(0.0)


def test_a_lone_writer_goes_on_however_long_the_orchestrator_is_away():
    assert writing().is_valid(1e9)


def test_a_writer_whose_place_another_may_take_stops_before_that_one_begins():
    tenure = writing(in_step=F)
    assert tenure.is_valid(LEASE - MARGIN - 0.1)
    assert not tenure.is_valid(LEASE - MARGIN)


def test_a_writer_is_bound_from_the_moment_it_asks_for_a_follower_until_it_is_confirmed_that_there_is_none():
    tenure = writing()
    tenure.require(F)
    assert not tenure.is_valid(LEASE)
    tenure.claim((1, 2), NOBODY, 10.0)
    tenure.answered(standing(in_step=("f",)))
    assert tenure.claim((1, 2), F, 11.0).in_step == ()
    assert tenure.required == F
    assert not tenure.is_valid(10.0 + LEASE)
    tenure.answered(standing(in_step=()))
    assert tenure.required == NOBODY
    assert tenure.is_valid(1e9)


def test_a_follower_that_came_while_an_answer_was_under_way_stays_required():
    tenure = writing()
    tenure.claim((1, 2), NOBODY, 1.0)
    tenure.require(F)
    tenure.answered(standing())
    assert tenure.required == F


def test_who_hears_of_another_writer_stops_at_once():
    tenure = writing()
    tenure.answered(standing(term=2, writer="f"))
    assert not tenure.is_valid(0.1)
    assert tenure.claim((1, 1), NOBODY, 1.0).term == 2
