"""How a new version takes the place of an old one, or goes back: values and a time in, values out."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from tether.events import CatalogModel, GatewayLoad, VersionLoad
from tether.orchestrator.instructions import EndRollout
from tether.orchestrator.rollout import Rollouts, Tally, objection
from tether.routing.table import Canary, Route, VersionEntry
from tether.serving_settings import Rollout, ServingSettings
from tether.types import Digest, ModelInfo, ModelVersion, TensorSpec, WorkerId

SPEC = TensorSpec("x", "FP32", (-1, 4))
INFO = ModelInfo("onnx", "onnx", (SPEC,), (SPEC,), batched=True, pure=True, code=False)
OLD, NEW = (ModelVersion("digits", number, Digest(f"{number:064x}")) for number in (1, 2))
ASKED = Rollout(2, 1, begun=1000.0, steps=(0.1, 0.5, 1.0), every=10.0)
ROUTES = tuple(Route(WorkerId(f"worker-{number}"), f"/s{number}") for number in (1, 2))


def catalog(rollout=ASKED, default=1, numbers=(1, 2)):
    versions = {number: (ModelVersion("digits", number, Digest(f"{number:064x}")), INFO) for number in numbers}
    return {"digits": CatalogModel("digits", default, {"prod": default}, versions, ServingSettings(rollout=rollout))}


class Lab:
    """A rollout, a clock, and how its two versions do."""

    def __init__(self, rollout=ASKED):
        self.rollouts, self.now, self.ended = Rollouts(), 1000.0, []
        self.states = {OLD: VersionEntry(OLD, INFO, "ready", ROUTES), NEW: VersionEntry(NEW, INFO, "loading")}
        self.rollouts.follow(catalog(rollout), self.now)

    def loaded(self):
        self.states[NEW] = VersionEntry(NEW, INFO, "ready", ROUTES)
        self.look()
        return self

    def look(self):
        self.ended += self.rollouts.proceed(self.states.__getitem__, self.now)

    def passes(self, seconds, new=None, old=None):
        """With so much each second, as one gateway sees it."""
        for _ in range(seconds):
            self.now += 1
            versions = {model: load for model, load in ((NEW, new), (OLD, old)) if load is not None}
            if versions:
                self.rollouts.take(GatewayLoad("g", 1.0, versions), self.now)
            self.look()
        return self

    @property
    def canary(self):
        return self.rollouts.entry(self.states[OLD]).canary

    @property
    def reason(self):
        (ended,) = self.ended
        return ended.rollout.state, ended.rollout.reason


def load(answered=10, each=0.002, **more):
    return VersionLoad(answered=answered, seconds=answered * each, slowest=each if answered else 0.0, **more)


def test_a_new_version_gets_more_and_more_requests_and_is_promoted():
    lab = Lab()
    assert lab.rollouts.wanted == {NEW}
    assert lab.canary is None
    lab.loaded()
    weights = [lab.passes(10 * step and 10, load(), load()) and lab.canary.weight for step in range(3)]
    assert (weights, lab.ended) == ([0.1, 0.5, 1.0], [])
    lab.passes(10, load())
    assert lab.ended == [EndRollout("digits", structs.replace(ASKED, state="promoted"))]
    assert lab.canary == Canary(2, 1.0)  # until the name means it
    lab.rollouts.follow(catalog(structs.replace(ASKED, state="promoted"), default=2), lab.now)
    assert (lab.canary, bool(lab.rollouts)) == (None, False)


def test_it_gets_none_before_as_many_workers_have_it_unless_that_takes_long():
    lab = Lab()
    lab.states[NEW] = VersionEntry(NEW, INFO, "ready", ROUTES[:1])
    lab.passes(15, old=load())
    assert lab.canary is None
    lab.passes(1, old=load())
    assert lab.canary == Canary(2, 0.1)


def test_before_the_first_step_requests_are_copied_to_it_if_that_was_asked_for():
    lab = Lab(structs.replace(ASKED, shadow=0.5)).loaded()
    assert lab.canary == Canary(2, shadow=0.5)
    lab.passes(10, load(), load())
    assert lab.canary == Canary(2, 0.1)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (load(0, worse=1), "requests failed"),
        (load(3, failed=1), "requests failed"),
        (load(3, 0.2), "it takes 200 ms for an answer, version 1 2 ms"),
        (load(0, open=3), "it has not answered for 3 s"),
    ],
    ids=["worse", "failed", "slow", "hangs"],
)
def test_what_does_worse_goes_back_within_five_seconds(new, words):
    lab = Lab().loaded().passes(5, load(), load())
    lab.rollouts, lab.ended = Lab().loaded().rollouts, []
    begun = lab.now
    while not lab.ended and lab.now < begun + 10:
        lab.passes(1, new, load())
    state, reason = lab.reason
    assert (state, lab.canary, lab.rollouts.wanted) == ("reverted", None, set())
    assert words in reason
    assert lab.now - begun <= 5


def test_a_version_that_answers_nothing_needs_to_fail_twice_and_one_that_mostly_does_more_often():
    lab = Lab().loaded().passes(1, load(0, worse=1), load())
    assert lab.ended == []
    assert lab.passes(1, load(0, worse=1), load()).reason[0] == "reverted"
    assert Lab().loaded().passes(1, load(10, worse=2), load()).ended == []


def test_what_goes_wrong_in_the_second_minute_shows_as_soon():
    lab = Lab(structs.replace(ASKED, every=1000.0)).loaded().passes(300, load(50), load(500))
    lab.passes(5, load(45, worse=5), load(500))
    assert lab.reason[0] == "reverted"


def test_requests_that_fail_on_both_are_no_reason():
    lab = Lab().loaded().passes(15, load(9, failed=1), load(90, failed=10))
    assert lab.ended == []


def test_one_slow_answer_in_a_while_is_no_reason():
    lab = Lab(structs.replace(ASKED, every=100.0)).loaded()
    for second in range(60):
        lab.passes(1, VersionLoad(answered=3, seconds=2.0 if second == 30 else 0.006, slowest=2.0 if second == 30 else 0.002), load(30))
    assert lab.ended == []


def test_when_the_new_one_has_all_requests_it_is_compared_with_how_the_old_one_was():
    lab = Lab(structs.replace(ASKED, steps=(0.5, 1.0), every=100.0)).loaded().passes(100, load(), load())
    assert lab.canary.weight == 1.0
    lab.passes(70, load())
    assert lab.ended == []
    lab.passes(40, load(10, 0.1))
    assert lab.reason[0] == "reverted"


def test_a_step_lasts_until_the_new_one_answered_as_many_as_were_asked_for():
    lab = Lab(structs.replace(ASKED, requests=50)).loaded().passes(24, load(2), load())
    assert lab.canary.weight == 0.1
    lab.passes(1, load(2), load())
    assert lab.canary.weight == 0.5


def test_a_rollout_of_days_keeps_what_the_new_version_did_and_no_more_of_the_old_one_than_a_while():
    lab = Lab(structs.replace(ASKED, every=1e6)).loaded()
    lab.passes(2, load(1, worse=1), load()).passes(3000, None, load()).passes(1, load(1, worse=1), load())
    (trial,) = lab.rollouts._trials.values()
    assert len(trial._seen) <= 122
    assert lab.reason[1].startswith("3 of 6 requests failed")


def test_nobody_asks_and_it_is_promoted_all_the_same():
    assert Lab().loaded().passes(30).reason == ("promoted", "")


def test_what_can_not_be_loaded_goes_back_and_says_why():
    lab = Lab()
    lab.states[NEW] = VersionEntry(NEW, INFO, "failed", (), "bad_model: no graph")
    lab.look()
    assert lab.reason == ("reverted", "it can't be loaded: bad_model: no graph")


def test_what_is_never_loaded_goes_back():
    lab = Lab()
    lab.states[NEW] = VersionEntry(NEW, INFO, "unloaded", (), "memory_full: no room")
    assert lab.passes(601).reason == ("reverted", "it was not loaded within 600 s: memory_full: no room")


def test_a_version_that_no_worker_has_any_more_is_not_promoted_until_one_has_it_again():
    lab = Lab(structs.replace(ASKED, steps=(0.5,))).loaded()
    lab.states[NEW] = VersionEntry(NEW, INFO, "loading")
    assert lab.passes(60).ended == []
    assert lab.loaded().reason == ("promoted", "")


def test_a_version_that_no_worker_gets_again_goes_back():
    lab = Lab().loaded()
    lab.states[NEW] = VersionEntry(NEW, INFO, "loading")
    assert lab.passes(601).reason[0] == "reverted"


def test_a_version_that_is_deleted_before_the_name_means_it_ends_the_rollout():
    lab = Lab().loaded().passes(30)
    (promoted,) = lab.ended
    lab.rollouts.follow(catalog(numbers=(1,)), lab.now)
    lab.look()
    assert [each.rollout.state for each in lab.ended] == ["promoted", "aborted"]
    assert (lab.rollouts.is_due(promoted), lab.rollouts.is_due(lab.ended[1]), lab.canary) == (False, True, None)


def test_somebody_stops_it():
    lab = Lab().loaded()
    lab.rollouts.follow(catalog(structs.replace(ASKED, state="aborted")), lab.now)
    assert (lab.canary, lab.rollouts.wanted, lab.rollouts.is_waiting) == (None, set(), False)


@pytest.mark.parametrize(
    ("after", "state"),
    [(catalog(default=2), "promoted"), (catalog(default=3, numbers=(1, 2, 3)), "aborted"), (catalog(numbers=(1,)), "aborted")],
    ids=["promoted by hand", "moved elsewhere", "deleted"],
)
def test_who_moves_the_name_by_hand_ends_it(after, state):
    lab = Lab().loaded()
    lab.rollouts.follow(after, lab.now)
    lab.look()
    assert (lab.reason[0], lab.canary) == (state, None)
    assert lab.rollouts.is_due(lab.ended[0])
    lab.rollouts.follow(after, lab.now)
    lab.look()
    assert len(lab.ended) == 1  # said once


def test_how_it_ended_is_written_until_the_catalog_says_so_or_another_one_began():
    lab = Lab()
    lab.states[NEW] = VersionEntry(NEW, INFO, "failed", (), "x")
    lab.look()
    (ended,) = lab.ended
    lab.rollouts.follow(catalog(), lab.now)  # something else changed
    assert lab.rollouts.is_due(ended)
    assert lab.canary is None
    lab.rollouts.follow(catalog(structs.replace(ASKED, begun=2000.0)), lab.now)
    assert not lab.rollouts.is_due(ended)
    assert lab.rollouts.wanted == {NEW}


def test_another_gateway_that_is_answered_does_not_hide_one_that_is_not():
    lab = Lab().loaded()
    for _ in range(5):
        lab.now += 1
        for gateway, new in (("a", load(20)), ("b", load(0, open=2))):
            lab.rollouts.take(GatewayLoad(gateway, 1.0, {NEW: new, OLD: load()}), lab.now)
        lab.look()
    assert "has not answered" in lab.reason[1]


def test_a_gateway_that_went_away_with_requests_open_is_no_reason():
    lab = Lab(structs.replace(ASKED, every=60.0)).loaded()
    lab.rollouts.take(GatewayLoad("gone", 1.0, {NEW: load(0, open=2)}), lab.now)
    assert lab.passes(30, load(), load()).ended == []


@given(st.text(min_size=1, max_size=8), st.integers(4, 400), st.floats(0.001, 1.0))
def test_versions_that_do_the_same_are_mostly_not_told_apart(seed, count, seconds):
    draw = random.Random(seed)

    def seen():
        times = [seconds * draw.uniform(0.9, 1.1) for _ in range(count)]
        return Tally(count, 0, sum(times), (max(times),))

    assert objection(ASKED, seen(), seen()) is None
