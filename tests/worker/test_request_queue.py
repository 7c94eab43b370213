"""What a lab says of a model's batches and its queue, in simulated time."""

from dataclasses import dataclass
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import BadInputError, QueueFullError
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.worker.batch_sizes import BatchSizes
from tether.worker.batching import Rows, Waiting
from tether.worker.request_queue import RequestQueue

KEYS = [(("x", "<f4", (4,)),), (("x", "<f4", (5,)),), None]
LATENCY = 0.1


@dataclass(eq=False)
class Job:
    number: int
    arrived: float
    deadline: float
    rows: Rows
    priority: object = 0


def job(number, arrived=0.0, rows=1, *, priority=0, patience=60.0, key=0):
    return Job(number, arrived, arrived + patience, Rows(rows, KEYS[key]), priority)


def queue(jobs=(), *, joins=True, **said):
    made = RequestQueue(LATENCY, ServingSettings(**said), joins=joins)
    for each in jobs:
        made.add(each.rows, each)
    return made


def numbers(jobs):
    return [each.number for each in jobs]


def singles(count, **each):
    return [job(number, **each) for number in range(count)]


# --- what is said


SAID = st.builds(
    dict,
    max_batch_size=st.none() | st.integers(8, 40),
    max_delay=st.sampled_from([0.0, 0.01, 0.2]),
    preferred_batch_sizes=st.sets(st.integers(1, 8), max_size=3).map(sorted),
    max_queue_size=st.none() | st.integers(1, 6),
    queue_timeout=st.none() | st.sampled_from([0.25, 0.5]),
    priority_levels=st.integers(0, 3),
)
ARRIVAL = st.tuples(
    st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.3]),  # seconds since the one before
    st.integers(1, 9),  # rows
    st.sampled_from([0, 0, 0, 1, 2]),  # shape
    st.sampled_from([0, 1, 2, 3, 9, -1, True, "1"]),  # priority
    st.sampled_from([0.02, 0.4, 60.0]),  # seconds until the deadline
)


class Ledger:
    """A model's thread in simulated time, which checks each step against what was said."""

    def __init__(self, said, seconds):
        self.said, self.seconds = ServingSettings(**said), seconds
        self.queue = RequestQueue(LATENCY, self.said)
        self.waiting, self.ran, self.refused, self.expired, self.withdrawn, self.now = [], [], [], [], [], 0.0

    def level(self, each):
        return self.said.level(each.priority)

    def arrive(self, each):
        of_its_level = sum(self.level(other) == self.level(each) for other in self.waiting)
        is_full = self.said.max_queue_size is not None and of_its_level >= self.said.max_queue_size
        try:
            self.queue.add(each.rows, each)
        except QueueFullError:
            assert is_full
            self.refused.append(each)
        else:
            assert not is_full
            self.waiting.append(each)

    def expire(self):
        gone = self.queue.expired(self.now)
        limit = self.said.queue_timeout
        assert set(gone) == {each for each in self.waiting if limit is not None and self.now - limit > each.arrived}
        self._leave(gone, self.expired)

    def turn(self):
        """One batch, if not all are held."""
        batch = self.queue.take(self.now)
        if not batch:
            for each in self.waiting:
                assert self.now < each.arrived + self.said.max_delay
                assert self.now < (each.arrived + each.deadline) / 2
            assert not self.waiting or self.queue.pause(self.now) > 0
            self._check_held()
            return
        self._check(batch)
        self._leave(batch, self.ran)
        self.now += self.seconds

    def _alike(self, key):
        return sorted((each for each in self.waiting if each.rows.key == key), key=lambda each: (self.level(each), each.number))

    def _check_held(self):
        for key in {each.rows.key for each in self.waiting}:
            assert key is not None
            sums = list(accumulate(each.rows.count for each in self._alike(key)))
            sizes = self.said.preferred_batch_sizes
            assert sums[-1] < (sizes[-1] if sizes else self.said.max_batch_size or 32)
            assert not set(sizes) & set(sums)

    def withdraw(self):
        """Who waits longest does not wait any more."""
        if self.waiting:
            gone = self.waiting[0]
            assert self.queue.drop(lambda each: each is gone) == [gone]
            self._leave([gone], self.withdrawn)

    def _check(self, batch):
        key = batch[0].rows.key
        alike = self._alike(key)
        assert batch == alike[: len(batch)]
        rows, sums = sum(each.rows.count for each in batch), set(accumulate(each.rows.count for each in alike))
        if len(batch) > 1:
            assert key is not None
            assert rows <= (self.said.max_batch_size or 1024)
        formable = [size for size in self.said.preferred_batch_sizes if size in sums]
        if formable and key is not None:
            assert rows == max(formable)

    def _leave(self, some, where):
        where += some
        self.waiting = [each for each in self.waiting if each not in some]
        assert len(self.queue) == len(self.waiting)

    def live(self, coming):
        """Until everything that came has left."""
        while coming or self.waiting:
            pause = self.queue.pause(self.now)
            assert (pause is None) == (not self.waiting)
            step = coming[0].arrived if pause is None else self.now + pause
            self.now = max(self.now, min([step, *(each.arrived for each in coming[:1])]))
            self.expire()
            while coming and coming[0].arrived <= self.now:
                each = coming.pop(0)
                if each.number % 5 == 4:
                    self.turn()
                    self.withdraw()
                self.arrive(each)
            self.turn()


