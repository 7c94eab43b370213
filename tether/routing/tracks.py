"""Pure: the track record of a route: what one gateway saw of it lately. Policies choose by it, and `health.py` judges it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from tether.routing.table import Route

__all__ = ["Track"]

_MEMORY: Final = 5.0
"""Seconds in which a peak of `latency` falls to a third: long enough to see a stall twice, short enough to forgive a cold start."""
_FADES: Final = math.exp(-1.0 / _MEMORY)
"""Each second."""
_SHARE: Final = 0.1
"""Of the last answer in `usual`."""
_UNPROVEN: Final = 1e6
"""Latency taken for a route that owes answers and never gave one: it must not get everything while it is new."""


class Track:
    """Mutable; belongs to one version's `Steering`."""

    __slots__ = (
        "answers", "back_at", "cause", "ejected_until", "errors", "failing_since", "is_out", "is_probed", "latency", "outstanding", "owed",
        "owes", "region", "replied", "route", "stints", "succeeded", "usual", "weight",
    )  # fmt: skip

    def __init__(
        self, route: Route, outstanding: Callable[[], int], owes: Callable[[], int], weight: float = 1.0, region: str = ""
    ) -> None:
        """`outstanding`: requests that one more would feel; `owes`: answers that are to come from there, wanted or not."""
        self.route, self.outstanding, self.owes, self.weight, self.region = route, outstanding, owes, weight, region
        self.latency = self.usual = 0.0
        """Seconds of its answers: the latest peak, fading (peak-EWMA, as Finagle has it); the average of the last ten or so."""
        self.answers = 0
        """Since it is in use."""
        self.replied = self.succeeded = -math.inf
        """When it answered last: whatever it was; as it should."""
        self.errors, self.failing_since = 0, 0.0
        """In a row, and since when."""
        self.is_out = self.is_probed = False
        self.cause = ""
        self.ejected_until, self.back_at = 0.0, -math.inf
        self.stints = 0
        """Ejections in a row."""
        self.owed = 0
        """Answers that it owed when it was ejected for its silence."""

    @property
    def is_lent(self) -> bool:
        """Whether it leads to another lab's worker."""
        return self.route.slots is not None

    @property
    def free(self) -> int:
        """Of a lent worker: slots that this gateway has not taken."""
        return (self.route.slots or 0) - self.outstanding()

    @property
    def cost(self) -> float:
        """Seconds that one more request is likely to wait here."""
        outstanding = self.outstanding()
        latency = self.latency or (_UNPROVEN if outstanding else 0.0)
        return latency * (outstanding + 1)

    def took(self, seconds: float, now: float) -> None:
        """It answered as it should, after so long."""
        if seconds >= self.latency:
            self.latency = seconds
        else:
            kept = math.exp((self.succeeded - now) / _MEMORY)
            self.latency = self.latency * kept + seconds * (1.0 - kept)
        self.usual += (seconds - self.usual) * (_SHARE if self.answers else 1.0)
        self.answers += 1
        self.errors = 0
        self.replied = self.succeeded = now

    def rested(self, now: float) -> None:
        """One more second has passed. Who had no request in it is forgiven as well, else no policy would learn that it was cured."""
        if now - self.succeeded >= 1.0 and not self.owes():
            self.latency *= _FADES

    def lasted(self, seconds: float) -> None:
        """It had no answer after so long, and nobody waits for it any more."""
        self.latency = max(self.latency, seconds)
