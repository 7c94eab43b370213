"""Pure: whether this manager may write now, as far as its own clock can tell, and which followers it may not do without.

It is bound to its lease from the moment it asks for a follower to count as being in step until the orchestrator has confirmed that none
does. Unbound, nobody can take its place, and it need not stop when the orchestrator is away.
"""

from __future__ import annotations

import math

from tether.errors import NotWriterError
from tether.events import Claim, Standing

__all__ = ["MARGIN", "Tenure"]

MARGIN = 1.0
"""Seconds that the lease is over here before it is there: two clocks need not run equally fast."""


class Tenure:
    """One manager's side of the lease. One claim is under way at a time."""

    def __init__(self, member: str, address: str, *, term: int, wrote: int, forced: bool = False) -> None:
        """`term`, `wrote`: what the store remembers."""
        self.member, self._address, self._forced = member, address, forced
        self.term, self.wrote = term, wrote
        self.holds = 0
        """The term in which this process writes; 0: it does not."""
        self.required: frozenset[str] = frozenset()
        """Followers that must have a change before it is acknowledged."""
        self._confirmed: frozenset[str] = frozenset()
        self._until = -math.inf
        self._sent = -math.inf
        self._dropped: frozenset[str] = frozenset()

    def claim(self, position: tuple[int, int], dropped: frozenset[str], now: float) -> Claim:
        """What to tell now; `dropped`: who is to be required no longer, once that is confirmed."""
        self._sent, self._dropped = now, dropped
        return Claim(
            member=self.member,
            address=self._address,
            holds=self.holds,
            term=self.term,
            wrote=self.wrote,
            position=position,
            in_step=tuple(sorted(self.required - dropped)),
            forced=self._forced,
        )

    def answered(self, standing: Standing) -> bool:
        """Take in the answer to the last claim. True: this manager writes in a new term, and is to begin it with `begin`."""
        self.term = max(self.term, standing.term)
        if standing.writer != self.member or standing.term < self.term:
            self.stop()
            return False
        if standing.term != self.holds:
            self.stop()
            return True
        self._until = self._sent + standing.lease - MARGIN
        self._confirmed = frozenset(standing.in_step)
        self.required -= self._dropped - self._confirmed
        return False

    def begin(self, term: int) -> None:
        """The store was told that it is written to in this term: from the next answer on it is."""
        self.holds = self.wrote = self.term = term
        self._forced = False
        self._until, self._confirmed, self.required = -math.inf, frozenset(), frozenset()

    def stop(self) -> None:
        """Write no longer."""
        self.holds, self._until = 0, -math.inf
        self.required = self._confirmed = self._dropped = frozenset()

    def require(self, members: frozenset[str]) -> None:
        """Acknowledge nothing any more that these followers have not; until now they have all that was."""
        self.required |= members

    def is_valid(self, now: float) -> bool:
        """Whether nobody else can have the lease."""
        if not self.holds:
            return False
        return now < self._until or not (self.required or self._confirmed)

    def check(self, now: float) -> int:
        """The term, if this manager may write. Raises: NotWriterError: nothing was done."""
        if not self.is_valid(now):
            raise NotWriterError("this manager does not hold the writer's lease, nothing was done: call again, another one is taking over")
        return self.holds
