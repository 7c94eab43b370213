"""Whose turn it is among streams, and streams of a model in a process of its own."""

import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import ModelDiedError, ModelFailedError, QueueFullError, WorkerLostError
from tether.runtimes import inspect
from tether.types import InferRequest, ModelInfo, ModelVersion, TensorSpec
from tether.wire.frames import PART, WITHDRAWN
from tether.worker.run_guard import RunGuard
from tether.worker.runner import RunnerModel, RunnerPool
from tether.worker.streaming import StreamServer, Turns

VERSION = ModelVersion("m", 1, "0" * 64)
SOURCE = """
import os
import time

class Mine:
    inputs = [("n", "INT64", (1,))]
    outputs = [("y", "INT64", (-1,))]

    def generate(self, n):
        try:
            for number in range(abs(int(n[0]))):
                yield {"y": [number]}
            match int(n[0]):
                case -1: os._exit(3)
                case -2: 1 / 0
                case -3:
                    while True: sum(range(100))
        finally:
            try:
                while n[0] >= 1 << 40: sum(range(100))
            except KeyboardInterrupt:
                time.sleep(int(n[0]) - (1 << 40))
"""


@dataclass
class Job:
    key: int
    deadline: float = 1e9
    is_withdrawn: bool = False
    request: InferRequest | None = None


def asked(number):
    return {"n": np.array([number])}


@pytest.fixture(scope="module")
def pool():
    pool = RunnerPool()
    yield pool
    pool.close()


@pytest.fixture
def model(tmp_path, pool):
    (tmp_path / "model.py").write_text(SOURCE)
    model = RunnerModel(tmp_path, inspect(tmp_path), 1, pool)
    yield model
    model.close()


def values(parts):
    return [int(part["y"][0]) for part in parts]


def test_streams_of_a_process_take_turns_with_each_other_and_with_runs(model):
    with closing(model.stream(asked(3))) as one, closing(model.stream(asked(2))) as other:
        assert values([next(one), next(other), next(one)]) == [0, 0, 1]
        assert model.run(asked(2))["y"].tolist() == [0, 1]
        assert (values(one), values(other)) == ([2], [1])


def test_a_stream_that_ends_the_process_ends_the_others_and_is_the_one_to_blame(model):
    with closing(model.stream(asked(5))) as innocent, closing(model.stream(asked(-1))) as guilty:
        next(innocent), next(guilty)
        with pytest.raises(ModelDiedError, match="exit status 3"):
            next(guilty)
        with pytest.raises(WorkerLostError, match="waited for its turn"):
            next(innocent)
    assert values(model.stream(asked(2))) == [0, 1]


def test_a_step_that_fails_ends_its_stream_only(model):
    with closing(model.stream(asked(2))) as one, closing(model.stream(asked(-2))) as other:
        next(one)
        assert values([next(other), next(other)]) == [0, 1]
        with pytest.raises(ModelFailedError, match="ZeroDivisionError"):
            next(other)
        assert values(one) == [1]


def test_a_process_that_dies_between_runs_is_no_interrupted_one_because_the_last_run_was(model):
    process, errors = psutil.Process(model.pid), []

    def run():
        try:
            model.run(asked(-3))
        except ModelFailedError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    begun = process.cpu_times().user
    while process.cpu_times().user < begun + 0.2:  # it spins
        time.sleep(0.01)
    model.interrupt()
    thread.join()
    assert "interrupted" in errors[0]
    process.kill()
    with pytest.raises(ModelDiedError) as caught:
        next(model.stream(asked(1)))
    assert caught.value.args[1] is False
    assert values(model.stream(asked(2))) == [0, 1]


@contextmanager
def watched(guard):
    """As the engine does."""
    over = threading.Event()

    def watch():
        while not over.wait(0.25):
            guard.look(time.monotonic(), lambda: None)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.parametrize("number", [1 << 40, (1 << 40) + 1])
