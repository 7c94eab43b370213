"""Pure: when a request that has no answer yet is sent to a second worker as well (Dean and Barroso, The Tail at Scale, 2013)."""

from __future__ import annotations

from typing import Final

__all__ = ["Hedging"]

_SHARE: Final = 0.05
"""Of the requests that may be sent twice: the tail is worth that, and a lab that is slow as a whole must not get twice the load."""
_MOST: Final = 10.0
"""That may be sent twice at once, after a time without."""
_KEPT: Final = 512
"""Answers from which the quantile is read."""
_EVERY: Final = 64
"""Answers after which it is read again: sorting them costs 20 µs."""
_ENOUGH: Final = 20
_LATE: Final = 1.5
"""How many times that quantile has to pass. At 95 % itself one in twenty is late by chance: they would spend what stalled ones need."""


class Hedging:
    """Of one version on one gateway."""

    __slots__ = ("_index", "_seconds", "_share", "_tokens", "after")

    def __init__(self, quantile: float) -> None:
        """`quantile`: of the latest answers those that come before a second request is sent."""
        self._share = quantile
        self._seconds: list[float] = []
        self._index = 0
        self._tokens = 0.0
        self.after: float | None = None
        """Seconds after which a request is sent a second time; None: it is not known yet."""

    def began(self) -> None:
        """One more request."""
        self._tokens = min(self._tokens + _SHARE, _MOST)

    def take(self) -> bool:
        """Whether one may be sent a second time now."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def took(self, seconds: float) -> None:
        """A request was answered after so long."""
        if len(self._seconds) < _KEPT:
            self._seconds.append(seconds)
        else:
            self._seconds[self._index % _KEPT] = seconds
        self._index += 1
        if self._index >= _ENOUGH and (self._index % _EVERY == 0 or self.after is None):
            ordered = sorted(self._seconds)
            self.after = _LATE * ordered[min(int(len(ordered) * self._share), len(ordered) - 1)]
