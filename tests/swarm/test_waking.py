"""When a node has to announce itself anew, decided without a clock and without a network."""

from hypothesis import given
from hypothesis import strategies as st

from tether.swarm.node.waking import Deed, Look, Waking
from tether.swarm.node.weight import Scales

PATIENCE = 25.0
HOME = "192.0.2.7"


def look(at, outward=HOME, *more):
    return Look(float(at), outward, frozenset({outward, *more} - {None}))


def settled(at=0):
    """One that is announced and has seen nothing unusual."""
    waking = Waking(PATIENCE)
    waking.look(look(at))
    assert waking.told(at, is_announced=True) == ()
    return waking


def test_while_nothing_happens_it_is_asked_now_and_then_and_nothing_is_done():
    waking, asked = settled(), 0
    for at in range(1, 301):
        deeds = waking.look(look(at))
        if deeds == (Deed.ASK,):
            asked += 1
            deeds = waking.told(at, is_announced=True)
        assert deeds == ()
    assert asked == 10


def test_after_a_short_sleep_it_is_announced_anew_and_streams_stay():
    waking = settled()
    assert waking.look(look(10)) == (Deed.WAKE,)
    assert waking.look(look(11)) == (Deed.ASK,)
    assert waking.told(11, is_announced=True) == (Deed.TELL,)
    assert waking.look(look(12)) == ()


def test_after_a_long_sleep_streams_are_cut_first():
    assert settled().look(look(1 + PATIENCE)) == (Deed.CUT, Deed.WAKE)


def test_a_loop_that_is_busy_for_a_moment_has_not_slept():
    assert settled().look(look(3.5)) == ()


def test_a_network_that_comes_later_than_the_processor_is_tried_until_it_works():
    waking = settled()
    assert waking.look(look(1000, None)) == (Deed.CUT, Deed.WAKE)
    asked = (at for at in range(1001, 1100) if waking.look(look(at, None)) == (Deed.ASK,))
    woken = [at for at in asked if waking.told(at, is_announced=False) == (Deed.WAKE,)]
    assert woken == [1001, 1003, 1007, 1016, 1034, 1070]
    assert waking.look(look(1100)) == (Deed.WAKE,), "it does not wait for its turn when the network is there"
    assert waking.look(look(1101)) == (Deed.ASK,)
    assert waking.told(1101, is_announced=True) == (Deed.TELL,)


def test_another_address_towards_the_world_is_another_network():
    waking = settled()
    assert waking.look(look(1, "198.51.100.3")) == (Deed.CUT, Deed.WAKE)


def test_a_network_that_goes_and_comes_back_is_the_same():
    waking = settled()
    assert waking.look(look(1, None)) == (Deed.WAKE,)
    assert waking.look(look(2)) == (Deed.WAKE,)
    assert waking.look(look(3, None)) == (Deed.WAKE,)
    assert waking.look(look(4, "198.51.100.3")) == (Deed.CUT, Deed.WAKE)


def test_a_bridge_of_containers_that_appears_cuts_nobody():
    waking = settled()
    assert waking.look(look(1, HOME, "172.17.0.1")) == (Deed.WAKE,)
    waking.told(1, is_announced=True)
    assert waking.look(look(2, HOME, "172.17.0.1")) == ()


def test_started_without_a_network_it_is_tried_again_and_told_when_it_works():
    waking = Waking(PATIENCE)
    waking.look(look(0, None))
    deeds = [waking.told(at, is_announced=False) for at in range(60) if waking.look(look(at, None)) == (Deed.ASK,)]
    assert (Deed.WAKE,) in deeds
    assert waking.told(60, is_announced=True) == (Deed.TELL,)


def test_announcements_that_are_lost_without_a_sleep_are_found_out():
    waking = settled()
    deeds = [waking.told(at, is_announced=False) for at in range(1, 40) if waking.look(look(at)) == (Deed.ASK,)]
    assert deeds[0] == (Deed.WAKE,)


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from([None, HOME, "198.51.100.3"]), st.booleans()), max_size=80))
def test_whatever_happens_who_was_disturbed_is_told_once_when_it_is_announced_again(steps):
    waking, at, is_owed = Waking(PATIENCE), 0.0, False
    for gap, outward, is_announced in steps:
        at += gap
        deeds = waking.look(look(at, outward))
        assert deeds in ((), (Deed.ASK,), (Deed.WAKE,), (Deed.CUT, Deed.WAKE))
        is_owed |= Deed.WAKE in deeds
        if deeds == (Deed.ASK,):
            deeds = waking.told(at, is_announced=is_announced)
            assert deeds == ((Deed.TELL,) if is_announced and is_owed else deeds)
            assert is_announced or Deed.TELL not in deeds
            is_owed = (is_owed or Deed.WAKE in deeds) and not is_announced


def test_a_process_is_heavy_when_it_was_found_so_three_times_in_a_row():
    scales = Scales(100)
    assert [scales.weigh(nbytes).is_heavy for nbytes in (50, 101, 102, 100, 101, 102, 103, 104, 90)] == [
        *[False] * 6,
        True,
        True,
        False,
    ]
