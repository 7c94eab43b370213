"""Pure: how well other labs can reach this one, and what its people can do about it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from tether.errors import NotWriterError, TetherError, UnsupportedError
from tether.swarm.engine.engine import NodeStatus

__all__ = ["Aid", "Reachability", "judged", "told_off", "told_on"]

_LOOKING = 15.0
"""Seconds from the start in which a lab that knows no node yet may just be looking for the first ones."""
_NOT_NEEDED = "not needed yet: nobody was invited or allowed in, and nothing of other labs is kept here"


class Aid(NamedTuple):
    """Ways through other labs."""

    relays: bool = False
    """Whether this lab is to be one for others."""
    pairs: int = 0
    """Of labs that it joins now."""
    through: int = 0
    """Labs that this one may go through."""


class Reachability(NamedTuple):
    """What is to be told."""

    state: Literal["ok", "note", "fail"]
    """`note`: some labs can't; `fail`: none can."""
    detail: str


_NO_AID = Aid()


def judged(status: NodeStatus, aid: Aid = _NO_AID) -> Reachability:
    """Of a node that has looked for its neighbours; `aid`: what other labs are to it, and it to them."""
    found = _reached(status, aid.through)
    if not aid.relays or found.state == "fail":
        return found
    if status.firewalled:
        return Reachability(
            "note", f"{found.detail}. It is to relay, which nobody can use here: that needs a public address, or a forwarded UDP port"
        )
    return Reachability(found.state, f"{found.detail}; relays between labs that it knows (pairs now: {aid.pairs})")


def _reached(status: NodeStatus, relays: int) -> Reachability:
    if status.known == 0 or not status.bootstrapped:
        return Reachability(
            "fail",
            "no node of the DHT answers: there is no network, UDP is blocked, or the nodes to begin with are gone (--bootstrap, "
            "TETHER_BOOTSTRAP). The lab works on this machine; others can't find it. Let UDP out, or use another network",
        )
    nodes = f"{status.known} nodes known"
    if not status.firewalled:
        return Reachability("ok", f"reachable from everywhere ({_place(status)}, {nodes})")
    if status.randomized and relays:
        return Reachability(
            "ok",
            f"behind a NAT that shows each peer another port ({nodes}): peers behind such a one come through a relay, of {relays} known",
        )
    if status.randomized:
        return Reachability(
            "note",
            f"behind a NAT that shows each peer another port ({nodes}): peers behind such a one can't reach this lab, all others can. "
            "Forward a UDP port to this machine, or use a relay: a lab with a public address that was started with --relay and lets both "
            "sides in; this one finds it by itself if it is known here (`tether peers name`), or by --relay-through ADDRESS",
        )
    return Reachability("ok", f"behind a NAT or firewall through which holes can be punched ({_place(status)}, {nodes})")


def told_on(address: str, since: float, peers: int, found: Reachability, now: float) -> dict[str, Any]:
    """Of a lab that is on the swarm, what `ports.Replicating.swarm` answers."""
    row = {"state": "on", "address": address, "since": since, "peers": peers}
    if found.state == "fail" and now - since < _LOOKING:
        return row | {"reachable": None, "detail": "other nodes of the DHT are being looked for"}
    return row | {"reachable": found.state, "detail": found.detail}


def told_off(address: str, why: TetherError | None) -> dict[str, Any]:
    """Of one that is not; `why`: None: there was no reason to be there."""
    state = "off" if why is None or isinstance(why, UnsupportedError | NotWriterError) else "failed"
    detail = _NOT_NEEDED if why is None else str(why)
    return {"state": state, "address": address, "since": None, "peers": 0, "reachable": None, "detail": detail}


def _place(status: NodeStatus) -> str:
    return "its address is not agreed on yet" if status.address is None else f"seen at {status.address[0]}"