def test_a_generator_that_goes_on_when_it_is_left_is_interrupted_and_may_take_its_time_to_end(model, number):
    left, pid, replies = Job(0, request=InferRequest(asked(number))), model.pid, []
    guard = RunGuard(VERSION, model)
    server = StreamServer(VERSION, model, guard, lambda job, status, *_: replies.append((job.key, status)), lambda *_: None)
    server.add(left)
    server.step()
    left.is_withdrawn = True
    with watched(guard):
        assert server.step() > 0.25
    assert (replies, len(server)) == ([(0, PART), (0, WITHDRAWN)], 0)
    assert (model.run(asked(1))["y"].tolist(), model.pid) == ([0], pid)


def steps(turns, count):
    """Whose turn it was, where each reader takes a part at once."""
    order = []
    for _ in range(count):
        stream = turns.next(0.0)
        turns.sent(stream, 10)
        turns.taken(stream.job.key)
        order.append(stream.job.key)
    return order


@given(st.integers(1, 12), st.integers(1, 5))
def test_open_streams_have_equal_turns_and_the_others_wait(streams, most_open):
    turns = Turns(most_open)
    for key in range(streams):
        turns.add(Job(key))
    open_ones = min(streams, most_open)
    assert steps(turns, 3 * open_ones) == [*range(open_ones)] * 3


def test_who_comes_when_hundreds_wait_is_told_so():
    turns = Turns(1)
    for key in range(257):
        turns.add(Job(key))
    with pytest.raises(QueueFullError, match="256"):
        turns.add(Job(257))
    assert len(turns) == 257


@given(st.lists(st.integers(1, 5 << 20), min_size=1, max_size=12))
def test_what_is_under_way_to_a_reader_is_bounded(sizes):
    turns = Turns()
    turns.add(Job(0))
    for size in sizes:
        stream = turns.next(0.0)
        if stream is None:
            break
        turns.sent(stream, size)
    under_way = turns._open[0].under_way
    assert len(under_way) <= 4
    assert sum(under_way) - under_way[-1] < 4 << 20


def test_a_reader_that_waits_holds_up_nobody_and_goes_on_when_it_reads():
    turns = Turns()
    turns.add(Job(0))
    turns.add(Job(1))
    for _ in range(4):
        turns.sent(turns._open[0], 10)
    assert steps(turns, 3) == [1, 1, 1]
    turns.taken(0)
    turns.taken(7)  # has ended meanwhile
    assert 0 in steps(turns, 2)


def test_who_is_not_waited_for_is_next_whether_it_began_or_not():
    turns = Turns(1)
    jobs = [Job(0), Job(1), Job(2, deadline=5.0), Job(3)]
    for job in jobs:
        turns.add(job)
    turns.withdraw(lambda job: job.key == 1, until=12.0)
    assert [job.deadline for job in jobs] == [1e9, 12.0, 5.0, 1e9]
    ended = []
    while (stream := turns.next(10.0)).is_unwanted(10.0):
        ended.append(stream.job.key)
        turns.remove(stream)
    assert (ended, stream.job.key, len(turns)) == ([1, 2], 0, 2)
    turns.remove(stream)
    assert steps(turns, 1) == [3]


def test_parts_that_do_not_fit_the_protocol_end_the_stream_and_its_generator():
    class Odd:
        info = ModelInfo("custom", "custom", (), (TensorSpec("y", "FP32", (1,)),), False, False, True, streams=True)
        ended = False

        def stream(self, _inputs):
            try:
                yield {"other": np.ones(1)}
            finally:
                self.ended = True

        run = interrupt = close = None

    refused = []
    server = StreamServer(VERSION, Odd(), RunGuard(VERSION, Odd()), None, lambda _job, error: refused.append(type(error).__name__))
    server.add(Job(0, request=InferRequest({})))
    server.step()
    assert (refused, len(server), server._loaded.ended) == (["InternalError"], 0, True)
