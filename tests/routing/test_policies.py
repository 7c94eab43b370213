"""Which route a request takes: each policy does what its name says, lent workers come last, and sessions stay where they are."""

import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.routing.policies import BUSY, choose, policy_of
from tether.routing.table import Route
from tether.routing.tracks import Track
from tether.serving_settings import PolicyName
from tether.types import WorkerId

POLICIES = PolicyName.__args__


class Worker:
    """One worker in a simulation: its open requests, and how long it takes for one."""

    def __init__(self, name, takes=0.01, slots=None, weight=1.0, region=""):
        self.open, self.takes, self.served = 0, takes, 0
        self.track = Track(Route(WorkerId(name), f"/s/{name}", slots), lambda: self.open, lambda: self.open, weight, region)


def workers(count, **terms):
    return [Worker(f"w{number}", **terms) for number in range(count)]


def tracks(some):
    return [each.track for each in some]


def policy(name="least_outstanding", region=""):
    return policy_of(name, random.Random("policies"), region)


def picked(own, lent=(), name="least_outstanding", key=b""):
    return choose(policy(name), tracks(own), tracks(lent), key)


def simulate(name, some, requests=3000, rate=400.0, region="", keys=(b"",)):
    """Requests that come at random; a worker takes one after the other."""
    chance, chosen, ends, now = random.Random(f"simulated {name}"), policy(name, region), [], 0.0
    by_track, own, sent = {each.track: each for each in some}, tracks(some), []
    free = dict.fromkeys(by_track, 0.0)
    for _ in range(requests):
        now += chance.expovariate(rate)
        for end, began, track in [each for each in ends if each[0] <= now]:
            track.took(end - began, end)
            by_track[track].open -= 1
        ends = [each for each in ends if each[0] > now]
        track = choose(chosen, own, (), chance.choice(keys))
        worker = by_track[track]
        worker.open, worker.served = worker.open + 1, worker.served + 1
        free[track] = max(free[track], now) + chance.expovariate(1.0 / worker.takes)
        ends.append((free[track], now, track))
        sent.append(free[track] - now)
    return sorted(sent)


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_holds_it_or_one_does(name):
    assert picked([], name=name) is None
    (only,) = some = workers(1)
    assert picked(some, name=name) is only.track


def test_the_least_busy_of_the_lab_is_taken_and_the_first_of_equals():
    some = workers(3)
    assert picked(some) is some[0].track
    some[0].open, some[1].open, some[2].open = 2, 1, 1
    assert picked(some) is some[1].track


@pytest.mark.parametrize("name", POLICIES)
def test_a_lent_worker_waits_until_the_lab_is_busy_and_is_not_waited_for(name):
    own, lent = workers(2, region="here"), [Worker("lent", slots=4), Worker("roomy", slots=8)]
    own[0].open = own[1].open = BUSY - 1
    assert picked(own, lent, name) in tracks(own)
    own[0].open = own[1].open = BUSY
    assert picked(own, lent, name) is lent[1].track
    lent[0].open, lent[1].open = 4, 8
    assert picked(own, lent, name) in tracks(own)
    assert picked([], lent, name) in tracks(lent)


def test_round_robin_gives_each_as_much():
    some = workers(3)
    simulate("round_robin", some)
    assert {worker.served for worker in some} == {1000}


def test_weights_are_kept_and_evenly_spread():
    some = [Worker("big", weight=4.0), Worker("mid", weight=2.0), Worker("small", weight=1.0)]
    chosen, order = policy("weighted_round_robin"), tracks(some)
    names = [choose(chosen, order, (), b"").route.worker for _ in range(70)]
    assert Counter(names) == {"big": 40, "mid": 20, "small": 10}
    assert "bigbigbig" not in "".join(names)
    fewer = order[:2]
    assert Counter(choose(chosen, fewer, (), b"").route.worker for _ in range(30)) == {"big": 20, "mid": 10}


def test_two_choices_keep_queues_short_where_one_does_not():
    even, blind = workers(20), workers(20)
    chosen, random_ = policy("power_of_two"), random.Random("blind")
    order, by = tracks(even), {worker.track: worker for worker in even}
    for _ in range(2000):
        by[choose(chosen, order, (), b"")].open += 1
        random_.choice(blind).open += 1
    assert max(worker.open for worker in even) - 100 < (max(worker.open for worker in blind) - 100) / 4


def test_latency_leaves_a_slow_worker_alone_where_others_give_it_as_much():
    quick, even = [Worker("slow", 0.1), *workers(2)], [Worker("slow", 0.1), *workers(2)]
    aware, blind = simulate("latency", quick, rate=100.0), simulate("round_robin", even, rate=100.0)
    assert quick[0].served < 150
    assert aware[2970] < blind[2970] / 5


def test_who_is_nearer_is_asked_until_all_there_are_busy():
    some = [Worker("far", region="us"), *workers(2, region="eu")]
    simulate("region", some, requests=500, rate=50.0, region="eu")
    assert some[0].served == 0
    for near in some[1:]:
        near.open = BUSY
    assert choose(policy("region", "eu"), tracks(some), (), b"") is some[0].track
    assert choose(policy("region", "asia"), tracks(some), (), b"") is some[0].track


@given(st.integers(2, 40), st.integers(0, 39))
def test_a_session_stays_and_only_those_of_a_worker_that_is_gone_move(count, gone):
    order = tracks(workers(count))
    keys = [b"session %d" % number for number in range(200)]
    before = {key: choose(policy("sticky"), order, (), key) for key in keys}
    lost = order[gone % count]
    rest = [track for track in order if track is not lost]
    after = {key: choose(policy("sticky"), rest, (), key) for key in keys}
    assert all(after[key] is before[key] for key in keys if before[key] is not lost)
    assert max(Counter(before.values()).values()) < 200 * min(1.0, 4.0 / count) + 12


def test_a_session_does_not_leave_for_another_lab_and_what_is_none_goes_where_there_is_room():
    own, lent = workers(3), [Worker("lent", slots=4)]
    for worker in own:
        worker.open = BUSY
    assert picked(own, lent, "sticky", b"session") in tracks(own)
    assert picked(own, lent, "sticky") is lent[0].track
    own[2].open = 0
    assert picked(own, lent, "sticky") is own[2].track


Loads = st.lists(st.integers(0, 2 * BUSY), min_size=1, max_size=40)


@given(st.sampled_from(POLICIES), Loads, st.lists(st.tuples(st.integers(0, 16), st.integers(0, 32)), max_size=3))
def test_the_choice_is_one_that_the_rules_allow(name, loads, others):
    own, lent = workers(len(loads)), [Worker(f"l{number}", slots=slots) for number, (slots, _) in enumerate(others)]
    for worker, load in zip([*own, *lent], [*loads, *(taken for _, taken in others)], strict=True):
        worker.open = load
    chosen = next(worker for worker in [*own, *lent] if worker.track is picked(own, lent, name))
    if chosen in lent:
        assert chosen.open < chosen.track.route.slots
    elif name == "least_outstanding" and len(own) <= 32:
        assert chosen.open == min(loads)


@pytest.mark.parametrize("name", POLICIES)
def test_a_decision_among_a_thousand_workers_costs_next_to_nothing(name, measured):
    some = workers(1000)
    for worker in some:
        worker.open = 1
    chosen, order, key = policy(name), tracks(some), b"session"
    choose(chosen, order, (), key)
    begun = time.process_time()
    for _ in range(1000):
        choose(chosen, order, (), key)
    measured(f"{name}: {(time.process_time() - begun) * 1000:.1f} µs a decision with 1,000 workers")
