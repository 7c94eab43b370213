"""How many requests of another lab run here at a time: the others wait in turn, and who asks is told how long that takes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from tether.errors import ManagerLeavingError, QueueFullError

__all__ = ["Turnstile"]

_QUEUE: Final = 4
"""Times the slots: requests that may wait. The other lab's gateway asks its other workers with what is more."""
_WEIGHT: Final = 0.1
"""Of the latest request in the mean."""


class Turnstile:
    """Belongs to one event loop."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean = 0.0
        self._is_leaving = False

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return max(0, self.slots - self._running)

    @property
    def queue(self) -> float:
        """Seconds until one that comes now would begin."""
        return 0.0 if self.free else self._mean * (len(self._waiting) + 1) / max(1, self.slots)

    def resize(self, slots: int) -> None:
        """So many from now on."""
        self.slots = slots
        self._admit()

    def leave(self) -> None:
        """This manager is about to end: nobody gets a slot any more, and who waits for one has run nothing."""
        self._is_leaving = True
        waiting, self._waiting = self._waiting, deque()
        for place in waiting:
            if not place.done():
                place.set_exception(_leaving())

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Have a slot in the body. Raises: QueueFullError: too many wait; ManagerLeavingError."""
        await self._enter()
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            yield
        finally:
            seconds = clock() - began
            self._mean = self._mean + _WEIGHT * (seconds - self._mean) if self._mean else seconds
            self._leave()

    async def _enter(self) -> None:
        if self._is_leaving:
            raise _leaving()
        if self._running < self.slots:
            self._running += 1
            return
        if len(self._waiting) >= _QUEUE * self.slots:
            raise QueueFullError(f"{len(self._waiting)} requests wait for the {self.slots} slots that this lab lends: ask another worker")
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                with contextlib.suppress(ValueError):
                    self._waiting.remove(place)
            elif place.exception() is None:  # it was this one's turn just now
                self._leave()
            raise

    def _leave(self) -> None:
        self._running -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._running < self.slots:
            place = self._waiting.popleft()
            if not place.done():
                self._running += 1
                place.set_result(None)


def _leaving() -> ManagerLeavingError:
    return ManagerLeavingError("the manager of the lab that lends is about to end and ran nothing: ask another worker")
