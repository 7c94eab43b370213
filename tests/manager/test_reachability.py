"""What a lab is told of how others can reach it."""

import dataclasses

import pytest

from tether.manager.peering.reachability import judged
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
