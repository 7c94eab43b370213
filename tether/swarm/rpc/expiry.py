"""When to look for calls that nobody waits for any more: one timer for all of them, however many there are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["NEVER", "Expiry"]

NEVER = float("inf")


class Expiry:
    """A timer of its own for each call costs more than all else that a small one does with time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, look: Callable[[float], float], grain: float) -> None:
        """`look` ends what is over at a time and says when the next one is, or `NEVER`. `grain`: seconds between two looks, at least."""
        self._loop, self._look, self._grain = loop, look, grain
        self._at = NEVER
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, end: float) -> None:
        """Something ends then, on the loop's clock, unless it is done before."""
        if end < self._at:
            self.stop()
            self._at = end
            self._timer = self._loop.call_at(end, self._fire)

    def stop(self) -> None:
        """Nothing is expected any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._at, self._timer = NEVER, None

    def _fire(self) -> None:
        self._at, self._timer = NEVER, None
        now = self._loop.time()
        self.expect(max(self._look(now), now + self._grain))
