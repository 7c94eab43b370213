"""Pure: how well other labs can reach this one, and what its people can do about it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from tether.swarm.engine.engine import NodeStatus

__all__ = ["Reachability", "judged"]


class Reachability(NamedTuple):
    """What is to be told."""

    state: Literal["ok", "note", "fail"]
    """`note`: some labs can't; `fail`: none can."""
    detail: str


def judged(status: NodeStatus) -> Reachability:
    """Of a node that has looked for its neighbours."""
    if status.known == 0 or not status.bootstrapped:
        return Reachability(
            "fail",
            "no node of the DHT answers: there is no network, UDP is blocked, or the nodes to begin with are gone (--bootstrap, "
            "TETHER_BOOTSTRAP). The lab works on this machine; others can't find it. Let UDP out, or use another network",
        )
    nodes = f"{status.known} nodes known"
    if not status.firewalled:
        return Reachability("ok", f"reachable from everywhere ({_place(status)}, {nodes})")
    if status.randomized:
        return Reachability(
            "note",
            f"behind a NAT that shows each peer another port ({nodes}): peers behind such a one can't reach this lab, all others can. "
            "Forward a UDP port to this machine, or let both sides use a relay",
        )
    return Reachability("ok", f"behind a NAT or firewall through which holes can be punched ({_place(status)}, {nodes})")


def _place(status: NodeStatus) -> str:
    return "its address is not agreed on yet" if status.address is None else f"seen at {status.address[0]}"
