"""Pure: which labs are shown to people: those that they know, those that are connected, and some that are known by what they say alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice

from tether.manager.admission import Neighbour
from tether.swarm.node.node import Connection
from tether.swarm.records.records import Record

__all__ = ["acquaintances"]

_MOST_OTHERS = 64
"""Labs that are neither known nor connected."""


def acquaintances(
    known: Collection[str], connections: Sequence[Connection], said: Mapping[str, Record], is_met: Callable[[str], bool]
) -> list[Neighbour]:
    """`known`: keys that people here know; `said`: what labs say of themselves, those that are likeliest to matter first."""
    connected = {each.peer: each for each in connections}
    others = islice((peer for peer in said if peer not in known and peer not in connected), _MOST_OTHERS)
    shown = []
    for peer in dict.fromkeys((*connected, *(peer for peer in known if peer in said or is_met(peer)), *others)):
        connection = connected.get(peer)
        route, round_trip = (connection.route, connection.round_trip or None) if connection else (None, None)
        shown.append(Neighbour(peer, route, round_trip, said.get(peer), is_met(peer)))
    return shown
