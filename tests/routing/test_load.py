"""What a gateway tells of a version, by how its requests ended."""

import pytest

from tether.errors import (
    BadInputError,
    DeadlineExceededError,
    InternalError,
    MemoryFullError,
    ModelFailedError,
    NoWorkerError,
    PoisonInputError,
    QueueFullError,
    TooManyTriesError,
    WorkerLostError,
)
from tether.events import VersionLoad
from tether.routing.load import LoadCounter
from tether.wire.oip import encode_error


def ended(*errors):
    counter = LoadCounter()
    for error in errors:
        counter.open += 1
        counter.ended(error.http_status, encode_error(error), 0.5)
    return counter.take()


def test_nothing_is_told_where_nothing_was_seen():
    counter = LoadCounter()
    assert counter.take() is None
    counter.open += 1
    assert counter.take() == VersionLoad(open=1)
    counter.ended(499, b"", 1.0)
    assert counter.take() is None


def test_answers_are_counted_with_their_times_and_told_once():
    counter = LoadCounter()
    for seconds in (0.1, 0.4, 0.2):
        counter.open += 1
        counter.ended(200, b"{}", seconds)
    load = counter.take()
    assert (load.answered, load.slowest, load.open) == (3, 0.4, 0)
    assert load.seconds == pytest.approx(0.7)
    assert counter.take() is None


@pytest.mark.parametrize("error", [BadInputError("no"), PoisonInputError("no")])
def test_a_refusal_that_is_the_callers_own_fault_is_an_answer(error):
    assert ended(error).answered == 1


@pytest.mark.parametrize("error", [ModelFailedError("no"), InternalError("no"), WorkerLostError("no"), DeadlineExceededError("no")])
def test_errors_of_the_model_its_worker_or_its_deadline_are_failures(error):
    assert ended(error) == VersionLoad(failed=1)


@pytest.mark.parametrize("error", [QueueFullError("no"), NoWorkerError("no"), MemoryFullError("no"), TooManyTriesError("no")])
def test_what_found_no_room_was_refused(error):
    assert ended(error) == VersionLoad(refused=1)
