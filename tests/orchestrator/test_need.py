"""How many workers a version needs: as many as requests are under way, up within seconds, down after a minute."""

import random

import pytest

from tether.events import VersionLoad
from tether.orchestrator.need import KEEP, Need
from tether.serving_settings import DEFAULTS, ServingSettings
from tether.types import Digest, ModelVersion

DIGITS = ModelVersion("digits", 1, Digest("1" * 64))


def needs(*loads):
    """Told each second what all gateways saw in it: seconds of answers, and what is open."""
    need = Need()
    for second, (seconds, still_open) in enumerate(loads):
        need.take(DIGITS, VersionLoad(answered=1, seconds=seconds, open=still_open), 1.0, float(second))
    return need


def test_as_many_workers_as_requests_are_under_way():
    assert needs(*[(0.2, 0)] * 6)[DIGITS] == 1
    assert needs(*[(2.4, 0)] * 6)[DIGITS] == 3


def test_gateways_add_up():
    need = Need()
    for second in range(6):
        for seconds in (1.5, 1.4):
            need.take(DIGITS, VersionLoad(answered=1, seconds=seconds), 1.0, float(second))
    assert need[DIGITS] == 3


def test_what_takes_long_counts_before_it_is_answered():
    assert needs(*[(0.0, 4)] * 3)[DIGITS] == 4


def test_one_burst_is_no_load_and_three_seconds_of_it_are():
    assert needs((3.0, 0), (0, 0), (0, 0))[DIGITS] == 1
    assert needs(*[(3.0, 0)] * 3)[DIGITS] == 3


def test_what_was_needed_is_kept_for_a_minute_and_nothing_after_it():
    need = needs(*[(4.0, 0)] * 3)
    assert need.settle(KEEP - 1) == set()
    assert (need[DIGITS], need.is_live) == (4, True)
    assert need.settle(KEEP + 3) == {DIGITS}
    assert (need[DIGITS], need.is_live) == (0, False)


def test_a_request_for_what_is_in_no_memory_needs_one():
    need = Need()
    need.ask(DIGITS, 5.0)
    assert need[DIGITS] == 1


def test_a_load_that_goes_up_and_down_moves_no_copy_each_time():
    need, draws, seen = Need(), random.Random("sawtooth"), []
    for second in range(600):
        need.take(DIGITS, VersionLoad(seconds=(second % 30) / 10 + draws.random() / 10), 1.0, float(second))
        need.settle(float(second))
        seen.append(need[DIGITS])
    assert set(seen[int(KEEP) :]) == {3}


@pytest.mark.parametrize(
    ("said", "copies"),
    [
        (DEFAULTS, [2, 2, 2, 2]),
        (ServingSettings(max_copies=1), [1, 1, 1, 1]),
        (ServingSettings(max_copies=4), [2, 2, 2, 4]),
        (ServingSettings(min_copies=3), [3, 3, 3, 3]),
        (ServingSettings(min_copies=0, max_copies=3), [0, 1, 2, 3]),
        (ServingSettings(min_copies=0), [0, 1, 2, 2]),
        (ServingSettings(spare=True), [2, 2, 3, 3]),
        (ServingSettings(min_copies=1, max_copies=1, spare=True), [1, 2, 2, 2]),
        (ServingSettings(min_copies=0, max_copies=4, spare=True), [0, 2, 3, 5]),
    ],
)
def test_copies_follow_the_need_within_what_was_said(said, copies):
    assert [said.copies(need, 2) for need in (0, 1, 2, 9)] == copies
    assert said.follows_load or len(set(copies)) == 1
