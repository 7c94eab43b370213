"""Which route a request takes: the lab's own workers first, lent ones where those are gone, failed or busy."""

from hypothesis import given
from hypothesis import strategies as st

from tether.routing.policies import BUSY, least_outstanding
from tether.routing.table import Route
from tether.types import WorkerId

OWN = [Route(WorkerId(f"w{number}"), f"/s/w{number}") for number in range(3)]
LENT = [Route(WorkerId(f"lent-{number}"), f"/s/lent-{number}", slots=slots) for number, slots in enumerate((4, 8))]


def picked(routes, avoid=(), **outstanding):
    """Open requests by the route's worker, with `_` for `-`."""
    return least_outstanding(routes, lambda route: outstanding.get(route.worker.replace("-", "_"), 0), avoid)


def test_nobody_holds_it():
    assert picked([]) is None


def test_the_least_busy_of_the_lab_is_taken_and_the_first_of_equals():
    assert picked(OWN, w0=2, w1=1, w2=1) == OWN[1]
    assert picked(OWN, avoid=[OWN[1]], w0=2, w1=1, w2=1) == OWN[2]
    assert picked(OWN[:1], avoid=OWN) == OWN[0]


def test_a_lent_worker_waits_until_all_of_the_lab_are_busy():
    assert picked([*OWN, *LENT], w0=BUSY, w1=BUSY - 1, w2=BUSY) == OWN[1]
    assert picked([*OWN, *LENT], w0=BUSY, w1=BUSY, w2=BUSY) == LENT[1]
    assert picked([*OWN, *LENT], w0=BUSY, w1=BUSY, w2=BUSY, lent_1=5) == LENT[0]


def test_a_lent_worker_without_free_slots_is_not_waited_for():
    assert picked([OWN[0], *LENT], w0=BUSY, lent_0=4, lent_1=8) == OWN[0]


def test_what_failed_in_the_lab_goes_on_at_a_lent_worker_and_the_other_way_round():
    assert picked([OWN[0], LENT[0]], avoid=[OWN[0]]) == LENT[0]
    assert picked([OWN[0], LENT[0]], avoid=[OWN[0]], lent_0=100) == LENT[0]
    assert picked([OWN[0], LENT[0]], avoid=[LENT[0]], w0=BUSY) == OWN[0]
    assert picked([OWN[0], LENT[0]], avoid=[OWN[0], LENT[0]]) == OWN[0]


Loads = st.lists(st.integers(0, 2 * BUSY), max_size=4)
Lent = st.lists(st.tuples(st.integers(0, 16), st.integers(0, 32)), max_size=3)


@given(Loads, Lent, st.sets(st.integers(0, 6)))
def test_the_choice_is_one_that_the_rules_allow(own, lent, tried):
    routes = [Route(WorkerId(f"w{number}"), f"/s/w{number}") for number in range(len(own))]
    routes += [Route(WorkerId(f"l{number}"), f"/s/l{number}", slots) for number, (slots, _) in enumerate(lent)]
    outstanding = dict(zip(routes, [*own, *(taken for _, taken in lent)], strict=True))
    avoid = [route for number, route in enumerate(routes) if number in tried]
    chosen = least_outstanding(routes, outstanding.__getitem__, avoid)
    if not routes:
        assert chosen is None
        return
    usable = [route for route in routes if route not in avoid] or routes
    assert chosen in usable
    here = [route for route in usable if route.slots is None]
    if chosen.slots is None:
        assert outstanding[chosen] == min(outstanding[route] for route in here)
        free = [route for route in usable if route.slots is not None and outstanding[route] < route.slots]
        assert outstanding[chosen] < BUSY or not free
    elif here:
        assert all(outstanding[route] >= BUSY for route in here)
        assert outstanding[chosen] < chosen.slots
