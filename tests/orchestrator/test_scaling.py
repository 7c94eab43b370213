"""How many workers a lab wants, and which may go."""

import itertools
import random

import pytest

from tether.errors import ConfigError
from tether.events import GatewayLoad, VersionLoad
from tether.orchestrator.adaptive import Adaptive
from tether.orchestrator.scaling import Batch, Gauge, Pressure, Scaler, Staff, leaving
from tether.types import Digest, ModelVersion

DIGITS = ModelVersion("digits", 1, Digest("1" * 64))


def told(gateway="g", **seen):
    return GatewayLoad(gateway, 1.0, {DIGITS: VersionLoad(**seen)})


def second(rate, waiting=0, cost=0.1, latency=0.1):
    """All that came was answered, each at so many seconds of a worker."""
    return Pressure(1.0, rate, rate, waiting, rate * cost, latency)


def looked_at(workers=0):
    """One that knows for a minute that there are so many workers."""
    scaler = Scaler()
    scaler.look(Pressure(0.0), workers, -61.0)
    return scaler


def wants(*looks, workers=1, start=0.0, scaler=None):
    """What it says in each second."""
    scaler = scaler or looked_at()
    return [scaler.look(seen, workers, start + number) for number, seen in enumerate(looks)]


@pytest.mark.parametrize(("rate", "workers"), [(0, 1), (1, 1), (7, 1), (8, 2), (35, 5)])
def test_as_many_as_the_work_fills_to_seven_tenths(rate, workers):
    assert wants(*[second(rate)] * 6)[-1] == workers


def test_what_waits_is_work_too():
    scaler = looked_at()
    wants(*[second(7)] * 6, scaler=scaler)
    assert wants(second(7, waiting=140), scaler=scaler, start=6.0) == [3]


def test_answers_that_come_late_want_another_worker_whatever_work_says():
    assert wants(*[second(1, waiting=3, latency=2.0)] * 3, workers=4)[-1] == 5
    assert wants(*[second(1, waiting=0, latency=2.0)] * 3, workers=4)[-1] == 1, "what is over is no reason"


def test_it_wants_more_within_seconds_and_fewer_after_a_minute():
    scaler = looked_at()
    wants(*[second(7)] * 60, scaler=scaler)
    up = wants(*[second(35)] * 6, scaler=scaler, start=60.0)
    assert up[-1] == 5
    down = wants(*[second(7)] * 80, scaler=scaler, start=66.0)
    assert down.index(1) in range(58, 68)
    assert sorted(down, reverse=True) == down


def test_the_last_worker_goes_when_nobody_asked_for_five_minutes_and_comes_with_the_first_request():
    scaler = looked_at()
    wants(second(5), scaler=scaler)
    idle = wants(*[second(0)] * 400, scaler=scaler, start=1.0)
    assert idle.index(0) in range(298, 301)
    assert wants(Pressure(1.0, 1, 0, 1), workers=0, scaler=scaler, start=401.0) == [1]
    assert wants(Pressure(0.0, 1, 0, 1), workers=0) == [1], "also where nothing was ever answered"


def test_what_a_request_costs_is_learned_though_heartbeats_are_rare():
    scaler = looked_at()
    looks = [Pressure(1.0, 14, 14, 0, 7.0 if number % 5 == 4 else 0.0, 0.1) for number in range(60)]
    assert set(wants(*looks, scaler=scaler)[20:]) <= {2, 3}
    assert scaler.cost == pytest.approx(0.1, rel=0.1)


def test_what_is_foretold_counts_as_if_it_came():
    scaler = looked_at()
    wants(*[second(7)] * 6, scaler=scaler)
    assert scaler.look(second(7), 1, 6.0, expected=20.0) == 3


def test_a_gauge_adds_up_gateways_and_processes():
    gauge = Gauge()
    gauge.look({"w1": 50.0}, 0.0)
    gauge.take(told("a", answered=5, failed=1, seconds=1.0, open=2), 0.5)
    gauge.take(told("b", answered=5, refused=2, seconds=2.0), 0.5)
    assert gauge.look({"w1": 51.0, "w2": 0.5}, 1.0) == Pressure(1.0, 15, 10, 2, 1.5, 0.3)
    gauge.take(told("a", answered=2, seconds=0.2), 1.5)
    assert gauge.look({"w1": 51.0}, 2.0) == Pressure(1.0, 0, 2, 0, 0.0, 0.1), "those that were open came before"
    gauge.take(told("a", open=7), 2.5)
    assert [gauge.look({}, now).waiting for now in (3.0, 6.0)] == [7, 0], "a gateway that tells no more is gone"


def staff(number, only=0, models=0, *, is_leaving=False):
    return Staff(f"worker-{number}", f"tls://w{number}", is_leaving, False, only, models)


def test_those_go_whose_loss_costs_least_and_who_was_chosen_is_chosen_again():
    four = [staff(1, only=1), staff(2, models=3), staff(3, models=2), staff(4, models=1)]
    assert leaving(four, 2) == ["worker-4", "worker-3"]
    assert leaving(four, 0)[-1] == "worker-1"
    assert leaving(four, 7) == []
    assert leaving([staff(1), staff(2, only=3, is_leaving=True)], 1) == ["worker-2"]


def test_tasks_want_workers_as_dasks_own_rule_has_it():
    assert Batch().workers == 0
    assert Batch({"w1"}, running=4, waiting=0, seconds=0.0).workers == 1
    assert Batch({"w1"}, running=4, waiting=6, seconds=34.0).workers == 7
    assert Batch({"w1"}, running=1, waiting=1, seconds=3600.0).workers == 2
    assert Batch(waiting=3).workers == 1, "how long they take is not known before one ran"


def test_those_that_there_are_stay_until_something_is_known():
    scaler = Scaler()
    said = [scaler.look(Pressure(1.0), 4, float(second)) for second in range(310)]
    assert (said[0], said[60], said[61], said[299], said[300]) == (4, 4, 1, 1, 0)


def test_those_that_come_back_to_a_new_orchestrator_stay_as_long():
    scaler = Scaler()
    said = [scaler.look(Pressure(1.0), there, 1.0 + second) for second, there in enumerate([0, 1, 4] + 60 * [4])]
    assert (said[:3], said[60], said[61]) == ([1, 1, 4], 4, 1)


def test_what_a_worker_did_while_nobody_looked_is_no_work_of_now():
    gauge = Gauge()
    gauge.look({}, 0.0)
    assert gauge.look({"w1": 20_000.0, "w2": 0.5}, 1.0).spent == 0.5
    assert gauge.look({"w1": 20_000.7, "w2": 0.5}, 2.0).spent == pytest.approx(0.7)


@pytest.mark.parametrize("nonsense", [{"keep": -1}, {"idle": float("nan")}, {"latency": "soon"}, {"patience": float("nan")}, {"lead": "x"}])
def test_what_is_no_time_is_said_at_once(nonsense):
    with pytest.raises(ConfigError, match=next(iter(nonsense))):
        Adaptive(**nonsense)


def test_noise_alone_moves_nobody():
    draws, scaler, said = random.Random("noise"), looked_at(), []
    for number in range(600):
        rate = sum(draws.random() < 0.2 for _ in range(100))  # 20 ± 4 requests a second, 0.1 s each: 2.9 workers
        said.append(scaler.look(second(rate), 3, float(number)))
    assert set(said[60:]) <= {3, 4}
    assert sum(before != after for before, after in itertools.pairwise(said[60:])) <= 8
