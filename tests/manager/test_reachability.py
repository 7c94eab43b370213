"""What a lab is told of how others can reach it."""

import dataclasses

import pytest

from tether.manager.peering.reachability import Aid, judged, told_on
from tether.swarm.engine.engine import NodeStatus

SEEN = NodeStatus(
    address=("198.51.100.7", 4000),
    local=("192.0.2.2", 4000),
    firewalled=True,
    randomized=False,
    ephemeral=True,
    bootstrapped=True,
    online=True,
    degraded=False,
    announced=True,
    known=30,
    punches={},
    relaying={},
)


@pytest.mark.parametrize(
    ("changes", "state", "says"),
    [
        ({}, "ok", "holes can be punched"),
        ({"firewalled": False}, "ok", "from everywhere"),
        ({"randomized": True, "address": ("198.51.100.7", 0)}, "note", "relay"),
        ({"address": None}, "ok", "not agreed on yet"),
        ({"known": 0}, "fail", "UDP is blocked"),
        ({"bootstrapped": False}, "fail", "TETHER_BOOTSTRAP"),
    ],
)
def test_each_kind_of_network_has_its_advice(changes, state, says):
    found = judged(dataclasses.replace(SEEN, **changes))
    assert found.state == state
    assert says in found.detail


@pytest.mark.parametrize(
    ("changes", "aid", "state", "says"),
    [
        ({"randomized": True}, Aid(through=2), "ok", "through a relay, of 2 known"),
        ({"firewalled": False}, Aid(relays=True, pairs=3), "ok", "pairs now: 3"),
        ({}, Aid(relays=True), "note", "needs a public address"),
        ({"known": 0}, Aid(relays=True), "fail", "UDP is blocked"),
    ],
)
def test_relays_are_told_of_on_both_sides(changes, aid, state, says):
    found = judged(dataclasses.replace(SEEN, **changes), aid)
    assert found.state == state
    assert says in found.detail


def test_a_lab_that_begins_is_not_told_that_it_has_no_network_before_it_had_time_to_look():
    lone = dataclasses.replace(SEEN, known=0)
    assert told_on("tether://x", 100.0, 0, judged(lone), 101.0)["reachable"] is None
    assert told_on("tether://x", 100.0, 0, judged(lone), 200.0)["reachable"] == "fail"
    told = told_on("tether://x", 100.0, 3, judged(SEEN), 101.0)
    assert (told["state"], told["reachable"], told["peers"], told["since"]) == ("on", "ok", 3, 100.0)