@given(SAID, st.lists(ARRIVAL, max_size=40), st.sampled_from([0.0, 0.01, 0.4]))
@settings(max_examples=150)
def test_whatever_is_said_holds_at_each_step_and_nobody_is_lost_or_waits_for_ever(said, arrivals, seconds):
    coming, at = [], 0.0
    for number, (gap, rows, key, priority, patience) in enumerate(arrivals):
        at += gap
        coming.append(job(number, at, rows, priority=priority, patience=patience, key=key))
    ledger = Ledger(said, seconds)
    ledger.live(list(coming))
    left = ledger.ran + ledger.refused + ledger.expired + ledger.withdrawn
    assert sorted(numbers(left)) == list(range(len(coming)))


@given(st.lists(ARRIVAL, max_size=40), st.integers(0, 3))
def test_where_nothing_is_said_a_batch_is_of_what_waits_as_many_rows_as_were_learned(arrivals, taken_between):
    plain, learned, made = Waiting(), BatchSizes(LATENCY), queue()
    for number, (_, rows, key, _, _) in enumerate(arrivals):
        each = job(number, rows=rows, key=key, priority=number % 3)
        plain.add(each.rows, number)
        made.add(each.rows, each)
        for _ in range(taken_between if number % 7 == 0 else 0):
            most = 1 if not plain or (next_key := plain.next_key()) is None else learned.most_rows(next_key)
            assert numbers(made.take(0.0)) == plain.take(most)
    assert made.pause(0.0) == (0.0 if plain else None)


# --- one by one


def test_a_full_batch_goes_at_once_and_a_smaller_one_when_the_delay_is_over():
    waiting = queue(singles(4), max_batch_size=4, max_delay=0.5)
    assert numbers(waiting.take(0.0)) == [0, 1, 2, 3]
    waiting = queue(singles(3), max_batch_size=4, max_delay=0.5)
    assert waiting.take(0.1) == []
    assert waiting.pause(0.1) == pytest.approx(0.4)
    assert numbers(waiting.take(0.5)) == [0, 1, 2]
    assert waiting.pause(0.5) is None


def test_a_request_that_is_in_a_hurry_is_not_held_for_its_whole_time():
    waiting = queue([job(0), job(1, patience=0.2)], max_batch_size=4, max_delay=5.0)
    assert waiting.take(0.05) == []
    assert waiting.pause(0.05) == pytest.approx(0.05)
    assert numbers(waiting.take(0.1)) == [0, 1]


def test_a_model_that_ends_holds_nobody():
    assert numbers(queue(singles(2), max_delay=5.0).take(0.0, hurry=True)) == [0, 1]


def test_the_next_look_is_for_whichever_shape_is_due_first():
    waiting = queue([job(0, key=0), job(1, 0.1, patience=0.2, key=1)], max_delay=1.0)
    assert waiting.take(0.1) == []
    assert waiting.pause(0.1) == pytest.approx(0.1)
    assert numbers(waiting.take(0.2)) == [1]


def test_who_says_how_many_and_how_long_to_wait_gets_it_whatever_was_learned():
    waiting = queue()
    for _ in range(50):
        waiting.ran(KEYS[0], 1, 0.2)
    waiting.configure(ServingSettings(max_batch_size=4, max_delay=1.0, latency=LATENCY))
    for _ in range(50):
        waiting.ran(KEYS[0], 1, 0.2)
    for each in singles(3):
        waiting.add(each.rows, each)
    assert waiting.take(0.0) == []
    waiting.add(Rows(1, KEYS[0]), job(3))
    assert len(waiting.take(0.0)) == 4


def test_what_was_taken_back_makes_no_batch_full():
    waiting = queue(singles(3), max_batch_size=4, max_delay=1.0)
    assert waiting.take(0.0) == []
    waiting.drop(lambda each: each.number)
    waiting.add(Rows(1, KEYS[0]), job(3))
    assert waiting.take(0.0) == []


def test_an_urgent_request_that_makes_a_preferred_size_goes_at_once():
    waiting = queue([job(0, rows=2)], preferred_batch_sizes=(4, 8), max_delay=1.0, priority_levels=2)
    assert waiting.take(0.0) == []
    waiting.add(Rows(4, KEYS[0]), job(1, rows=4, priority=1))
    assert numbers(waiting.take(0.0)) == [1]


