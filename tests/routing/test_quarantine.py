"""What is held against inputs that end processes, and for how long."""

from hypothesis import given
from hypothesis import strategies as st

from tether.routing.quarantine import LIVES, Quarantine, mark_of
from tether.types import Digest, ModelVersion

ONE, OTHER = ModelVersion("one", 1, Digest("1" * 64)), ModelVersion("other", 1, Digest("2" * 64))
DEEDS = st.sampled_from(["died", "survived", "condemn", "forget"])
STEPS = st.lists(st.tuples(DEEDS, st.sampled_from([ONE, OTHER]), st.sampled_from("abcdef"), st.integers(0, 9)), max_size=60)


def test_inputs_that_differ_anywhere_have_different_marks():
    assert len({mark_of(b"ab", 0), mark_of(b"ab", 1), mark_of(b"ac", 0), mark_of(b"", 0)}) == 4
    assert mark_of(b"ab", 1) == mark_of(b"ab", 1)


def test_who_was_there_at_two_deaths_is_suspected_of_two_until_it_survives_alone():
    held = Quarantine()
    assert not held.concerns(ONE)
    assert [held.died(ONE, "a", 0.0), held.died(ONE, "b", 0.0), held.died(ONE, "a", 1.0)] == [1, 1, LIVES]
    held.survived(ONE, "a")
    assert [held.deaths(ONE, mark, 2.0) for mark in "ab"] == [0, 1]
    assert held.concerns(ONE)
    assert not held.concerns(OTHER)
    assert not held.is_condemned(ONE, "b", 2.0)


def test_a_condemned_input_is_so_for_an_hour_after_its_last_death_on_its_version_alone():
    held = Quarantine()
    assert held.condemn(ONE, "a", 0.0)
    assert not held.condemn(ONE, "a", 100.0)
    assert held.is_condemned(ONE, "a", 3699.9)
    assert not held.is_condemned(ONE, "a", 3700.0)
    assert not held.is_condemned(OTHER, "a", 1.0)
    assert held.condemned(200.0) == {ONE: {"a": 3700.0}}
    assert held.condemned(3700.0) == {}
    assert not held.concerns(ONE)


def test_a_flood_of_suspects_pushes_out_no_input_that_was_found_out():
    held = Quarantine(most=10)
    held.condemn(ONE, "a", 0.0)
    for number in range(1000):
        held.died(ONE, str(number), 1.0)
    assert held.is_condemned(ONE, "a", 2.0)
    assert [number for number in range(1000) if held.deaths(ONE, str(number), 2.0)] == list(range(990, 1000))


@given(STEPS)
def test_it_is_bounded_ages_and_never_mistakes_one_version_or_input_for_another(steps):
    held, now = Quarantine(most=4, seconds=20.0), 0.0
    died, condemned = {}, {}  # when, by (model, mark): what there may be at most
    for step, model, mark, seconds in steps:
        now += seconds
        match step:
            case "died":
                held.died(model, mark, now)
                died[model, mark] = now
            case "survived":
                held.survived(model, mark)
                died.pop((model, mark), None)
            case "condemn":
                held.condemn(model, mark, now)
                condemned[model, mark] = now
                died.pop((model, mark), None)
            case "forget":
                held.forget([model])
                died = {key: at for key, at in died.items() if key[0] != model}
                condemned = {key: at for key, at in condemned.items() if key[0] != model}
        known = [(each, mark) for each, marks in held.condemned(now).items() for mark in marks]
        assert len(known) <= 4
        assert all(now - condemned[key] < 20 and held.is_condemned(*key, now) for key in known)
        youngest = sorted((key for key, at in condemned.items() if now - at < 20), key=lambda key: condemned[key])[-4:]
        assert len(known) == len(youngest)
        suspects = [(each, mark) for each in (ONE, OTHER) for mark in "abcdef" if held.deaths(each, mark, now)]
        assert len(suspects) <= 4
        assert all(now - died[key] < 20 for key in suspects)
        assert held.concerns(ONE) or not any(each == ONE for each, _ in (*known, *suspects))
