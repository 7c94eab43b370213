"""What happened in the lab lately, for any number of listeners: they read at their own pace, and cost nothing but their place."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from tether.routing.changes import Contacts, Facts, changes, encounters
from tether.routing.lab_events import Kind, LabEvent
from tether.routing.table import Table, TableChange

__all__ = ["EventLog"]

_MOST_EVENTS: Final = 4096
"""That are kept: one to two megabytes, and days of a usual lab."""


class EventLog:
    """Of one gateway; belongs to its loop. Numbers begin with the microsecond of its start, so that they grow past its restarts."""

    def __init__(self, clock: Callable[[], float] = time.time, most: int = _MOST_EVENTS) -> None:
        self.last = self._before = int(clock() * 1e6)
        """Number of the last event, and of the one before the first that is kept."""
        self._clock, self._most = clock, most
        self._events = deque[LabEvent]()
        self._table: Table | None = None
        self._contacts: Contacts | None = None
        self.on_listener: Callable[[], None] = _nothing
        """Called whenever somebody begins to wait."""
        self._moved = asyncio.Event()
        self.is_closed = False

    def see(self, table: Table, change: TableChange | None = None) -> None:
        """The table is another one. `change`: what made it of the one before. The first one says how things are; nothing happened."""
        before, self._table = self._table, table
        if before is None:
            return
        was, now = (before, table) if change is None else (before.part(change), table.part(change))
        self._tell(changes(Facts.of(was), Facts.of(now), self.last, self._clock()))

    def meet(self, contacts: Contacts | None) -> None:
        """As `see`, for other labs; None: nobody looks at them any more."""
        before, self._contacts = self._contacts, contacts
        if before is not None and contacts is not None:
            self._tell(encounters(before, contacts, self.last, self._clock()))

    def tell(self, kind: Kind, **what: Any) -> None:
        """Something that no table shows. `what`: fields of `LabEvent`."""
        self._tell([LabEvent(seq=self.last + 1, at=self._clock(), kind=kind, **what)])

    def after(self, seq: int) -> list[LabEvent]:
        """What happened after that number; 0: all that is kept. Begins with `missed` where some of it can't be told."""
        found = [event for event in self._events if event.seq > seq]
        if seq and not self._before <= seq <= self.last:
            return [LabEvent(seq=self._before, at=self._clock(), kind=Kind.MISSED), *self._events]
        return found

    async def wait(self, seq: int, seconds: float) -> None:
        """Until there is something after that number, or it is closed, or that long."""
        self.on_listener()
        try:
            async with asyncio.timeout(seconds):
                while not self.is_closed and not self.after(seq):
                    await self._moved.wait()
        except TimeoutError:
            pass

    def close(self) -> None:
        """Nothing more is told: whoever waits is let go."""
        self.is_closed = True
        self._moved.set()

    def _tell(self, events: list[LabEvent]) -> None:
        self._events.extend(events)
        while len(self._events) > self._most:
            self._before = self._events.popleft().seq
        if events:
            self.last = events[-1].seq
            self._moved.set()
            self._moved = asyncio.Event()


def _nothing() -> None:
    """Until somebody wants to know."""
