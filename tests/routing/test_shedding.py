"""Which requests are refused at once: simulated queues in front of workers that take their time, in virtual seconds."""

import heapq
import random

import pytest

from tether.errors import QueueFullError
from tether.ports import Hop
from tether.routing.shedding import BURST, FEW, STANDING, Shedding
from tether.routing.table import ModelEntry, Route, Table, VersionEntry
from tether.serving_settings import ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, WorkerId

VERSION = ModelVersion("m", 1, Digest("0" * 64))
INFO = ModelInfo("custom", "custom", (), (), batched=True, pure=True, code=True)


def table(workers=1, **serving):
    routes = tuple(Route(WorkerId(f"w{number}"), f"/s/{number}") for number in range(workers))
    entry = VersionEntry(VERSION, INFO, "ready", routes)
    return Table(1, {"m": ModelEntry("m", 1, {1: entry}, {}, ServingSettings(**serving))})


class Queue:
    """Workers in front of which requests wait in order; each takes as many as `most` at a time, for `takes` seconds."""

    def __init__(self, takes, workers=1, most=1, **serving):
        self.takes, self.most, self.table, self.shedding = takes, most, table(workers, **serving), Shedding()
        self.free, self.waiting, self.ends, self.now = workers, [], [], 0.0
        self.answered, self.late, self.refused, self.longest = [], 0, [], 0.0

    def ask(self, timeout, urgency=0):
        body = b'{"parameters": {"priority": %d}}' % urgency
        try:
            place = self.shedding.admitted(self.table, self.table.resolve("m"), Hop(body, 0, timeout), self.now)
        except QueueFullError as error:
            self.refused.append((self.now, urgency, error.args[1]))
            return
        heapq.heappush(self.waiting, (urgency, self.now, self.now + timeout, id(place), place))
        self._begin()

    def until(self, moment):
        while self.ends and self.ends[0][0] <= moment:
            self.now, _, batch = heapq.heappop(self.ends)
            self.free += 1
            for urgency, begun, deadline, _, place in batch:
                if self.now <= deadline:
                    self.answered.append((self.now, urgency, self.now - begun))
                else:
                    self.late += 1
                place.leave(min(self.now, deadline), 200 if self.now <= deadline else 504)
            self._begin()
        self.now = moment

    def _begin(self):
        while self.free and self.waiting:
            batch = []
            while self.waiting and len(batch) < self.most:
                each = heapq.heappop(self.waiting)
                if each[2] < self.now:
                    self.late += 1
                    each[4].leave(each[2], 504)
                else:
                    batch.append(each)
            if batch:
                self.free -= 1
                heapq.heappush(self.ends, (self.now + self.takes, id(batch), batch))

    def load(self, rate, seconds, timeout, chance, urgencies=(0,)):
        end = self.now + seconds
        while (moment := self.now + chance.expovariate(rate)) < end:
            self.until(moment)
            self.ask(timeout, chance.choice(urgencies))
        self.until(end)

    def goodput(self, since, seconds):
        return sum(since <= at < since + seconds for at, _, _ in self.answered) / seconds


@pytest.mark.parametrize(
    ("takes", "workers", "most", "timeout"),
    [(0.01, 1, 1, 1.5), (0.01, 1, 1, 60.0), (0.02, 2, 1, 60.0), (0.3, 4, 1, 1.5), (0.05, 2, 16, 1.5), (0.05, 2, 16, 60.0)],
)
def test_five_times_what_can_be_answered_leaves_what_is_answered_and_the_time_that_it_takes(takes, workers, most, timeout):
    queue, chance, capacity = Queue(takes, workers, most), random.Random(f"{takes} {workers} {most} {timeout}"), workers * most / takes
    for times in (1, 2, 5):
        queue.load(times * capacity, 20.0, timeout, chance)
    assert queue.goodput(40, 20) >= 0.9 * capacity
    assert queue.late <= 0.02 * len(queue.answered)
    queue.load(0.5 * capacity, 10.0, timeout, chance)
    calm = [seconds for at, _, seconds in queue.answered if at > 65 + takes]
    assert max(calm) < max(0.5, 6 * takes)
    assert not [at for at, _, _ in queue.refused if at > 65]


def test_a_burst_after_quiet_times_is_taken_whole():
    queue, chance = Queue(0.01, 2, 16), random.Random("burst")
    queue.load(5, 10.0, 60.0, chance)
    for _ in range(2000):
        queue.ask(0.9)
    queue.until(30)
    assert (queue.refused, queue.late) == ([], 0)


def test_callers_that_wait_for_a_slow_model_are_not_sent_away_while_they_are_few():
    queue = Queue(1.0)
    for _ in range(200):
        while queue.shedding._backlogs.get(VERSION) and queue.shedding._backlogs[VERSION].open >= FEW // 2:
            queue.until(queue.now + 1)
        queue.ask(60)
    queue.until(queue.now + 60)
    assert (len(queue.answered), queue.refused) == (200, [])


def test_a_queue_that_was_too_long_once_has_to_become_short_before_it_may_be_long_again():
    queue, chance = Queue(0.01), random.Random("standing")
    queue.load(500, 30, 60.0, chance)
    assert BURST * 0.8 < max(seconds for _, _, seconds in queue.answered) < BURST * 1.3
    assert max(seconds for at, _, seconds in queue.answered if at > 25) < STANDING * 1.3
    queue.load(50, 10, 60.0, chance)
    before = len(queue.refused)
    for _ in range(int(90 * BURST)):
        queue.ask(60.0)
    assert len(queue.refused) == before


def test_who_is_sent_away_is_told_when_the_queue_has_room():
    queue, chance = Queue(0.01), random.Random("after")
    while not queue.refused:
        queue.load(500, 0.1, 60.0, chance)
    at, _, seconds = queue.refused[-1]
    assert BURST - STANDING <= seconds <= BURST + STANDING
    queue.until(at + seconds)
    before = len(queue.refused)
    queue.ask(60.0)
    assert len(queue.refused) == before


def test_urgent_requests_wait_for_urgent_ones_alone():
    queue, chance = Queue(0.01, priority_levels=2), random.Random("urgent")
    queue.load(400, 20, 1.0, chance, urgencies=(1, 2, 2, 2, 2, 2, 2, 2))
    urgent = [each for each in queue.answered if each[1] == 1]
    assert not [at for at, urgency, _ in queue.refused if urgency == 1]
    assert len(urgent) == pytest.approx(1000, rel=0.15)
    assert len([each for each in queue.refused if each[1] == 2]) > 3000


def test_the_queue_timeout_of_a_model_is_its_patience():
    queue, chance = Queue(0.01, queue_timeout=3.0), random.Random("said")
    queue.load(500, 15, 60.0, chance)
    assert max(seconds for at, _, seconds in queue.answered if at > 10) < 3.3


def test_while_a_version_is_loaded_nobody_is_sent_away_for_what_it_took_elsewhere():
    queue, chance = Queue(0.01), random.Random("moved")
    queue.load(500, 5, 1.0, chance)
    gone = VersionEntry(VERSION, INFO, "unloaded", ())
    for _ in range(1000):
        queue.shedding.admitted(queue.table, gone, Hop(b"{}", 0, 1.0), queue.now)


def test_what_is_no_version_any_more_is_forgotten():
    shedding, known = Shedding(), table()
    place = shedding.admitted(known, known.resolve("m"), Hop(b"{}", 0, 1.0), 0.0)
    shedding.follow(Table())
    place.leave(1.0, 200)
    shedding.admitted(known, known.resolve("m"), Hop(b"{}", 0, 1.0), 2.0)
    assert len(shedding._backlogs) == 1
