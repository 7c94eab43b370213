"""Who holds what: every model has its copies again after a loss, and nothing moves that need not."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.errors import BadInputError
from tether.manager.peering.progress import Progress
from tether.manager.peering.replication import PATIENCE, Copies, Plan, Policy, Presence, Site, plan

LABS = [f"{number:064x}" for number in range(1, 9)]
MIB = 1 << 20


def sites(*peers, room=None):
    return [Site(peer, room=room) for peer in peers]


def model(name, held=(), nbytes=MIB, **policy):
    return Copies(name, nbytes, Policy(**policy), frozenset(held))


def carried_out(models, made: Plan):
    """What is there when all of the plan was done."""
    coming = {(copy.model, copy.to) for copy in made.fetch if copy.sources}
    return [
        Copies(each.model, each.nbytes, each.policy, each.held | {peer for name, peer in coming if name == each.model}) for each in models
    ]


def settled(names, here, copies=2):
    """Models published by turns, replicated."""
    models = [model(name, {here[number % len(here)]}, copies=copies) for number, name in enumerate(names)]
    return carried_out(models, plan(models, sites(*here)))


@settings(max_examples=30)
@given(st.integers(0, 2), st.text(min_size=1, max_size=5))
def test_of_three_managers_one_dies_and_every_model_has_two_copies_again_and_none_moved(dead, salt):
    names = [f"{salt}-{number}" for number in range(30)]
    models = settled(names, LABS[:3])
    assert all(len(each.held) == 2 for each in models)
    left = [peer for number, peer in enumerate(LABS[:3]) if number != dead]

    after = plan(models, sites(*left))

    assert not after.short
    for each in models:
        stayed = each.held & set(left)
        assert stayed
        assert set(after.holders[each.model]) == set(left)
        assert [copy.to for copy in after.fetch if copy.model == each.model] == sorted(set(left) - stayed)
        assert all(copy.sources for copy in after.fetch)
    assert plan(carried_out(models, after), sites(*left)).fetch == ()


@settings(max_examples=25)
@given(st.data())
def test_one_lab_more_or_less_changes_at_most_one_holder_of_a_model_and_none_needlessly(data):
    here = data.draw(st.lists(st.sampled_from(LABS), min_size=2, max_size=7, unique=True))
    copies = data.draw(st.integers(1, 4))
    models = settled([f"m{number}" for number in range(8)], here, copies)
    for _ in range(5):
        made = plan(models, sites(*here))
        models = carried_out(models, made)
        before = {each.model: set(made.holders[each.model]) & each.held for each in models}  # less what came of nowhere
        others = sorted(set(LABS) - set(here))
        joins = len(here) < 2 or (bool(others) and data.draw(st.booleans()))
        changed = data.draw(st.sampled_from(others if joins else here))
        here = [*here, changed] if joins else [peer for peer in here if peer != changed]
        after = plan(models, sites(*here))
        fetched = {(copy.model, copy.to) for copy in after.fetch}
        for name, holders in after.holders.items():
            came, went = set(holders) - before[name], before[name] - set(holders)
            assert len(came) <= 1 or not before[name]  # all copies were away
            if joins and went:  # one that comes back with its copy may count in place of another: no byte moves
                assert came == {changed}
                assert (name, changed) not in fetched
            else:
                assert went <= {changed}
                assert not came or len(before[name]) - len(went) < min(copies, len(here))


@given(st.lists(st.tuples(st.sets(st.sampled_from(LABS)), st.integers(1, 4)), max_size=8), st.sets(st.sampled_from(LABS)), st.randoms())
def test_who_sees_the_same_decides_the_same(held, here, shuffle):
    models = [model(f"m{number}", who, copies=copies) for number, (who, copies) in enumerate(held)]
    known = sites(*here)
    first = plan(models, known)
    shuffle.shuffle(models)
    shuffle.shuffle(known)
    assert plan(models, known) == first
    for each in models:
        holders = first.holders[each.model]
        assert len(holders) == min(each.policy.copies, len(here))
        assert set(holders) <= here
        wanted = each.policy.copies
        assert set(holders) >= each.held & here or len(each.held & here) > wanted


def test_copies_are_spread_evenly():
    models = settled([f"m{number}" for number in range(400)], LABS, copies=3)
    counts = [sum(peer in each.held for each in models) for peer in LABS]
    assert sum(counts) == 1200
    assert max(counts) < 1.35 * min(counts)


def test_the_rarest_are_fetched_first_and_what_nobody_has_last():
    models = [
        model("b", LABS[:2], copies=4),
        model("a", LABS[:1], copies=4),
        model("c", [LABS[7]], copies=2),
        model("d", LABS[:3], copies=4),
    ]
    made = plan(models, sites(*LABS[:4]))
    assert [copy.model for copy in made.fetch] == ["a", "a", "a", "b", "b", "d", "c", "c"]
    assert [copy.model for copy in made.fetched_by(LABS[3])][:1] == ["a"]
    assert not made.fetch[-1].sources


def test_what_is_under_way_is_not_given_to_another():
    here = LABS[:3]
    lone = model("m", [here[0]], copies=2)
    chosen = plan([lone], sites(*here)).fetch[0].to
    rival = next(peer for peer in here[1:] if peer != chosen)
    under_way = Copies("m", MIB, Policy(copies=2), frozenset({here[0]}), frozenset({rival}))
    assert [copy.to for copy in plan([under_way], sites(*here)).fetch] == [rival]


def test_whole_copies_count_before_those_that_are_coming():
    for name in map(str, range(20)):
        here = Copies(name, MIB, Policy(copies=2), frozenset(LABS[:2]), frozenset({LABS[2]}))
        made = plan([here], sites(*LABS[:3]))
        assert made.holders == {name: tuple(LABS[:2])}
        assert made.fetch == ()


def test_a_policy_keeps_models_in_its_regions_and_spread_over_them():
    here = [Site(peer, region) for peer, region in zip(LABS, ["eu", "eu", "eu", "us", "us", "asia", "asia", "asia"], strict=True)]
    regions = {site.peer: site.region for site in here}
    for number in range(30):
        made = plan([model(f"m{number}", [LABS[0]], copies=3), model(f"n{number}", [LABS[0]], copies=2, regions=("us", "asia"))], here)
        assert sorted(regions[peer] for peer in made.holders[f"m{number}"]) == ["asia", "eu", "us"]
        assert sorted(regions[peer] for peer in made.holders[f"n{number}"]) == ["asia", "us"]
        assert made.surplus == ()  # the copy elsewhere stays until those are there


def test_a_region_with_too_few_labs_is_told():
    made = plan([model("m", [LABS[0]], copies=3, regions=("eu",))], [Site(LABS[0], "us"), Site(LABS[1], "eu")])
    assert made.holders == {"m": (LABS[1],)}
    assert made.short == {"m": "1 of 3 copies: 1 labs in eu are here"}


def test_pinned_labs_hold_it_whatever_their_room_and_count_as_copies():
    here = [Site(LABS[0]), Site(LABS[1], room=0), Site(LABS[2])]
    made = plan([model("m", [LABS[0]], copies=2, pin=(LABS[1], LABS[5]))], here)
    assert made.holders == {"m": (LABS[0], LABS[1])}
    three = plan([model("m", LABS[:1], copies=1, pin=tuple(LABS[1:3]))], here)
    assert set(LABS[1:3]) <= set(three.holders["m"])


def test_a_budget_bounds_the_copies_and_leaves_one():
    assert Policy(copies=5, budget=3 * MIB).wanted(MIB) == 3
    assert Policy(copies=5, budget=0).wanted(MIB) == 1
    assert Policy(copies=5).wanted(MIB) == 5
    made = plan([model("m", [LABS[0]], copies=5, budget=2 * MIB)], sites(*LABS))
    assert len(made.holders["m"]) == 2
    assert not made.short


@pytest.mark.parametrize("wrong", [{"copies": 0}, {"copies": 1001}, {"budget": -1}])
def test_a_policy_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(BadInputError):
        Policy(**wrong).checked()
    assert Policy(copies=3).checked() == Policy(copies=3)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_no_lab_is_given_more_than_it_has_room_for(sizes, rooms):
    here = [Site(LABS[7]), *(Site(peer, room=room) for peer, room in zip(LABS, rooms, strict=False))]
    models = [model(f"m{number}", [LABS[7]], nbytes=nbytes, copies=3) for number, nbytes in enumerate(sizes)]
    made = plan(models, here)
    for site in here[1:]:
        held = sum(each.nbytes for each in models if site.peer in made.holders[each.model])
        assert held <= site.room
    for each in models:
        assert (len(made.holders[each.model]) < 3) == (each.model in made.short)


def test_one_copy_too_many_is_told_only_when_enough_whole_ones_are_there():
    here = sites(*LABS[:4])
    assert plan([model("m", LABS[:2], copies=2)], here).surplus == ()
    ((name, peer),) = plan([model("m", LABS[:3], copies=2)], here).surplus
    assert name == "m"
    kept = plan([model("m", LABS[:3], copies=2)], here).holders["m"]
    assert peer not in kept
    pinned = plan([model("m", LABS[:3], copies=2, pin=(peer,))], here)
    assert peer in pinned.holders["m"]


def test_a_lab_that_comes_back_with_its_copy_moves_nothing():
    models = settled([f"m{number}" for number in range(30)], LABS[:3])
    without = plan(models, sites(*LABS[:2]))
    restored = carried_out(models, without)
    back = plan(restored, sites(*LABS[:3]))
    assert back.fetch == ()
    assert all(len(holders) == 2 for holders in back.holders.values())
    assert {name for name, _ in back.surplus} == {each.model for each in restored if len(each.held) == 3}


@settings(max_examples=25)
@given(st.integers(0, 1_000_000))
def test_through_any_losses_that_leave_a_copy_every_model_is_whole_again(seed):
    draw = random.Random(f"losses {seed}")
    here = LABS[:5]
    models = settled([f"m{number}" for number in range(30)], here)
    for _ in range(12):
        gone = draw.choice(here)
        here = [peer for peer in here if peer != gone]
        models = carried_out(models, plan(models, sites(*here)))
        assert all(len(each.held & set(here)) >= 2 for each in models)
        here = [*here, draw.choice([peer for peer in LABS if peer not in here])]


def test_a_plan_for_thousands_of_models_is_quick(measured):
    import time

    models = [model(f"m{number}", [LABS[number % 8]], copies=3) for number in range(3_000)]
    started = time.process_time()
    made = plan(models, sites(*LABS))
    measured(f"a plan for 3,000 models at 8 labs: {time.process_time() - started:.2f} s of CPU")
    assert len(made.fetch) == 6_000


# --- who is here


def test_a_lab_is_missed_after_a_while_and_not_at_once():
    presence = Presence(0.0)
    for second in range(10):
        presence.heard("a", second)
        presence.heard("b", 0.0)
        assert presence.here(second) == {"a", "b"}
    assert presence.here(PATIENCE) == {"a"}
    presence.left("a")
    assert presence.here(PATIENCE) == frozenset()


def test_after_a_sleep_of_this_host_nobody_is_taken_for_lost():
    presence = Presence(0.0)
    presence.heard("a", 0.0)
    assert presence.here(1.0) == {"a"}
    assert presence.here(3600.0) == {"a"}
    for second in range(1, 10):
        assert presence.here(3600.0 + second) == {"a"}
    assert presence.here(3600.0 + PATIENCE) == frozenset()


# --- progress


steps = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 2000), st.floats(-5, 100)), max_size=30)


@given(steps)
def test_progress_never_goes_backwards_and_is_full_only_at_the_end(updates):
    progress, now = Progress(), 0.0
    for done, total, passed in updates:
        before, now = progress, now + passed
        progress = progress.updated(done, total, now, peers=2)
        assert before.fraction <= progress.fraction < 1.0
        assert before.done <= progress.done <= progress.total
        assert progress.rate >= 0.0
        assert progress.remaining is None or progress.remaining >= 0.0
        assert str(progress)
    end = progress.finished(now)
    assert end.fraction == 1.0
    assert end.done == end.total
    assert end.updated(0, 10_000, now + 1) == end
    assert "100 %" in str(end)


def test_progress_says_how_fast_and_how_long():
    progress = Progress().updated(500 * MIB, 1000 * MIB, 100.0)
    for second in range(1, 41):
        progress = progress.updated((500 + 10 * second) * MIB, 1000 * MIB, 100.0 + second, peers=3)
    assert progress.rate == pytest.approx(10 * MIB, rel=0.01)
    assert progress.remaining == pytest.approx(10.0, rel=0.01)
    assert str(progress) == " 90 %, 900.0 of 1000.0 MiB, 10.5 MB/s from 3 peers, 10 s left"


def test_a_damaged_blob_that_is_fetched_again_takes_nothing_back():
    progress = Progress().updated(90, 100, 0.0).updated(50, 100, 1.0)
    assert (progress.done, progress.fraction) == (90, 0.9)
    assert progress.updated(95, 200, 2.0).fraction == 0.9
