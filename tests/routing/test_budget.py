"""How many requests are sent again, and which are sent twice: as virtual seconds go by."""

import random

from hypothesis import given
from hypothesis import strategies as st

from tether.routing.budget import RetryBudget, backoff
from tether.routing.hedging import Hedging


def test_when_everything_fails_less_than_a_tenth_is_sent_again():
    budget = RetryBudget(0.0)
    again = sum(budget.take(number / 50) for number in range(50 * 60) for _ in range(3))
    assert 50 <= again <= 300


def test_what_succeeds_at_the_second_worker_goes_on_however_much_it_is():
    budget, sent, waiting = RetryBudget(0.0), 0, 500
    for _ in range(20):
        now = [budget.take(0.0) for _ in range(waiting)].count(True)
        for _ in range(now):
            budget.succeeded(is_retry=True)
        sent, waiting = sent + now, waiting - now
    assert (sent, waiting) == (500, 0)


def test_a_quiet_service_may_try_again_too():
    budget = RetryBudget(0.0)
    while budget.take(0.0):
        pass
    assert not budget.take(1.0)
    assert budget.take(3.0)


@given(st.lists(st.sampled_from(["take", "retried", "answered", "second"]), max_size=300))
def test_there_are_never_more_tokens_than_it_began_with(happenings):
    budget, now = RetryBudget(0.0), 0.0
    for what in happenings:
        match what:
            case "take":
                budget.take(now)
            case "second":
                now += 1.0
            case _:
                budget.succeeded(is_retry=what == "retried")
    assert sum(budget.take(now) for _ in range(100)) <= 50


@given(st.integers(0, 10_000), st.text(max_size=5))
def test_pauses_are_spread_and_bounded(tries, seed):
    assert 0.0 <= backoff(tries, random.Random(seed)) <= 1.0


@given(st.floats(0.5, 0.999), st.integers(20, 2000), st.text(max_size=5))
def test_the_second_request_waits_for_its_share_of_the_latest_answers(quantile, count, seed):
    hedging, chance = Hedging(quantile), random.Random(seed)
    for number in range(count):
        assert (hedging.after is None) == (number < 20)
        hedging.took(chance.random())
    if count >= 500:
        assert abs(hedging.after / 1.5 - quantile) < 0.12


def test_it_follows_a_model_that_became_slower():
    hedging = Hedging(0.9)
    for _ in range(1000):
        hedging.took(0.01)
    for _ in range(1000):
        hedging.took(0.5)
    assert hedging.after == 0.75


def test_one_in_twenty_is_sent_twice_at_most():
    hedging, twice = Hedging(0.95), 0
    for _ in range(1000):
        hedging.began()
        twice += hedging.take()
    assert twice <= 50
