"""Pure: which manager may write. It holds the lease for a term; the next term begins when the lease has ended and with one who has all.

A lease that was not renewed for `LEASE` seconds goes to a follower that the writer named as being in step: nothing is acknowledged that
those do not have. A writer that named none has the only whole store, and nobody takes its place. Claims and a time in, a standing out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from tether.events import Claim, Standing

__all__ = ["LEASE", "Lease", "Record"]

LEASE = 4.0
"""Seconds: long enough for a writer that swaps or whose host stalls, short enough for a take-over in ten."""
HEARD = 2.5
"""Seconds since the last claim of one who may be chosen: two were missed after that, it is probably gone."""


class Record(msgspec.Struct, frozen=True):
    """What must outlive the orchestrator: without it a follower that lacks something could be given the lease."""

    term: int = 0
    """Of the newest lease; 0: there never was one."""
    holder: str | None = None
    """Whose it is; None: it is not known any more, since this record was lost."""
    in_step: tuple[str, ...] = ()
    """The followers that have all that was acknowledged."""


@dataclass(frozen=True, slots=True)
class _Heard:
    claim: Claim
    connection: int
    at: float


class Lease:
    """The writer's lease of one cluster. `now`: seconds of a clock that never stands still, not in a host that sleeps either."""

    def __init__(self, record: Record | None = None, now: float = 0.0) -> None:
        self.record = record or Record()
        # When it was renewed for the last time is not on record: now, at the latest.
        self._expires = now + LEASE if self.record.term else -math.inf
        self._heard: dict[str, _Heard] = {}

    def claim(self, claim: Claim, connection: int, now: float) -> None:
        """A manager said how it stands. `connection`: grows; what still comes over an older one of the same manager is ignored."""
        known = self._heard.get(claim.member)
        if known is not None and known.connection > connection:
            return
        self._heard[claim.member] = _Heard(claim, connection, now)
        if claim.term > self.record.term:
            self._remember(claim, now)
        if claim.member == self.record.holder:
            self._renew(claim, now)
        self.decide(now)

    def left(self, member: str, connection: int, *, released: bool, now: float) -> None:
        """Its connection ended; `released`: it said before that it gives up the lease."""
        known = self._heard.get(member)
        if known is None or known.connection != connection:
            return
        del self._heard[member]
        if released and member == self.record.holder:
            self._expires = now
            self.decide(now)

    def decide(self, now: float) -> None:
        """Give the lease to the next one, if it has ended."""
        if now < self._expires:
            return
        heard = [each.claim for each in self._heard.values() if now - each.at < HEARD]
        able = [claim for claim in heard if self._may_hold(claim)]
        if not able and now >= self._expires + LEASE:
            able = [claim for claim in heard if claim.forced]
        if able:
            self._grant(min(able, key=_furthest_first), now)

    def standing(self) -> Standing:
        """As every manager is told it."""
        holder = self._heard.get(self.record.holder or "")
        address = holder.claim.address if holder is not None else None
        return Standing(self.record.term, self.record.holder, address, self.record.in_step, LEASE)

    def _renew(self, claim: Claim, now: float) -> None:
        """Of the process that has this term; another process of the same store gets a term of its own, at once: the first one is dead."""
        if claim.holds != self.record.term:
            if self._has_all(claim):
                self._grant(claim, now)
            return
        self._expires = now + LEASE
        if set(claim.in_step) != set(self.record.in_step):
            self.record = Record(self.record.term, self.record.holder, tuple(sorted(claim.in_step)))

    def _remember(self, claim: Claim, now: float) -> None:
        """A manager knows of a later term than the record, which was lost then. Who wrote in it has all; others may lack something."""
        self.record = Record(claim.term, claim.member if claim.holds == claim.term else None)
        self._expires = now + LEASE

    def _may_hold(self, claim: Claim) -> bool:
        record = self.record
        if record.holder is None:
            return claim.wrote == record.term
        return self._has_all(claim) if claim.member == record.holder else claim.member in record.in_step

    def _has_all(self, claim: Claim) -> bool:
        """Whether the holder's store is what it was. One that does not know that it wrote is a backup of long ago; where no follower has
        more, it is the best there is.
        """
        return claim.wrote == self.record.term or not self.record.in_step

    def _grant(self, claim: Claim, now: float) -> None:
        self.record = Record(self.record.term + 1, claim.member)
        self._expires = now + LEASE


def _furthest_first(claim: Claim) -> tuple[int, int, str]:
    term, change = claim.position
    return -term, -change, claim.member
