"""Who answers pings, and who has not for too long: decided by answers and times alone."""

import random

import pytest

from tether.orchestrator.health import LIMIT, PERIOD, Health

ROUND = 0.001
"""Seconds from a ping to its answer."""


class Lab:
    """Workers that are pinged as `pinging.py` does it, on a clock of their own."""

    def __init__(self, *workers):
        self.health, self.now, self.silent = Health(), 0.0, {}
        self.pings = dict.fromkeys(workers, 0.0)
        self.told, self.asked = [], set()
        for worker in workers:
            self.health.add(worker, 0.0)

    def run(self, seconds, mute=()):
        """Those that are `mute` answer nothing meanwhile; what they were asked they answer at once afterwards."""
        end = self.now + seconds
        for worker in self.asked - set(mute):
            self._ping(worker, mute)
        while True:
            look, (ping, worker) = self.health.next_look(self.now), min((at, worker) for worker, at in self.pings.items())
            self.now = min(max(self.now, min(look, ping)), end)
            if self.now == end:
                break
            if look <= ping:
                self._look()
            else:
                self._ping(worker, mute)

    def _look(self):
        for worker in self.health.look(self.now):
            self._tell(worker, "silent")

    def _ping(self, worker, mute):
        self.pings[worker] = self.now + PERIOD
        if worker in mute:
            self.asked.add(worker)
            return
        self.asked.discard(worker)
        if self.health.answered(worker, self.now + ROUND):
            self._tell(worker, "back")

    def _tell(self, worker, what):
        self.told.append((worker, what, self.now))

    def take(self):
        told, self.told = self.told, []
        return told


def test_one_that_answers_is_left_alone():
    lab = Lab("a", "b")
    lab.run(600.0)
    assert lab.told == []


@pytest.mark.parametrize("after", [0.0, 0.1, 0.35, 0.59, 7.3])
def test_one_that_stops_is_silent_within_two_seconds_and_back_within_two(after):
    lab = Lab("a", "b")
    lab.run(after)
    stopped = lab.now
    lab.run(20.0, mute={"a"})
    [(worker, what, at)] = lab.take()
    assert (worker, what) == ("a", "silent")
    assert at - stopped <= LIMIT + 0.01 < 2.0
    healed = lab.now
    lab.run(20.0)
    [(worker, what, at)] = lab.take()
    assert (worker, what) == ("a", "back")
    assert at - healed < 2.0


def test_one_that_answers_now_and_then_stays_away():
    lab = Lab("a")
    lab.run(3.0, mute={"a"})
    for _ in range(10):
        lab.run(PERIOD / 2)
        lab.run(2.0, mute={"a"})
    assert [what for _, what, _ in lab.take()] == ["silent"]


def test_short_stalls_are_nothing_to_speak_of():
    """As a worker's, that imports a large library; or of a link that flaps."""
    chance, lab = random.Random("short stalls"), Lab("a", "b", "c")
    for _ in range(200):
        lab.run(chance.uniform(0.0, LIMIT - PERIOD - 0.01), mute={chance.choice(("a", "b", "c"))})
        lab.run(PERIOD)
    assert lab.told == []


def test_who_looks_late_could_not_hear_either():
    """The orchestrator was stopped for a minute: answers wait in its sockets, and nobody is silent for that."""
    health = Health()
    for worker in "ab":
        health.add(worker, 0.0)
    due = health.next_look(0.0)
    assert health.look(due + 60.0) == []
    assert not health.answered("a", due + 60.0)
    assert health.look(health.next_look(due + 60.0)) == ["b"]


def test_one_that_went_is_not_silent_and_one_that_was_never_there_does_not_answer():
    health = Health()
    health.add("a", 0.0)
    health.remove("a")
    health.remove("b")
    assert not health.answered("a", 5.0)
    assert health.look(10.0) == []
    health.add("a", 20.0)
    assert health.look(20.0 + LIMIT / 2) == []


def test_whoever_falls_silent_is_told_once_and_so_is_whoever_is_back():
    chance, workers = random.Random("silent and back"), [f"w{number}" for number in range(20)]
    lab = Lab(*workers)
    for _ in range(100):
        stopped = sorted(chance.sample(workers, chance.randrange(len(workers) + 1)))
        lab.run(chance.uniform(2.0, 60.0), mute=stopped)
        assert sorted(told[:2] for told in lab.take()) == [(worker, "silent") for worker in stopped]
        lab.run(2.0)
        assert sorted(told[:2] for told in lab.take()) == [(worker, "back") for worker in stopped]
