"""Who gets a copy: the lab's own workers, and lent ones for what too few of those can hold."""

from hypothesis import given
from hypothesis import strategies as st

from tether.orchestrator.placement import Candidate, mismatch, nowhere, place, surplus
from tether.serving_settings import ServingSettings
from tether.types import WorkerSite


def worker(name, models=0, **more):
    """As the lab's own, idle and able."""
    return Candidate(name, **({"loaded": False, "loading": False, "able": True, "lent": False} | more), models=models)


def lent(name, **more):
    return worker(name, lent=True, **more)


def test_a_lent_worker_gets_nothing_while_enough_of_the_lab_can_hold_it():
    assert place([lent("b"), worker("w1"), worker("w2")], 2) == ["w1"]
    assert place([lent("b"), worker("w1", loaded=True), worker("w2", loading=True)], 2) == []
    assert place([lent("b"), worker("w1", loaded=True), worker("w2", 7)], 2) == ["w2"]


def test_a_lent_worker_gets_the_copy_that_the_lab_has_no_worker_for():
    assert place([lent("b"), worker("w1")], 2) == ["w1"]
    assert place([lent("b"), worker("w1", loaded=True)], 2) == ["b"]
    assert place([lent("b"), worker("w1", able=False)], 2) == ["b"]
    assert place([lent("b"), lent("c", models=1)], 2) == ["b"]
    assert place([lent("b", loaded=True), lent("c", models=1)], 2) == ["c"]


def test_the_lab_takes_its_copies_though_lent_workers_have_some():
    assert place([lent("b", loaded=True), lent("c", loaded=True), worker("w1"), worker("w2")], 2) == ["w1", "w2"]
    assert place([lent("b", loading=True), worker("w1")], 2) == ["w1"]


def test_a_copy_that_is_not_the_only_one_goes_where_it_puts_nobody_out():
    full = {"roomy": False}
    assert place([worker("w1", **full), worker("w2", 7)], 2) == ["w2"]
    assert place([worker("w1", 3, **full), worker("w2", **full)], 2) == ["w2"]
    assert place([worker("w1", loaded=True), worker("w2", **full), worker("w3", 7)], 2) == ["w3"]
    assert place([worker("w1", loaded=True), worker("w2", **full)], 2) == []
    assert place([worker("w1", **full), lent("b", loading=True)], 2) == [], "who put it out just now is left alone while another lab has it"


def test_copies_are_spread_over_hosts_then_over_workers():
    there = worker("a1", loaded=True, host="a")
    assert place([there, worker("a2", host="a"), worker("b1", 7, host="b")], 2) == ["b1"]
    assert place([there, worker("a2", host="a"), worker("b1", 7, host="b"), worker("b2", 8, host="b")], 3) == ["b1", "a2"]
    assert place([there, worker("a2", host="a", has_gpu=True), worker("b1", host="b")], 2) == ["a2"], "a GPU is worth more"


def test_of_too_many_copies_those_go_that_would_come_last():
    copies = [worker("a1", 1, loaded=True, host="a"), worker("a2", 3, loaded=True, host="a"), worker("b1", 9, loaded=True, host="b")]
    assert surplus(copies, 3) == []
    assert surplus(copies, 2) == ["a2"]
    assert surplus(copies, 1) == ["a2", "b1"]
    assert surplus([*copies, worker("c", loading=True)], 3) == []


def test_lent_copies_stay_until_nobody_is_to_have_one():
    copies = [worker("w1", loaded=True), lent("b", loaded=True)]
    assert surplus(copies, 1) == []
    assert sorted(surplus(copies, 0)) == ["b", "w1"]
    assert place([worker("w1"), lent("b")], 0) == []


EVERYWHERE = WorkerSite("eu-west", ("gpu=a100", "disk=fast"))


def test_what_was_said_of_where_it_runs_names_what_a_worker_lacks():
    assert mismatch(ServingSettings(region="eu-west", labels=("gpu=a100",)), 0, EVERYWHERE) == ""
    assert mismatch(ServingSettings(device="gpu", region="mars"), 0, EVERYWHERE) == "it has no GPU"
    assert mismatch(ServingSettings(region="us-east"), 0, EVERYWHERE) == "it is in eu-west, not in us-east"
    assert mismatch(ServingSettings(region="us-east"), 0, WorkerSite()) == "it is in no region, not in us-east"
    assert mismatch(ServingSettings(labels=("gpu=a100", "x=1", "y=2")), 0, EVERYWHERE) == "it has no label x=1, y=2"


def test_a_wish_that_no_worker_meets_is_refused_with_what_is_lacking_and_both_ways_out():
    workers = [(0, EVERYWHERE), (1, WorkerSite("us-east"))]
    assert nowhere("digits:1", ServingSettings(device="gpu", region="us-east"), workers) == ""
    assert nowhere("digits:1", ServingSettings(region="mars"), []) == "", "a lab without workers has another reason"
    reason = nowhere("digits:1", ServingSettings(device="gpu", region="mars"), workers)
    assert reason == (
        "digits:1 is to run in mars, and no worker does: start one (`tether worker --gpus 1 --region mars`), "
        "or `tether serving digits --unset region`"
    )
    together = nowhere("digits:1", ServingSettings(device="gpu", labels=("gpu=a100",)), workers)
    assert "on a GPU, where gpu=a100 is," in together
    assert "`tether serving digits --device any --unset labels`" in together


Candidates = st.lists(
    st.builds(worker, st.just(""), st.integers(0, 3), loaded=st.booleans(), loading=st.booleans(), able=st.booleans(), lent=st.booleans())
)


@given(Candidates, st.integers(1, 4))
def test_no_more_than_is_missing_and_lent_ones_last(drawn, copies):
    candidates = [
        Candidate(f"w{number}", each.loaded, each.loading, each.able, each.models, each.lent) for number, each in enumerate(drawn)
    ]
    by_name = {each.address: each for each in candidates}
    chosen = [by_name[address] for address in place(candidates, copies)]
    wanted = copies if any(each.loaded for each in candidates) else 1
    assert len(set(chosen)) == len(chosen)
    assert all(each.able and not each.has for each in chosen)
    for kind in (True, False):
        having = sum(each.has for each in candidates if each.lent is kind)
        asked = sum(each.lent is kind for each in chosen)
        assert asked == 0 or having + asked <= wanted
    able = sum(each.has or each.able for each in candidates if not each.lent)
    if any(each.lent for each in chosen):
        assert able < wanted
    elif not chosen:
        could = [each for each in candidates if each.able and not each.has]
        assert all(each.lent for each in could) or sum(each.has for each in candidates if not each.lent) >= wanted
