"""Pure: how many requests may be sent a second time: retries that fail must not add to what made them fail.

A retry takes a token, and gives it back when it succeeds (as the AWS SDKs' standard mode has it): what a dead worker leaves goes on at
others at once, however much it is, while retries that fail end soon.  First attempts that succeed add a share of a token (Finagle, Envoy:
20 %), and time a few, so that a quiet service may try again as well.
"""

from __future__ import annotations

import random
from typing import Final

__all__ = ["RetryBudget", "backoff"]

_MOST: Final = 50.0
"""Retries at a time without an answer: of 3,000 requests that all fail within a minute less than a thirtieth is sent again."""
_PER_ANSWER: Final = 0.2
_PER_SECOND: Final = 0.5
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0


class RetryBudget:
    """Of one version on one gateway."""

    __slots__ = ("_at", "_most", "_tokens")

    def __init__(self, now: float, most: float = _MOST) -> None:
        self._most = self._tokens = most
        self._at = now

    def take(self, now: float) -> bool:
        """Whether one more request may be sent again."""
        self._tokens = min(self._tokens + (now - self._at) * _PER_SECOND, self._most)
        self._at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def succeeded(self, *, is_retry: bool) -> None:
        """An attempt was answered as it should."""
        if self._tokens < self._most:  # mostly there are all
            self._tokens = min(self._tokens + (1.0 if is_retry else _PER_ANSWER), self._most)


def backoff(tries: int, chance: random.Random) -> float:
    """Seconds before a request is tried for the next time: at random, up to twice as long each time ("full jitter")."""
    return chance.uniform(0.0, min(_FIRST_PAUSE * float(1 << min(tries, 10)), _LONGEST_PAUSE))