def test_a_shape_that_is_full_does_not_wait_behind_one_that_is_held():
    waiting = queue([job(0), *(job(number, 0.1, key=1) for number in range(1, 3))], max_batch_size=2, max_delay=1.0)
    assert numbers(waiting.take(0.1)) == [1, 2]


def test_models_whose_requests_run_alone_are_not_held():
    assert numbers(queue(singles(2), joins=False, max_delay=5.0, preferred_batch_sizes=(8,)).take(0.0)) == [0]
    assert numbers(queue(singles(2, key=2), max_delay=5.0).take(0.0)) == [0]


def test_the_largest_preferred_size_that_can_be_formed_runs_and_the_rest_when_the_delay_is_over():
    waiting = queue(singles(11), preferred_batch_sizes=(4, 8), max_delay=0.1)
    assert [len(waiting.take(0.0)), len(waiting.take(0.0))] == [8, 0]
    assert len(waiting.take(0.1)) == 3
    three_rows = queue([job(number, rows=3) for number in range(3)], preferred_batch_sizes=(4,), max_batch_size=6, max_delay=9.0)
    assert [len(three_rows.take(0.0)), len(three_rows.take(0.0))] == [2, 0], "whoever comes later can't make it four"


def test_urgent_requests_run_first_and_the_room_they_leave_goes_to_others_in_order():
    priorities = [0, 2, 1, 0, 1]
    waiting = queue([job(number, priority=level) for number, level in enumerate(priorities)], priority_levels=2, max_batch_size=3)
    assert numbers(waiting.take(0.0)) == [2, 4, 0]
    assert numbers(waiting.take(0.0)) == [1, 3]


def test_a_priority_that_is_none_of_the_levels_is_the_default():
    said = ServingSettings(priority_levels=3, default_priority_level=2)
    assert [said.level(each) for each in (1, 2, 3, 0, 4, -1, "1", True, None)] == [1, 2, 3, 2, 2, 2, 2, 2, 2]
    assert [ServingSettings(priority_levels=3, default_priority_level=each).level(0) for each in (None, 9)] == [3, 3]
    assert DEFAULTS.level(1) == 0


def test_a_flood_of_one_level_leaves_the_places_of_the_others():
    waiting = queue(singles(2), max_queue_size=2, priority_levels=2)
    with pytest.raises(QueueFullError, match="2 requests of priority 2 wait"):
        waiting.add(Rows(1, KEYS[0]), job(2))
    waiting.add(Rows(1, KEYS[0]), job(3, priority=1))
    assert numbers(waiting.take(0.0)) == [3, 0, 1]


def test_what_is_said_anew_holds_for_those_who_wait_already():
    waiting = queue([job(0), job(1, priority=1)], max_delay=9.0)
    assert waiting.take(0.0) == []
    waiting.configure(ServingSettings(priority_levels=2, max_batch_size=1))
    assert [numbers(waiting.take(0.0)), numbers(waiting.take(0.0))] == [[1], [0]]
    waiting.add(Rows(1, KEYS[0]), job(2, priority=2))
    waiting.configure(DEFAULTS)
    waiting.add(Rows(1, KEYS[0]), job(3, priority=1))
    assert numbers(waiting.take(0.0)) == [2, 3]


def test_what_was_learned_stays_when_something_else_is_said():
    waiting = queue()
    for _ in range(50):
        waiting.ran(KEYS[0], 1, 0.04)
    waiting.configure(ServingSettings(max_queue_size=100))
    for number in range(32):
        waiting.add(Rows(1, KEYS[0]), job(number))
    assert len(waiting.take(0.0)) <= 2
    waiting.configure(ServingSettings(max_batch_size=24))
    assert len(waiting.take(0.0)) == 24


# --- the settings themselves


def test_settings_are_changed_one_by_one_and_taken_back():
    said = DEFAULTS.amended({"max_batch_size": 32, "preferred_batch_sizes": [8, 16], "pinned": True})
    assert said == ServingSettings(max_batch_size=32, preferred_batch_sizes=(8, 16), pinned=True)
    assert said.amended({"max_batch_size": None, "pinned": None}) == ServingSettings(preferred_batch_sizes=(8, 16))
    assert not ServingSettings(pinned=True, keep_alive=60.0, latency=0.05).rules_batches


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch": 3}, "no serving setting 'batch'; there are max_batch_size, max_delay"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_batch_size": "8"}, "max_batch_size"),
        ({"max_delay": float("nan")}, "max_delay"),
        ({"keep_alive": float("inf")}, "keep_alive"),
        ({"pinned": 1}, "pinned"),
        ({"preferred_batch_sizes": [8, 4]}, "ascending"),
        ({"preferred_batch_sizes": [8], "max_batch_size": 4}, "within max_batch_size"),
        ({"default_priority_level": 0}, "default_priority_level"),
        ({"queue_timeout": 0.1, "max_delay": 0.1}, "queue_timeout must be over max_delay"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(changes, text):
    with pytest.raises(BadInputError, match=text):
        DEFAULTS.amended(changes)
