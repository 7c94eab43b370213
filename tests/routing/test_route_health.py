"""Which routes are left out, and when they are tried again: by what one gateway saw of them, in virtual seconds."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.routing.health import ERRORS, Health
from tether.routing.policies import policy_of
from tether.routing.table import Route
from tether.routing.tracks import Track
from tether.types import WorkerId


class Lab:
    """Routes to so many workers, and what was told of them."""

    def __init__(self, count, lent=0):
        self.told, self.open = [], {}
        self.health = Health(lambda track, is_out: self.told.append((track.route.worker, is_out)))
        self.tracks = [self._track(f"w{number}", None) for number in range(count)] + [
            self._track(f"l{number}", 4) for number in range(lent)
        ]
        self.health.follow(self.tracks)

    def _track(self, name, slots):
        self.open[name] = 0
        return Track(Route(WorkerId(name), f"/s/{name}", slots), lambda: self.open[name], lambda: self.open[name])

    @property
    def usable(self):
        return [track for tracks in (self.health.own, self.health.lent) for track in tracks]

    def fail(self, track, times, at=0.0, **terms):
        for _ in range(times):
            self.health.failed(track, at, **terms)

    def probed(self, now):
        """The route that the next request goes to for a probe."""
        track = self.health.due(now)
        if track is not None:
            self.health.probe(track, now)
        return track


def test_who_fails_five_in_a_row_is_out_and_nobody_else():
    lab = Lab(3)
    bad = lab.tracks[0]
    lab.fail(bad, ERRORS - 1)
    assert bad in lab.usable
    lab.health.took(bad, 0.01, 0.1)
    lab.fail(bad, ERRORS - 1, 0.2)
    assert bad in lab.usable
    lab.fail(bad, 1, 0.3)
    assert lab.usable == lab.tracks[1:]
    assert lab.told == [("w0", True)]


def test_a_second_of_errors_is_enough_for_who_gets_few_requests():
    lab = Lab(2)
    lab.fail(lab.tracks[1], 1, 10.0)
    assert len(lab.usable) == 2
    lab.fail(lab.tracks[1], 1, 11.0)
    assert lab.usable == lab.tracks[:1]


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (9, 4)])
def test_never_more_than_half_are_out_and_so_never_the_last(count, most):
    lab = Lab(count)
    for track in lab.tracks:
        lab.fail(track, 20)
    assert len(lab.health.out) == most
    lab.health.follow(lab.tracks[: count // 2 or 1])
    assert lab.usable


def test_who_was_cured_is_back_within_five_seconds_however_long_it_was_ill():
    for ill in (1.0, 10.0, 100.0):
        lab, waits, now = Lab(2), [], 0.0
        bad = lab.tracks[0]
        lab.fail(bad, ERRORS, now)
        while now < ill:
            now = round(now + 0.1, 3)
            if lab.probed(now) is not None:
                waits.append(now)
                lab.health.failed(bad, now)
        while lab.probed(now) is None:
            now = round(now + 0.1, 3)
        lab.health.took(bad, 0.01, now)
        assert now - ill <= 5.0
        assert lab.told == [("w0", True), ("w0", False)]
        assert len(waits) <= ill / 2 + 2, "a probe costs a request"


def test_one_request_at_a_time_is_a_probe_and_one_that_is_given_up_is_none():
    lab = Lab(2)
    lab.fail(lab.tracks[0], ERRORS, 0.0)
    assert lab.probed(0.2) is None
    assert lab.probed(0.6) is lab.tracks[0]
    assert lab.probed(0.7) is None
    lab.health.let_go(lab.tracks[0], 0.8)
    assert lab.probed(1.0) is None
    assert lab.probed(2.0) is lab.tracks[0]


def test_a_worker_that_was_in_order_for_long_is_left_out_for_a_short_time_again():
    lab = Lab(2)
    bad = lab.tracks[0]
    for begun in (0.0, 2.0, 5.0):
        lab.fail(bad, ERRORS, begun)
        assert lab.probed(begun + 4.0) is bad
        lab.health.took(bad, 0.01, begun + 4.0)
    lab.fail(bad, ERRORS, 100.0)
    assert lab.probed(100.6) is bad


def test_inputs_that_the_model_fails_everywhere_take_no_worker_away_and_a_copy_that_fails_alone_goes():
    lab = Lab(3)
    for number, track in itertools.product(range(20), lab.tracks):
        lab.fail(track, 1, number / 10, by_itself=False)
    assert len(lab.usable) == 3
    for number in range(ERRORS):
        for track in lab.tracks[1:]:
            lab.health.took(track, 0.01, 3.0 + number / 10)
        lab.fail(lab.tracks[0], 1, 3.05 + number / 10, by_itself=False)
    assert lab.usable == lab.tracks[1:]


def test_who_answers_many_times_slower_than_the_others_is_out_until_it_does_not():
    lab, now = Lab(3), 0.0
    for number in range(20):
        now = number / 10
        for track, seconds in zip(lab.tracks, (0.5, 0.02, 0.03), strict=True):
            lab.health.took(track, seconds, now)
    lab.health.review(now)
    assert lab.usable == lab.tracks[1:]
    assert lab.probed(now + 1.0) is lab.tracks[0]
    lab.health.took(lab.tracks[0], 0.6, now + 1.6)
    assert lab.usable == lab.tracks[1:]
    assert lab.probed(now + 5.0) is lab.tracks[0]
    lab.health.took(lab.tracks[0], 0.05, now + 5.1)
    assert len(lab.usable) == 3


def test_a_slower_machine_and_another_lab_are_not_out_of_order():
    lab = Lab(3, lent=1)
    for number in range(20):
        for track, seconds in zip(lab.tracks, (0.1, 0.02, 0.03, 0.9), strict=True):
            lab.health.took(track, seconds, number / 10)
    lab.health.review(2.0)
    assert len(lab.usable) == 4


def test_who_falls_silent_while_others_answer_is_out_and_back_with_the_first_sign_of_life():
    lab = Lab(2)
    frozen, other = lab.tracks
    lab.health.took(frozen, 0.01, 0.0)
    lab.open["w0"] = 3
    assert not lab.health.is_silent(frozen, 1.0, 1.9)
    assert lab.health.is_silent(frozen, 1.0, 2.1)
    lab.health.fell_silent(frozen, 1.0, 2.1)
    assert len(lab.usable) == 2, "the other one has answered nothing meanwhile"
    lab.health.took(other, 0.01, 2.2)
    lab.health.fell_silent(frozen, 1.0, 2.3)
    assert lab.usable == [other]
    assert lab.probed(60.0) is None, "that would cost a request seconds"
    lab.open["w0"] = 2
    lab.health.review(60.0)
    assert len(lab.usable) == 2


def test_a_slow_model_may_be_silent_for_longer():
    lab = Lab(2)
    lab.health.took(lab.tracks[1], 2.0, 0.0)
    assert not lab.health.is_silent(lab.tracks[0], 1.0, 6.9)
    assert lab.health.is_silent(lab.tracks[0], 1.0, 7.1)


Happening = st.tuples(st.integers(0, 4), st.sampled_from(["failed", "took", "doubted", "heard", "silent", "slow", "probe", "let go"]))


@given(st.integers(1, 5), st.lists(Happening, max_size=120))
def test_whatever_happens_at_least_half_of_the_routes_are_there(count, happenings):
    lab = Lab(count)
    for now, (number, what) in enumerate(happenings):
        track, at = lab.tracks[number % count], now / 4
        match what:
            case "failed":
                lab.fail(track, 3, at)
            case "doubted":
                lab.fail(track, 3, at, by_itself=False)
            case "took" | "slow":
                lab.health.took(track, 0.01 if what == "took" else 3.0, at)
            case "heard":
                lab.health.heard(track, at)
            case "silent":
                lab.health.fell_silent(track, at - 2.0, at)
            case "let go":
                lab.health.let_go(track, at)
            case "probe":
                lab.probed(at)
                lab.health.review(at)
        assert len(lab.health.out) <= count // 2
        assert len(lab.usable) == count - len(lab.health.out)
        assert all(track.is_out == (track in lab.health.out) for track in lab.tracks)
    for worker in {worker for worker, _ in lab.told}:
        assert [is_out for each, is_out in lab.told if each == worker] == [
            number % 2 == 0 for number in range(sum(each == worker for each, _ in lab.told))
        ]


def test_who_fails_when_its_route_is_gone_is_not_probed_and_keeps_nobody_in():
    lab = Lab(4)
    gone, bad, fine, _ = lab.tracks
    lab.health.follow(lab.tracks[1:])
    lab.fail(gone, 2 * ERRORS)
    assert lab.probed(10.0) is None
    lab.fail(bad, ERRORS)
    assert fine in lab.usable
    assert lab.told == [("w1", True)]


def test_a_worker_that_was_slow_once_is_tried_again_when_that_was_some_time_ago():
    lab, policy, now, chosen = Lab(2), policy_of("latency", random.Random("latency")), 0.0, []
    slow, quick = lab.tracks
    slow.took(2.0, now)
    quick.took(0.01, now)
    for tick in range(6000):
        now = tick / 100
        if tick % 100 == 0:
            lab.health.review(now)
        track = policy.choose(lab.health.own, b"")
        lab.health.took(track, 0.01, now)
        chosen.append(track)
    assert slow not in chosen[:500]
    assert slow in chosen
