"""Thousands of labs in which everything fails: whatever happens, each request has one answer, and in the end all is as it should.

A failing seed replays exactly.
"""

import time

import pytest
from plane_simulation import COPIES, Plane

from tether.orchestrator.state import ControlState
from tether.orchestrator.workforce import Workforce


def play(seed, *state):
    plane = Plane(seed, *state)
    try:
        plane.run()
    except Exception as error:
        raise AssertionError(f"seed {seed!r}: {type(error).__name__}: {error}") from error
    return plane


@pytest.mark.chaos
def test_row_35_whatever_fails_requests_are_answered_once_and_all_is_restored(chaos, measured):
    started, count, requests, runs = time.monotonic(), chaos.count(10_000, 120), 0, 0
    for run in range(count):
        plane = play(f"{chaos.seed} {run}")
        requests, runs = requests + len(plane.answers), runs + plane.runs.total()
    seconds = time.monotonic() - started
    measured(f"control plane: {count} simulated labs, {requests} requests, {runs} runs, {seconds:.1f} s")
    chaos.record(35, f"control plane: {count} simulated labs, {requests} requests, each answered once, {runs} runs", seconds)


@pytest.mark.parametrize("run", range(3))
def test_the_same_seed_is_the_same_run(chaos, run):
    seeds = [f"{chaos.seed} replay {run}"] * 2
    assert len({play(seed).trace.hexdigest() for seed in seeds}) == 1


class Forgetful(Workforce):
    """Does not look again at the versions of a worker that is gone."""

    def leave(self, address, now, **more):
        touched = set(self.touched)
        super().leave(address, now, **more)
        self.touched = touched


def forgetful(epoch):
    state = ControlState(COPIES, epoch)
    state._workforce.__class__ = Forgetful
    return state


def greedy(epoch):
    """Loads a version wherever it can be loaded."""
    return ControlState(COPIES + 2, epoch)


@pytest.mark.parametrize(("wrong", "found"), [(forgetful, "leads to"), (greedy, "workers load")])
def test_what_is_wrong_is_found_and_its_seed_said_and_it_fails_the_same_way_again(chaos, wrong, found):
    said = set()
    for run in range(30):
        seed = f"{chaos.seed} wrong {run}"
        for _ in range(2):
            try:
                play(seed, wrong)
            except AssertionError as error:
                said.add(str(error))
        if said:
            break
    (told,) = said
    assert told.startswith(f"seed {seed!r}: AssertionError: ")
    assert found in told
