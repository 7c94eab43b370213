"""Pure: what a stream hands its socket, and what it counts."""

from __future__ import annotations

from typing import NamedTuple

from tether.swarm.udx.wire import Buffer

__all__ = ["Outgoing", "Statistics"]


class Outgoing(NamedTuple):
    """Datagrams for the socket: `wire` cut each `nbytes`."""

    wire: Buffer
    nbytes: int
    path: object
    may_fragment: bool = False
    """Too large for what the path seems to carry: better in pieces than never."""


class Statistics:
    """Counted from a stream's beginning."""

    __slots__ = ("nbytes_received", "nbytes_sent", "packets_received", "packets_sent", "probes", "recoveries", "resent", "timeouts")

    def __init__(self) -> None:
        self.nbytes_sent = self.nbytes_received = 0
        self.packets_sent = self.packets_received = 0
        self.resent = self.recoveries = self.probes = self.timeouts = 0

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return {name: getattr(self, name) for name in self.__slots__}
