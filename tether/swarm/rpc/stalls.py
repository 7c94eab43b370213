"""Pure: which bodies do not come, though there is room for them."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

__all__ = ["Stalls"]

_PROGRESS_NBYTES = 1 << 16
"""Of all bodies of a peer together, since they share a line: as a gateway counts it, so that drops keep nothing open."""


class Stalls:
    """Of one peer; looked for now and then."""

    def __init__(self) -> None:
        self._awaited: AbstractSet[int] = frozenset()
        self._arrived = 0

    def look(self, awaited: AbstractSet[int], arrived: int) -> AbstractSet[int]:
        """Those that were awaited at the last look too, if next to nothing came since. `arrived`: bytes of bodies, ever.

        >>> stalls = Stalls()
        >>> stalls.look({1}, 0), stalls.look({1, 2}, 100_000), stalls.look({1, 2, 3}, 100_001) == {1, 2}
        (set(), set(), True)
        """
        came, before = arrived - self._arrived, self._awaited
        self._awaited, self._arrived = awaited, arrived
        return awaited & before if came < _PROGRESS_NBYTES else set()
