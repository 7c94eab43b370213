"""The gateway's connections to workers: one for each version that each of them has, made when it is needed first."""

from __future__ import annotations

from collections.abc import Callable, Collection

from tether.gateway.transport import UnixTransport
from tether.ports import Endpoint
from tether.wire.ring import Ring

__all__ = ["Lines"]

_RING_NBYTES = 256 << 20
"""Room for a few of the largest bodies; pages are taken only when touched."""


class Lines:
    """Of one gateway, with the memory in which it hands over large bodies."""

    def __init__(self) -> None:
        self.ring = _make_ring()
        self.transports: dict[Endpoint, UnixTransport] = {}
        self._left: set[Endpoint] = set()
        """No route leads there any more."""

    def to(self, endpoint: Endpoint) -> UnixTransport:
        """The connection there; another one, where the last one ended."""
        transport = self.transports.get(endpoint)
        if transport is None or transport.closed:
            transport = self.transports[endpoint] = UnixTransport(endpoint, self.ring)
        return transport

    def outstanding(self, endpoint: Endpoint) -> Callable[[], int]:
        """How many requests wait there, as far as one more would feel them; those included that nobody waits for any more."""
        transports = self.transports

        def count() -> int:
            transport = transports.get(endpoint)
            return transport.load if transport is not None and not transport.closed else 0

        return count

    def owed(self, endpoint: Endpoint) -> Callable[[], int]:
        """How many requests wait there for any answer, whether somebody still wants it or not."""
        transports = self.transports

        def count() -> int:
            transport = transports.get(endpoint)
            return transport.in_flight if transport is not None and not transport.closed else 0

        return count

    def follow(self, before: Collection[Endpoint], after: Collection[Endpoint]) -> None:
        """Routes led there, and lead here now. What is under way where none leads any more is answered, what is idle is closed."""
        self._left = (self._left | (self.transports.keys() & before)).difference(after)
        for endpoint in list(self._left):
            transport = self.transports.get(endpoint)
            if transport is None or transport.closed or transport.in_flight == 0:
                self._left.discard(endpoint)
                self.transports.pop(endpoint, None)
                if transport is not None:
                    transport.close()

    def close(self) -> None:
        """The end."""
        for transport in list(self.transports.values()):
            transport.close()
        if self.ring is not None:
            self.ring.close()


def _make_ring() -> Ring | None:
    """None where the platform has no memfd: large bodies then travel in frames."""
    try:
        return Ring(_RING_NBYTES)
    except (AttributeError, OSError):
        return None
